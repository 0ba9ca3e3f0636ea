"""What ``prefill_attention`` computes, token by token and head by head."""

from collections.abc import Sequence

import torch


def prefill_attention_reference(
    q_NHD: torch.Tensor, pool_layer: torch.Tensor, table: Sequence[int], start: int, window: int | None = None
) -> torch.Tensor:
    """``[N, H, D]``: token n, at position start + n, attends to itself and all (or window - 1) tokens before it."""
    num_tokens, num_heads, dim = q_NHD.shape
    kv_heads, block_size = pool_layer.shape[2], pool_layer.shape[3]
    out = torch.empty_like(q_NHD)
    for n in range(num_tokens):
        end = start + n + 1
        first = 0 if window is None else max(0, end - window)
        places = [(table[t // block_size], t % block_size) for t in range(first, end)]
        for head in range(num_heads):
            kv_head = head // (num_heads // kv_heads)
            k_TD = torch.stack([pool_layer[block, 0, kv_head, offset] for block, offset in places])
            v_TD = torch.stack([pool_layer[block, 1, kv_head, offset] for block, offset in places])
            out[n, head] = torch.softmax(k_TD @ q_NHD[n, head] / dim**0.5, dim=0) @ v_TD
    return out
