"""The kernel of ``prefill_attention``; see triton_gpu.py.

A program owns BLOCK_M packed rows of one kv head: row r of a sequence is its query token r // GROUP under query head
r % GROUP of that kv head, so a group's heads share every K and V tile that is read, whatever the group's size.
"""

import triton
import triton.language as tl

_NEVER = tl.constexpr(-1.0e30)
"""Running maximum before any key: finite, so that a fully masked tile gives exp2(-inf - _NEVER) = 0, never NaN."""


@triton.jit
def _scores(q_MD, k_ND, cap_in, cap_out, HAS_CAP: tl.constexpr):
    """Raw products, or with a cap cap_out * tanh(product * cap_in / 2)."""
    s_MN = tl.dot(q_MD, tl.trans(k_ND), input_precision="ieee")
    if HAS_CAP:
        s_MN = cap_out - 2.0 * cap_out / (1.0 + tl.exp2(s_MN * cap_in))
    return s_MN


@triton.jit
def _as_operand(kv_ND, q_MD):
    """fp8 codes are exact in float16, their scale is applied elsewhere."""
    if kv_ND.dtype != q_MD.dtype:
        kv_ND = kv_ND.to(q_MD.dtype)
    return kv_ND


@triton.jit(do_not_specialize=["window", "table_stride"])
def prefill_attention_kernel(
    q_ptr,
    pool_ptr,
    pool_rows,
    tiles_ptr,
    tables_ptr,
    kv_scale_ptr,
    out_ptr,
    score_scale,
    cap_in,
    cap_out,
    window,
    table_stride,
    q_stride: tl.constexpr,
    q_head_stride: tl.constexpr,
    out_stride: tl.constexpr,
    out_head_stride: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_CAP: tl.constexpr,
    USE_TMA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # grid: (num_tiles, KV_HEADS): tiles of one head run next to each other, so that its K and V stay in L2
    tile_ptr = tiles_ptr + tl.program_id(0) * 8
    sequence = tl.load(tile_ptr)
    first_row = tl.load(tile_ptr + 1)
    query_start = tl.load(tile_ptr + 2)
    num_rows = tl.load(tile_ptr + 3)
    first_position = tl.load(tile_ptr + 4)  # of the sequence's first query token
    kv_head = tl.program_id(1)
    table_ptr = tables_ptr + sequence.to(tl.int64) * table_stride

    m = first_row + tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, DIM_PADDED)
    token_M = m // GROUP
    head_M = kv_head * GROUP + m % GROUP
    in_dim = d[None, :] < DIM
    in_tile = (m[:, None] < num_rows) & in_dim
    row_M = (query_start + token_M).to(tl.int64)
    q_MD = tl.load(q_ptr + row_M[:, None] * q_stride + head_M[:, None] * q_head_stride + d[None, :], in_tile, other=0.0)
    value_scale = 1.0
    if kv_scale_ptr is not None:
        # one scale per kv head: K's goes into the scores, V's into the output, and the codes are operands as they are
        q_MD = tl.clamp(q_MD.to(tl.float32), -65504.0, 65504.0).to(tl.float16)
        key_scale = tl.load(kv_scale_ptr + kv_head)
        if HAS_CAP:
            cap_in = cap_in * key_scale
        else:
            score_scale = score_scale * key_scale
        value_scale = tl.load(kv_scale_ptr + KV_HEADS + kv_head)

    acc_MD = tl.zeros([BLOCK_M, DIM_PADDED], tl.float32)
    sum_M = tl.zeros([BLOCK_M], tl.float32)
    max_M = tl.full([BLOCK_M], _NEVER, tl.float32)

    # keys [first_key, end_key) are seen by some row, those of tiles [main, main_end) by every row
    position_M = first_position + token_M
    low_position = first_position + first_row // GROUP
    high_position = first_position + (tl.minimum(first_row + BLOCK_M, num_rows) - 1) // GROUP
    end_key = high_position + 1
    end = tl.cdiv(end_key, BLOCK_N)
    main_end = (low_position + 1) // BLOCK_N
    first_key = 0
    main = 0
    if HAS_WINDOW:
        first_key = tl.maximum(low_position - window + 1, 0)
        main = tl.minimum(tl.cdiv(tl.maximum(high_position - window + 1, 0), BLOCK_N), main_end)
    first = first_key // BLOCK_N

    # tiles where some row sees some keys only: at the window's edge, then at the diagonal
    num_early = main - first
    for i in tl.range(0, num_early + end - main_end):
        tile = tl.where(i < num_early, first + i, main_end + i - num_early)
        key_N = tile * BLOCK_N + n
        # a slot that no row sees may hold anything, and its block may be another sequence's or none
        seen_N = (key_N >= first_key) & (key_N < end_key)
        if BLOCK_SIZE >= BLOCK_N:
            block = tl.load(table_ptr + tile * BLOCK_N // BLOCK_SIZE).to(tl.int64)
            start = (block * 2 * KV_HEADS + kv_head) * BLOCK_SIZE + tile * BLOCK_N % BLOCK_SIZE
            kv_rows_ND = pool_ptr + start * DIM + n[:, None] * DIM + d[None, :]
        else:
            block_N = tl.load(table_ptr + key_N // BLOCK_SIZE, seen_N, other=0).to(tl.int64)
            row_N = (block_N * 2 * KV_HEADS + kv_head) * BLOCK_SIZE + key_N % BLOCK_SIZE
            kv_rows_ND = pool_ptr + row_N[:, None] * DIM + d[None, :]
        kv_seen = seen_N[:, None] & in_dim
        k_ND = tl.load(kv_rows_ND, kv_seen, other=0.0)
        s_MN = _scores(q_MD, _as_operand(k_ND, q_MD), cap_in, cap_out, HAS_CAP)
        visible = key_N[None, :] <= position_M[:, None]
        if HAS_WINDOW:
            visible &= key_N[None, :] > position_M[:, None] - window
        s_MN = tl.where(visible, s_MN * score_scale, float("-inf"))
        new_max_M = tl.maximum(max_M, tl.max(s_MN, 1))
        p_MN = tl.exp2(s_MN - new_max_M[:, None])
        alpha_M = tl.exp2(max_M - new_max_M)
        sum_M = sum_M * alpha_M + tl.sum(p_MN, 1)
        acc_MD = acc_MD * alpha_M[:, None]
        v_ND = tl.load(kv_rows_ND + KV_HEADS * BLOCK_SIZE * DIM, kv_seen, other=0.0)
        acc_MD = tl.dot(p_MN.to(q_MD.dtype), _as_operand(v_ND, q_MD), acc_MD, input_precision="ieee")
        max_M = new_max_M

    # tiles that every row sees: no mask. A tile's block is looked up one tile ahead, off the path of its loads.
    block = tl.load(table_ptr + tl.minimum(main * BLOCK_N // BLOCK_SIZE, (end_key - 1) // BLOCK_SIZE))
    for tile in tl.range(main, main_end):
        if USE_TMA:
            row = (block * 2 * KV_HEADS + kv_head) * BLOCK_SIZE + tile * BLOCK_N % BLOCK_SIZE
            block = tl.load(table_ptr + tl.minimum((tile + 1) * BLOCK_N // BLOCK_SIZE, (end_key - 1) // BLOCK_SIZE))
            k_ND = pool_rows.load([row, 0])
            v_ND = pool_rows.load([row + KV_HEADS * BLOCK_SIZE, 0])
        else:
            if BLOCK_SIZE >= BLOCK_N:
                start = (block.to(tl.int64) * 2 * KV_HEADS + kv_head) * BLOCK_SIZE + tile * BLOCK_N % BLOCK_SIZE
                block = tl.load(table_ptr + tl.minimum((tile + 1) * BLOCK_N // BLOCK_SIZE, (end_key - 1) // BLOCK_SIZE))
                kv_rows_ND = pool_ptr + start * DIM + n[:, None] * DIM + d[None, :]
            else:
                key_N = tile * BLOCK_N + n
                block_N = tl.load(table_ptr + key_N // BLOCK_SIZE).to(tl.int64)
                row_N = (block_N * 2 * KV_HEADS + kv_head) * BLOCK_SIZE + key_N % BLOCK_SIZE
                kv_rows_ND = pool_ptr + row_N[:, None] * DIM + d[None, :]
            if DIM == DIM_PADDED:
                k_ND = tl.load(kv_rows_ND)
                v_ND = tl.load(kv_rows_ND + KV_HEADS * BLOCK_SIZE * DIM)
            else:
                k_ND = tl.load(kv_rows_ND, in_dim, other=0.0)
                v_ND = tl.load(kv_rows_ND + KV_HEADS * BLOCK_SIZE * DIM, in_dim, other=0.0)
        s_MN = _scores(q_MD, _as_operand(k_ND, q_MD), cap_in, cap_out, HAS_CAP)
        new_max_M = tl.maximum(max_M, tl.max(s_MN, 1) * score_scale)
        p_MN = tl.exp2(s_MN * score_scale - new_max_M[:, None])
        alpha_M = tl.exp2(max_M - new_max_M)
        sum_M = sum_M * alpha_M + tl.sum(p_MN, 1)
        acc_MD = acc_MD * alpha_M[:, None]
        acc_MD = tl.dot(p_MN.to(q_MD.dtype), _as_operand(v_ND, q_MD), acc_MD, input_precision="ieee")
        max_M = new_max_M

    out_MD = acc_MD * (value_scale / sum_M)[:, None]
    out_MD_ptr = out_ptr + row_M[:, None] * out_stride + head_M[:, None] * out_head_stride + d[None, :]
    tl.store(out_MD_ptr, out_MD.to(out_ptr.dtype.element_ty), in_tile)
