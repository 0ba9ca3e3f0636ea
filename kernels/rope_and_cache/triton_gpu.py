"""Rotary embedding (Su et al., 2021) of q and k, RMS norm of their heads before it (Qwen3), and the write of k and v to
the paged cache, in one pass over the fused product.

Hugging Face's convention: the first half of a head's rotary part turns against its second half. Shapes: N tokens,
H query heads, K kv heads, D head_dim, R <= D rotary part, P positions of the table.
"""

import torch

from biphase.kernels.gpu import table_check
from biphase.kernels.gpu.check import (
    check_base,
    check_contiguous,
    check_dtype,
    check_one_of,
    check_rows,
    check_same_device,
    check_shape,
)
from biphase.kernels.gpu.dependent_launch import dependent_launch
from biphase.kernels.gpu.launch import launch
from biphase.kernels.gpu.target import Target, target_of
from biphase.kernels.gpu.tuning import Settings, tuned
from biphase.kernels.rope_and_cache.rotation_table import rotation_table
from biphase.kernels.rope_and_cache.triton_kernel import rope_and_cache_kernel

__all__ = ["candidates", "default_settings", "key_of", "rope_and_cache", "rotation_table"]

OP = "rope_and_cache"
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_FP8 = torch.float8_e4m3fn


def rope_and_cache(
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
    """Rotates q in ``qkv`` in place; writes rotated k, and v, to ``pool_layer`` at ``slots`` (``qkv`` keeps k as it was).

    ``qkv`` [N, (H + 2 K) * D]; ``positions`` [N] int32, below P; ``slots`` [N] int64 = block * block_size + offset, -1 for a
    padding row, which is left alone; ``table`` [P, 2, R / 2] from ``rotation_table``; ``pool_layer`` [blocks, 2, K,
    block_size, D]. An e4m3 pool takes ``kv_scale`` [2, K] float32: code = clamp(x / scale, -448, 448). Arithmetic is in
    float32 throughout. In debug mode (kernels.gpu.table_check) slots, and positions of rows with one, are checked too.
    Raises ValueError naming the argument.
    """
    check_shape("pool_layer", pool_layer, None, 2, None, None, None)
    num_blocks, _, kv_heads, block_size, head_dim = pool_layer.shape
    if num_heads < 1:
        raise ValueError(f"num_heads is {num_heads}, it must be at least 1")
    if kv_heads < 1:
        raise ValueError(f"pool_layer has shape {list(pool_layer.shape)}, it must hold at least 1 head")
    check_shape("qkv", qkv_NX, None, (num_heads + 2 * kv_heads) * head_dim)
    num_tokens = qkv_NX.shape[0]
    check_shape("table", table, None, 2, None)
    half = table.shape[2]
    if not 0 < 2 * half <= head_dim:
        raise ValueError(f"table rotates {2 * half} of the {head_dim} dimensions of a head")
    check_one_of("head_dim", head_dim, (64, 96, 128, 256))
    check_one_of("block_size", block_size, (16, 32, 64, 128))
    check_dtype("qkv", qkv_NX, *_DTYPES)
    check_rows("qkv", qkv_NX)
    check_dtype("pool_layer", pool_layer, *_DTYPES, _FP8)
    for name, tensor, dtype in (("positions", positions, torch.int32), ("slots", slots, torch.int64)):
        check_shape(name, tensor, num_tokens)
        check_dtype(name, tensor, dtype)
    check_dtype("table", table, torch.float32)
    for name, tensor in {"pool_layer": pool_layer, "table": table, "positions": positions, "slots": slots}.items():
        check_contiguous(name, tensor)
    check_base("table", table)
    check_rows("pool_layer", pool_layer)
    _check_norms(head_dim, q_norm=q_norm, k_norm=k_norm)
    target = target_of(qkv_NX.device)
    _check_scale(pool_layer, kv_scale, target)
    check_same_device(
        qkv=qkv_NX,
        positions=positions,
        slots=slots,
        table=table,
        pool_layer=pool_layer,
        q_norm=q_norm,
        k_norm=k_norm,
        kv_scale=kv_scale,
    )
    if table_check.may_check(qkv_NX):
        table_check.check_range("slots", slots, num_blocks * block_size, "the pool has slots", where=slots >= 0)
        table_check.check_range("positions", positions, table.shape[0], "table has positions", where=slots >= 0)
    key = key_of(num_heads, kv_heads, head_dim)
    settings = tuned(OP, target, key) or default_settings(target, key)
    groups = -(-num_heads // settings["HEADS"]) + 2 * -(-kv_heads // settings["HEADS"])
    launch(
        rope_and_cache_kernel,
        (num_tokens * groups,),
        qkv_NX,
        positions,
        slots,
        table,
        pool_layer,
        q_norm,
        k_norm,
        kv_scale,
        eps,
        ROW_STRIDE=qkv_NX.stride(0),
        H=num_heads,
        K=kv_heads,
        D=head_dim,
        HALF=half,
        BLOCK_SIZE=block_size,
        HALF_BLOCK=_power_of_two(half),
        REST_BLOCK=_power_of_two(head_dim - 2 * half),
        **dependent_launch(target),
        **settings,
    )


def default_settings(target: Target, key: str) -> Settings:
    """Groups of 8 heads, 4 loads of 16 bytes (bfloat16) in each thread."""
    num_heads, _, head_dim = _parts(key)
    heads = min(8, _power_of_two(num_heads))
    return {"HEADS": heads, "num_warps": max(1, heads * head_dim // 1024)}


def candidates(target: Target, key: str) -> list[Settings]:
    *_, head_dim = _parts(key)
    return [
        {"HEADS": heads, "num_warps": warps}
        for heads in (2, 4, 8, 16, 32)
        for warps in (1, 2, 4)
        if 256 <= heads * head_dim // warps <= 4096
    ]


def key_of(num_heads: int, kv_heads: int, head_dim: int) -> str:
    return f"H{num_heads} K{kv_heads} D{head_dim}"


def _parts(key: str) -> tuple[int, int, int]:
    heads, kv_heads, head_dim = (int(part[1:]) for part in key.split())
    return heads, kv_heads, head_dim


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length() if size else 0


def _check_norms(head_dim: int, **norms: torch.Tensor | None) -> None:
    if len({norm is None for norm in norms.values()}) > 1:
        raise ValueError("q_norm and k_norm are given both or not at all")
    for name, norm in norms.items():
        if norm is not None:
            check_dtype(name, norm, *_DTYPES)
            check_shape(name, norm, head_dim)
            check_contiguous(name, norm)
            check_rows(name, norm)


def _check_scale(pool_layer: torch.Tensor, kv_scale: torch.Tensor | None, target: Target) -> None:
    if (kv_scale is None) == (pool_layer.dtype == _FP8):
        raise ValueError("kv_scale is given for a pool_layer of float8_e4m3fn and for no other")
    if kv_scale is not None:
        target.require_fp8("a pool_layer of float8_e4m3fn")
        check_dtype("kv_scale", kv_scale, torch.float32)
        check_shape("kv_scale", kv_scale, 2, pool_layer.shape[2])
        check_contiguous("kv_scale", kv_scale)
