"""Rotation in place on feature-major q and k, then one scatter of k and v into the layer's pool.

Shapes: H query heads, K kv heads, D head_dim, R rotary_dim, N tokens (padded), M real tokens of them.
"""

import torch


def cache_rows(blocks_M: torch.Tensor, offsets_M: torch.Tensor, num_kv_heads: int, block_size: int) -> torch.Tensor:
    """Row numbers ``[2 * K * M]`` of a pool layer seen as ``[blocks * 2 * K * block_size, D]``, order (k/v, head, token)."""
    sides = torch.arange(2 * num_kv_heads).unsqueeze(1)
    return ((blocks_M * (2 * num_kv_heads) + sides) * block_size + offsets_M).view(-1)


def rope_and_cache(
    qk_H2RN: torch.Tensor,
    kv_KDN: torch.Tensor,
    cos_RN: torch.Tensor,
    sin_RN: torch.Tensor,
    pool_rows: torch.Tensor,
    rows: torch.Tensor,
) -> torch.Tensor:
    """Rotates ``qk`` in place and writes ``kv``; returns k and v token-major, ``[2 * K, M, D]``.

    ``qk`` [H + K, 2, R / 2, N] and ``kv`` [2 * K, D, N] are views of one qkv buffer, so ``kv`` holds rotated keys.
    ``cos``, ``sin`` [R / 2, N]; ``pool_rows`` [blocks * 2 * K * block_size, D]; ``rows`` as from ``cache_rows``.
    """
    first_turned, second_turned = (qk_H2RN * sin_RN).unbind(1)
    first, second = qk_H2RN.mul_(cos_RN).unbind(1)
    first.sub_(second_turned)
    second.add_(first_turned)
    dim = kv_KDN.shape[1]
    num_tokens = rows.shape[0] // kv_KDN.shape[0]
    kv_KMD = kv_KDN[:, :, :num_tokens].transpose(1, 2).contiguous()
    pool_rows.index_copy_(0, rows, kv_KMD.view(-1, dim))
    return kv_KMD
