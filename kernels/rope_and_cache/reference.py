"""What ``rope_and_cache`` does, token by token."""

from collections.abc import Sequence

import torch


def rope_and_cache_reference(
    qkv_FN: torch.Tensor,
    inverse_frequencies: Sequence[float],
    positions: Sequence[int],
    places: Sequence[tuple[int, int]],
    pool_layer: torch.Tensor,
    num_heads: int,
) -> None:
    """Rotates q and k of ``qkv`` in place and writes k, v of token n to ``places[n]`` = (block, offset).

    ``qkv`` [(h + 2 kv) * d, N]; ``pool_layer`` [blocks, 2, kv, block_size, d].
    """
    kv_heads, dim = pool_layer.shape[2], pool_layer.shape[4]
    half = len(inverse_frequencies)
    heads = qkv_FN.view(num_heads + 2 * kv_heads, dim, -1)
    for n, (position, (block, offset)) in enumerate(zip(positions, places, strict=True)):
        angle = torch.tensor([position * f for f in inverse_frequencies], dtype=torch.float64)
        cos, sin = angle.cos().float(), angle.sin().float()
        for head in range(num_heads + kv_heads):
            first, second = heads[head, :half, n].clone(), heads[head, half : 2 * half, n].clone()
            heads[head, :half, n] = first * cos - second * sin
            heads[head, half : 2 * half, n] = second * cos + first * sin
        for head in range(kv_heads):
            pool_layer[block, 0, head, offset] = heads[num_heads + head, :, n]
            pool_layer[block, 1, head, offset] = heads[num_heads + kv_heads + head, :, n]
