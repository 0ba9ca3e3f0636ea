"""Prefill attention on a GPU: causal flash attention of packed queries over the paged cache.

FlashAttention-2 (Dao 2023, section 3.1: one program per tile of queries, the running maximum and sum of each row kept in
registers, the output divided by the sum once), with the query heads of a kv head packed into the rows of a tile, K and V
read through block tables, and the loop over keys split so that only the tiles at the diagonal and at the window's edge
are masked. On Hopper a tile's product with V runs beside the next tile's softmax (FlashAttention-3, Shah et al. 2024,
section 3.2). Exponentials are of base 2, log2(e) folded into the scale.
"""

import math

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from biphase.kernels.gpu import table_check
from biphase.kernels.gpu.check import (
    check_contiguous,
    check_dtype,
    check_one_of,
    check_rows,
    check_same_device,
    check_shape,
)
from biphase.kernels.gpu.launch import launch
from biphase.kernels.gpu.target import target_of
from biphase.kernels.prefill_attention.settings import (
    BLOCK_SIZES,
    HEAD_DIMS,
    OP,
    PrefillShape,
    candidates,
    settings_for,
)
from biphase.kernels.prefill_attention.tile_plan import PrefillPlan, plan_prefill
from biphase.kernels.prefill_attention.triton_kernel import prefill_attention_kernel

__all__ = ["OP", "PrefillPlan", "candidates", "plan_prefill", "prefill_attention"]

_LOG2E = math.log2(math.e)


def prefill_attention(
    q_NHD: torch.Tensor,
    pool_layer: torch.Tensor,
    plan: PrefillPlan,
    out_NHD: torch.Tensor,
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    kv_scale: torch.Tensor | None = None,
) -> None:
    """Writes the plan's rows of ``out``; k and v of these tokens are in the cache already.

    N tokens of the step, H query heads, K kv heads, D head_dim 64, 96, 128 or 256. ``q`` and ``out`` [N, H, D] float32,
    bfloat16 or float16, rows and heads at any stride that is a multiple of 16 bytes; ``pool_layer``
    [blocks, 2, K, block_size, D] of q's dtype or float8_e4m3fn, then with ``kv_scale`` [2, K] float32. A token sees itself
    and the tokens before it, ``window`` in all if given; with ``soft_cap`` its scores are soft_cap * tanh(score /
    soft_cap). In debug mode (kernels.gpu.table_check) block tables are checked too. Raises ValueError naming the argument.
    """
    num_heads, dim = _check(q_NHD, pool_layer, plan, out_NHD, scale, window, soft_cap, kv_scale)
    kv_heads, block_size = pool_layer.shape[2:4]
    target = target_of(q_NHD.device)
    settings = dict(settings_for(target, PrefillShape.of(pool_layer)))
    if plan.block_m != settings["BLOCK_M"]:
        raise ValueError(
            f"plan has tiles of {plan.block_m} rows, this pool takes {settings['BLOCK_M']}: planned for another"
        )
    if pool_layer.dtype == torch.float8_e4m3fn:
        target.require_fp8("an fp8 KV cache")
    if table_check.may_check(q_NHD):
        _check_block_tables(plan, pool_layer, window)
    dim_padded = triton.next_power_of_2(dim)
    use_tma = bool(settings["USE_TMA"])
    cap_in = cap_out = score_scale = scale * _LOG2E
    if soft_cap is not None:
        # cap * tanh(x / cap) = cap - 2 * cap / (1 + exp(2 * x / cap)), times log2(e)
        cap_in, cap_out, score_scale = 2 * scale * _LOG2E / soft_cap, soft_cap * _LOG2E, 1.0
    launch(
        prefill_attention_kernel,
        (plan.tiles.shape[0], kv_heads),
        q_NHD,
        pool_layer,
        _pool_rows(pool_layer, settings["BLOCK_N"], dim_padded) if use_tma else None,
        plan.tiles,
        plan.block_tables,
        kv_scale,
        out_NHD,
        score_scale,
        cap_in,
        cap_out,
        window or 0,
        plan.block_tables.stride(0),
        q_stride=q_NHD.stride(0),
        q_head_stride=q_NHD.stride(1),
        out_stride=out_NHD.stride(0),
        out_head_stride=out_NHD.stride(1),
        KV_HEADS=kv_heads,
        GROUP=num_heads // kv_heads,
        DIM=dim,
        DIM_PADDED=dim_padded,
        BLOCK_SIZE=block_size,
        HAS_WINDOW=window is not None,
        HAS_CAP=soft_cap is not None,
        **settings,
    )


