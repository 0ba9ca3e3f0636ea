"""Decode attention on the CPU: a group of sequences' K is gathered into a buffer that stays in cache and multiplied,
then their V into the same buffer.

Shapes: B sequences of a group, K kv heads, G query heads per kv head, D head_dim, T padded context of the group,
N tokens of the step (the decode tokens come first). The heads of a group are the rows of one product, so each
K and V element is read once for all of them.

Places of a block beyond a sequence's end are multiplied by a weight of exactly 0, so they must hold finite numbers.
They do: the pool starts as zeros, and only what a model computed is ever written, here or by a transfer.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

_GROUP_BYTES = 4 << 20
"""Gathered K (then V) of one group: small enough for the last-level cache, large enough to keep the call count low."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeGroup:
    """Sequences whose blocks are gathered together; the same for every layer of a step."""

    start: int
    """First of its tokens in the step; there are ``count``."""
    count: int
    k_rows: torch.Tensor
    """K's rows ``[B * K * blocks]`` of a layer seen as ``[blocks * 2 * K, block_size * D]``."""
    v_rows: torch.Tensor
    mask: torch.Tensor
    """``[B * K, 1, T]``, 0 where a position may be seen, -inf where not."""
    buffer: torch.Tensor
    """``[B * K * blocks, block_size * D]``, shared by K and V, all groups and layers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeBatch:
    groups: tuple[DecodeGroup, ...]
    num_tokens: int
    q_BKGD: torch.Tensor
    """Where every layer puts its queries: ``[tokens, K, rows, D]``, rows beyond G (``_fast_rows``) zero."""


def plan_decode(
    tables: Sequence[Sequence[int]],
    lengths: Sequence[int],
    *,
    num_heads: int,
    num_kv_heads: int,
    block_size: int,
    head_dim: int,
    window: int | None,
    scratch: torch.Tensor,
) -> tuple[DecodeBatch, torch.Tensor]:
    """Groups sequences (in the given order: sort by length for little padding) and numbers their pool rows.

    Returns the batch and the scratch buffer (flat float32), grown when it was too small.
    """
    firsts = [0 if window is None else max(0, length - window) // block_size for length in lengths]
    counts = [-(-length // block_size) - first for length, first in zip(lengths, firsts, strict=True)]
    block_floats = num_kv_heads * block_size * head_dim
    bounds: list[tuple[int, int, int]] = []
    start, widest = 0, 0
    for i, count in enumerate(counts):
        wider = max(widest, count)
        if i > start and (i + 1 - start) * wider * block_floats * 4 > _GROUP_BYTES:
            bounds.append((start, i, widest))
            start, wider = i, count
        widest = wider
    bounds.append((start, len(counts), widest))
    needed = max((end - begin) * width for begin, end, width in bounds) * block_floats
    if scratch.numel() < needed:
        scratch = torch.empty(needed + needed // 4)
    sides = torch.arange(2).view(2, 1, 1, 1) * num_kv_heads + torch.arange(num_kv_heads).view(1, 1, -1, 1)
    groups = []
    for begin, end, width in bounds:
        table = torch.tensor(
            [
                [*tables[i][firsts[i] : firsts[i] + counts[i]], *([tables[i][firsts[i]]] * (width - counts[i]))]
                for i in range(begin, end)
            ]
        )
        rows = (table.view(1, end - begin, 1, width) * (2 * num_kv_heads) + sides).reshape(2, -1)
        position = torch.arange(width * block_size) + torch.tensor(firsts[begin:end]).unsqueeze(1) * block_size
        length = torch.tensor(lengths[begin:end]).unsqueeze(1)
        hidden = position >= length
        if window is not None:
            hidden |= position < length - window
        mask = torch.zeros(hidden.shape).masked_fill_(hidden, -torch.inf)
        groups.append(
            DecodeGroup(
                start=begin,
                count=end - begin,
                k_rows=rows[0],
                v_rows=rows[1],
                mask=mask.repeat_interleave(num_kv_heads, dim=0).unsqueeze(1),
                buffer=scratch[: rows.shape[1] * block_size * head_dim].view(rows.shape[1], block_size * head_dim),
            )
        )
    queries = torch.zeros(len(lengths), num_kv_heads, _fast_rows(num_heads // num_kv_heads), head_dim)
    return DecodeBatch(groups=tuple(groups), num_tokens=len(lengths), q_BKGD=queries), scratch


def decode_attention(
    q_KGDN: torch.Tensor, layer_rows: torch.Tensor, batch: DecodeBatch, scale: float, out_KGDN: torch.Tensor
) -> None:
    """Writes the first ``batch.num_tokens`` columns of ``out``; ``q`` and ``out`` are ``[K, G, D, N]`` views.

    ``layer_rows``: one layer of the pool as ``[blocks * 2 * K, block_size * D]``.
    """
    kv_heads, group_size, dim, _ = q_KGDN.shape
    q_BKGD = batch.q_BKGD
    rows_of_head = q_BKGD.shape[2]
    q_BKGD[:, :, :group_size].copy_(q_KGDN[..., : batch.num_tokens].permute(3, 0, 1, 2))
    for group in batch.groups:
        num_rows = group.count * kv_heads
        gathered_RTD = group.buffer.view(num_rows, -1, dim)
        torch.index_select(layer_rows, 0, group.k_rows, out=group.buffer)
        q_RGD = q_BKGD[group.start : group.start + group.count].view(num_rows, rows_of_head, dim)
        scores = torch.baddbmm(group.mask, q_RGD, gathered_RTD.transpose(1, 2), alpha=scale)
        weights = torch.softmax(scores, dim=-1)
        torch.index_select(layer_rows, 0, group.v_rows, out=group.buffer)
        o_RGD = torch.bmm(weights, gathered_RTD)
        out_KGDN[..., group.start : group.start + group.count].copy_(
            o_RGD.view(group.count, kv_heads, rows_of_head, dim)[:, :, :group_size].permute(1, 2, 3, 0)
        )


def _fast_rows(group_size: int) -> int:
    """Rows per product: three take a third longer than four (docs/decisions), so the rest are zeros."""
    return group_size if group_size < 3 else -(-group_size // 4) * 4
