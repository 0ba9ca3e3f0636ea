"""What ``decode_attention`` computes, sequence by sequence and head by head."""

from collections.abc import Sequence

import torch


def decode_attention_reference(
    q_BHD: torch.Tensor,
    pool_layer: torch.Tensor,
    tables: Sequence[Sequence[int]],
    lengths: Sequence[int],
    window: int | None = None,
) -> torch.Tensor:
    """``[B, H, D]``: softmax(q k / sqrt(D)) v over the last ``window`` of each sequence's ``lengths`` tokens.

    ``pool_layer`` [blocks, 2, kv heads, block_size, D]; ``tables`` the block ids of each sequence.
    """
    num_heads, dim = q_BHD.shape[1], q_BHD.shape[2]
    kv_heads, block_size = pool_layer.shape[2], pool_layer.shape[3]
    out = torch.empty_like(q_BHD)
    for b, (table, length) in enumerate(zip(tables, lengths, strict=True)):
        first = 0 if window is None else max(0, length - window)
        places = [(table[t // block_size], t % block_size) for t in range(first, length)]
        for head in range(num_heads):
            kv_head = head // (num_heads // kv_heads)
            k_TD = torch.stack([pool_layer[block, 0, kv_head, offset] for block, offset in places])
            v_TD = torch.stack([pool_layer[block, 1, kv_head, offset] for block, offset in places])
            out[b, head] = torch.softmax(k_TD @ q_BHD[b, head] / dim**0.5, dim=0) @ v_TD
    return out