def _pool_rows(pool_layer: torch.Tensor, block_n: int, dim_padded: int) -> TensorDescriptor:
    """The pool as a matrix of [head of a block, token] rows, of which one bulk copy takes ``block_n``."""
    blocks, _, kv_heads, block_size, dim = pool_layer.shape
    return TensorDescriptor(pool_layer, [blocks * 2 * kv_heads * block_size, dim], [dim, 1], [block_n, dim_padded])


def _check_block_tables(plan: PrefillPlan, pool_layer: torch.Tensor, window: int | None) -> None:
    lengths = list(zip(plan.query_lens, plan.context_lens, strict=True))
    table_check.check_block_tables(
        plan.block_tables,
        [0 if window is None else max(0, context - query + 1 - window) for query, context in lengths],
        [context if query else 0 for query, context in lengths],
        block_size=pool_layer.shape[3],
        num_blocks=pool_layer.shape[0],
    )


def _check(
    q_NHD: torch.Tensor,
    pool_layer: torch.Tensor,
    plan: PrefillPlan,
    out_NHD: torch.Tensor,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    kv_scale: torch.Tensor | None,
) -> tuple[int, int]:
    check_dtype("q", q_NHD, torch.float32, torch.bfloat16, torch.float16)
    check_shape("q", q_NHD, None, plan.num_heads, None)
    num_tokens, num_heads, dim = q_NHD.shape
    check_one_of("head_dim", dim, HEAD_DIMS)
    check_rows("q", q_NHD)
    check_dtype("out", out_NHD, q_NHD.dtype)
    check_shape("out", out_NHD, num_tokens, num_heads, dim)
    check_rows("out", out_NHD)
    check_dtype("pool_layer", pool_layer, q_NHD.dtype, torch.float8_e4m3fn)
    check_shape("pool_layer", pool_layer, None, 2, None, None, dim)
    check_one_of("block_size", pool_layer.shape[3], BLOCK_SIZES)
    check_contiguous("pool_layer", pool_layer)
    check_rows("pool_layer", pool_layer)
    kv_heads = pool_layer.shape[2]
    if kv_heads < 1 or num_heads % kv_heads:
        raise ValueError(f"q has {num_heads} heads, no multiple of the {kv_heads} of pool_layer")
    if plan.first_row + plan.num_tokens > num_tokens:
        raise ValueError(f"q has {num_tokens} rows, the plan's end at {plan.first_row + plan.num_tokens}")
    fp8 = pool_layer.dtype == torch.float8_e4m3fn
    if fp8 != (kv_scale is not None):
        raise ValueError(f"kv_scale {'is missing for' if fp8 else 'was given for'} a pool_layer of {pool_layer.dtype}")
    if kv_scale is not None:
        check_dtype("kv_scale", kv_scale, torch.float32)
        check_shape("kv_scale", kv_scale, 2, kv_heads)
        check_contiguous("kv_scale", kv_scale)
        check_dtype("q", q_NHD, torch.bfloat16, torch.float16)
    if not scale > 0:
        raise ValueError(f"scale is {scale}, it must be positive")
    if window is not None and window < 1:
        raise ValueError(f"window is {window}, it must be at least 1")
    if soft_cap is not None and not soft_cap > 0:
        raise ValueError(f"soft_cap is {soft_cap}, it must be positive")
    check_same_device(
        q=q_NHD, pool_layer=pool_layer, out=out_NHD, tiles=plan.tiles, block_tables=plan.block_tables, kv_scale=kv_scale
    )
    return num_heads, dim
