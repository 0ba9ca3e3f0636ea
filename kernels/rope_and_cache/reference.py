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


def rope_and_cache_paged_reference(
    qkv_NX: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    table: torch.Tensor,
    pool_layer: torch.Tensor,
    *,
    num_heads: int,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    eps: float = 1e-6,
    kv_scale: torch.Tensor | None = None,
) -> None:
    """Token-major, with the Triton launcher's arguments: q turned in place, k and v written at ``slots``."""
    _, _, kv_heads, block_size, dim = pool_layer.shape
    rows = torch.nonzero(slots >= 0).squeeze(1)  # of tokens that are no padding
    block, offset = slots[rows] // block_size, slots[rows] % block_size
    heads_NHD = qkv_NX[rows].float().view(len(rows), num_heads + 2 * kv_heads, dim)
    q, k, v = heads_NHD.split([num_heads, kv_heads, kv_heads], dim=1)
    cos, sin = table[positions[rows].long()].unsqueeze(2).unbind(1)
    q, k = _turned(_normed(q, q_norm, eps), cos, sin), _turned(_normed(k, k_norm, eps), cos, sin)
    qkv_NX[rows, : num_heads * dim] = q.flatten(1).to(qkv_NX.dtype)
    for side, values in enumerate((k, v)):
        if kv_scale is not None:
            values = (values / kv_scale[side].view(-1, 1)).clamp(-448, 448)
        pool_layer[block, side, :, offset] = values.to(pool_layer.dtype)


def _normed(x_NHD: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    if weight is None:
        return x_NHD
    return x_NHD * torch.rsqrt((x_NHD * x_NHD).mean(dim=-1, keepdim=True) + eps) * weight.float()


def _turned(x_NHD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = cos.shape[-1]
    first, second, rest = x_NHD.split([half, half, x_NHD.shape[-1] - 2 * half], dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)
