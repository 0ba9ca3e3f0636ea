"""The kernel of ``rope_and_cache``; see triton_gpu.py."""

import triton
import triton.language as tl
from triton.language.extra import cuda


@triton.jit(do_not_specialize_on_alignment=["positions_ptr", "slots_ptr", "kv_scale_ptr"])
def rope_and_cache_kernel(
    qkv_ptr,  # [N, (H + 2 K) D]: heads of q, of k, of v
    positions_ptr,  # [N]
    slots_ptr,  # [N] int64, -1: padding row
    table_ptr,  # [P, 2, HALF] float32
    pool_ptr,  # [blocks, 2, K, BLOCK_SIZE, D]
    q_norm_ptr,  # [D], or None: no norm
    k_norm_ptr,  # [D], or None
    kv_scale_ptr,  # [2, K] float32, or None: the pool holds plain values
    eps,
    ROW_STRIDE: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,  # half of the rotary part: the first HALF of a head turn against the next HALF
    BLOCK_SIZE: tl.constexpr,
    HALF_BLOCK: tl.constexpr,  # HALF, up to a power of two
    REST_BLOCK: tl.constexpr,  # D - 2 HALF, up to a power of two; 0: the whole head turns
    HEADS: tl.constexpr,  # heads of one program
    PDL: tl.constexpr,
):
    # grid: (N * groups,): HEADS heads of q, of k or of v of one token, the groups of a token beside each other
    Q_GROUPS: tl.constexpr = (H + HEADS - 1) // HEADS
    KV_GROUPS: tl.constexpr = (K + HEADS - 1) // HEADS
    GROUPS: tl.constexpr = Q_GROUPS + 2 * KV_GROUPS
    program = tl.program_id(0)
    token = program // GROUPS
    group = program % GROUPS
    is_q = group < Q_GROUPS
    is_v = group >= Q_GROUPS + KV_GROUPS
    side = tl.where(is_v, 1, 0)
    group -= tl.where(is_q, 0, Q_GROUPS + side * KV_GROUPS)
    head = group * HEADS + tl.arange(0, HEADS)
    head_exists = head < tl.where(is_q, H, K)
    head_in_row = head + tl.where(is_q, 0, H + side * K)

    if PDL:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()
    slot = tl.load(slots_ptr + token)
    position = tl.load(positions_ptr + token)
    column = tl.arange(0, HALF_BLOCK)
    inside = head_exists[:, None] & (column < HALF)[None, :]
    heads = qkv_ptr + token.to(tl.int64) * ROW_STRIDE + head_in_row[:, None] * D
    first = tl.load(heads + column[None, :], mask=inside, other=0.0).to(tl.float32)
    second = tl.load(heads + (HALF + column)[None, :], mask=inside, other=0.0).to(tl.float32)
    if REST_BLOCK > 0:
        rest_column = tl.arange(0, REST_BLOCK)
        rest_inside = head_exists[:, None] & (rest_column < D - 2 * HALF)[None, :]
        rest = tl.load(heads + (2 * HALF + rest_column)[None, :], mask=rest_inside, other=0.0).to(tl.float32)
    is_real = slot >= 0

    if not is_v:
        if q_norm_ptr is not None:
            squares = tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1)
            if REST_BLOCK > 0:
                squares += tl.sum(rest * rest, axis=1)
            scale = tl.rsqrt(squares * (1.0 / D) + eps)[:, None]
            weight_exists = column < HALF
            if is_q:
                first_weight = tl.load(q_norm_ptr + column, mask=weight_exists, other=0.0)
                second_weight = tl.load(q_norm_ptr + HALF + column, mask=weight_exists, other=0.0)
            else:
                first_weight = tl.load(k_norm_ptr + column, mask=weight_exists, other=0.0)
                second_weight = tl.load(k_norm_ptr + HALF + column, mask=weight_exists, other=0.0)
            first *= scale * first_weight.to(tl.float32)[None, :]
            second *= scale * second_weight.to(tl.float32)[None, :]
            if REST_BLOCK > 0:
                rest_exists = rest_column < D - 2 * HALF
                if is_q:
                    rest_weight = tl.load(q_norm_ptr + 2 * HALF + rest_column, mask=rest_exists, other=0.0)
                else:
                    rest_weight = tl.load(k_norm_ptr + 2 * HALF + rest_column, mask=rest_exists, other=0.0)
                rest *= scale * rest_weight.to(tl.float32)[None, :]
        # a padding row's position may be anything
        angles = table_ptr + position.to(tl.int64) * (2 * HALF) + column
        cos = tl.load(angles, mask=(column < HALF) & is_real, other=0.0)[None, :]
        sin = tl.load(angles + HALF, mask=(column < HALF) & is_real, other=0.0)[None, :]
        turned = first * cos - second * sin
        second = second * cos + first * sin
        first = turned

    if is_q:
        dtype = qkv_ptr.dtype.element_ty
        tl.store(heads + column[None, :], first.to(dtype), mask=inside & is_real)
        tl.store(heads + (HALF + column)[None, :], second.to(dtype), mask=inside & is_real)
        if REST_BLOCK > 0 and q_norm_ptr is not None:
            tl.store(heads + (2 * HALF + rest_column)[None, :], rest.to(dtype), mask=rest_inside & is_real)
    else:
        block = slot // BLOCK_SIZE
        offset = slot % BLOCK_SIZE
        runs = ((block * 2 + side) * K + head) * BLOCK_SIZE + offset  # int64, as slots are
        cached = pool_ptr + runs[:, None] * D
        if kv_scale_ptr is not None:
            kv_scale = tl.load(kv_scale_ptr + side * K + head, mask=head_exists, other=1.0)[:, None]
            first = _to_fp8_range(first, kv_scale)
            second = _to_fp8_range(second, kv_scale)
            if REST_BLOCK > 0:
                rest = _to_fp8_range(rest, kv_scale)
        cache_dtype = pool_ptr.dtype.element_ty
        tl.store(cached + column[None, :], first.to(cache_dtype), mask=inside & is_real)
        tl.store(cached + (HALF + column)[None, :], second.to(cache_dtype), mask=inside & is_real)
        if REST_BLOCK > 0:
            tl.store(cached + (2 * HALF + rest_column)[None, :], rest.to(cache_dtype), mask=rest_inside & is_real)


@triton.jit
def _to_fp8_range(values, scale):
    # divided exactly: half a code more or less must not depend on the backend
    return tl.clamp(tl.div_rn(values, tl.broadcast_to(scale, values.shape)), -448.0, 448.0, tl.PropagateNan.ALL)
