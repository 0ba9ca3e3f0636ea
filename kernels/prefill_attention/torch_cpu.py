"""Prefill attention on the CPU, one chunk at a time through torch's flash kernel.

Shapes: K kv heads, G query heads per kv head, D head_dim, n tokens of the chunk, T context with the chunk,
N tokens of the step. A prompt's first chunk attends to its own fresh k and v; later ones gather the context.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillChunk:
    """One chunk; the same for every layer of a step."""

    start: int
    """First of its tokens in the step; there are ``count``."""
    count: int
    rows: torch.Tensor | None
    """Pool rows ``[2 * K * blocks]`` of the context, chunk included; None: the chunk is the whole context."""
    context: int
    """Tokens in the gathered blocks up to the chunk's end."""
    mask: torch.Tensor | None
    """``[n, T]`` additive; None: plainly causal."""


def plan_prefill(
    table: Sequence[int],
    *,
    start: int,
    position: int,
    count: int,
    num_kv_heads: int,
    block_size: int,
    window: int | None,
) -> PrefillChunk:
    """``count`` tokens at ``position`` of their sequence, which are tokens ``start`` .. of the step."""
    first_block = 0 if window is None else max(0, position - window + 1) // block_size
    first = first_block * block_size
    end = position + count
    if position == 0 and (window is None or count <= window):
        return PrefillChunk(start=start, count=count, rows=None, context=count, mask=None)
    asked = torch.arange(position, end).unsqueeze(1)
    seen = torch.arange(first, end)
    hidden = seen > asked
    if window is not None:
        hidden |= seen <= asked - window
    rows = None
    if position > 0:
        blocks = torch.tensor(table[first_block : -(-end // block_size)])
        rows = (blocks * (2 * num_kv_heads) + torch.arange(2 * num_kv_heads).unsqueeze(1)).view(-1)
    mask = torch.zeros(hidden.shape).masked_fill_(hidden, -torch.inf)
    return PrefillChunk(start=start, count=count, rows=rows, context=end - first, mask=mask)


def prefill_attention(
    q_KGDN: torch.Tensor,
    kv_XMD: torch.Tensor,
    layer_rows: torch.Tensor,
    chunk: PrefillChunk,
    scale: float,
    out_KGDN: torch.Tensor,
) -> None:
    """Writes the chunk's columns of ``out`` ``[K, G, D, N]``.

    ``kv_XMD`` ``[2 * K, M, D]``: this step's k and v, token-major; ``layer_rows`` as in decode attention.
    """
    kv_heads, group_size, dim, _ = q_KGDN.shape
    span = slice(chunk.start, chunk.start + chunk.count)
    q_KGnD = q_KGDN[..., span].transpose(2, 3).contiguous()
    if chunk.rows is None:
        kv_XTD = kv_XMD[:, span]
    else:
        gathered = torch.index_select(layer_rows, 0, chunk.rows)
        kv_XTD = gathered.view(2 * kv_heads, -1, dim)[:, : chunk.context]
    # kv heads as the batch, their query heads sharing k and v by a stride of 0: torch's enable_gqa is not fused here
    shared = (kv_heads, group_size, chunk.context, dim)
    out_KGnD = F.scaled_dot_product_attention(
        q_KGnD,
        kv_XTD[:kv_heads].unsqueeze(1).expand(shared),
        kv_XTD[kv_heads:].unsqueeze(1).expand(shared),
        attn_mask=chunk.mask,
        is_causal=chunk.mask is None,
        scale=scale,
    )
    out_KGDN[..., span].copy_(out_KGnD.transpose(2, 3))
