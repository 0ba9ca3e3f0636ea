"""The kernel of ``prefill_attention``; see triton_gpu.py.

A program owns BLOCK_M packed rows of one kv head: row r of a sequence is its query token r // GROUP under query head
r % GROUP of that kv head, so a group's heads share every K and V tile that is read, whatever the group's size.
"""

import triton
import triton.language as tl

_NEVER = tl.constexpr(-1.0e30)
"""Running maximum before any key: finite, so that a fully masked tile gives exp2(-inf - _NEVER) = 0, never NaN."""


@triton.jit
def _lookup(table_ptr, key, last_block, n, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr):
    """Blocks of keys [key, key + TILE): one where they share it, else one per key; never past the sequence's last."""
    first = key // BLOCK_SIZE
    if BLOCK_SIZE >= TILE:
        block = tl.load(table_ptr + tl.minimum(first, last_block))
    elif 2 * BLOCK_SIZE == TILE:
        low = tl.load(table_ptr + tl.minimum(first, last_block))
        high = tl.load(table_ptr + tl.minimum(first + 1, last_block))
        block = tl.where(n < BLOCK_SIZE, low, high)
    else:
        block = tl.load(table_ptr + tl.minimum((key + n) // BLOCK_SIZE, last_block))
    return block


@triton.jit
def _key_row(block, key, kv_head, n, KV_HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr):
    """Rows of DIM elements in the pool: of the tile's first key where one block holds the tile, else of each key."""
    slot = key % BLOCK_SIZE if BLOCK_SIZE >= TILE else n % BLOCK_SIZE
    return (block * 2 * KV_HEADS + kv_head) * BLOCK_SIZE + slot


@triton.jit
def _pointers(pool_ptr, row, n, d, DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr):
    if BLOCK_SIZE >= TILE:
        return pool_ptr + row.to(tl.int64) * DIM + n[:, None] * DIM + d[None, :]
    else:
        return pool_ptr + (row.to(tl.int64) * DIM)[:, None] + d[None, :]


@triton.jit
def _load_tile(
    pool_ptr,
    pool_rows,
    row,
    n,
    d,
    USE_TMA: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
):
    """[TILE, D]: slots that all hold keys that are seen."""
    if USE_TMA:
        return pool_rows.load([row, 0])
    else:
        pointers = _pointers(pool_ptr, row, n, d, DIM, BLOCK_SIZE, TILE)
        return tl.load(pointers) if d.shape[0] == DIM else tl.load(pointers, d[None, :] < DIM, other=0.0)


@triton.jit
def _scores(q_MD, k_ND, cap_in, cap_out, HAS_CAP: tl.constexpr):
    """Raw products, or with a cap cap_out * tanh(product * cap_in / 2)."""
    s_MN = tl.dot(q_MD, tl.trans(k_ND.to(q_MD.dtype)), input_precision="ieee")
    if HAS_CAP:
        s_MN = cap_out - 2.0 * cap_out / (1.0 + tl.exp2(s_MN * cap_in))
    return s_MN


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
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EDGE_N: tl.constexpr,
    USE_TMA: tl.constexpr,
    OVERLAP: tl.constexpr,
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
    e = tl.arange(0, EDGE_N)
    d = tl.arange(0, DIM_PADDED)
    token_M = m // GROUP
    head_M = kv_head * GROUP + m % GROUP
    in_tile = (m[:, None] < num_rows) & (d[None, :] < DIM)
    row_M = (query_start + token_M).to(tl.int64)
    q_MD = tl.load(q_ptr + row_M[:, None] * q_stride + head_M[:, None] * q_head_stride + d[None, :], in_tile, other=0.0)
    value_scale = 1.0
    if kv_scale_ptr is not None:
        # one scale per kv head: K's goes into the scores, V's into the output; fp8 codes are exact in float16
        q_MD = tl.clamp(q_MD.to(tl.float32), -65504.0, 65504.0, tl.PropagateNan.ALL).to(tl.float16)
        if HAS_CAP:
            cap_in *= tl.load(kv_scale_ptr + kv_head)
        else:
            score_scale *= tl.load(kv_scale_ptr + kv_head)
        value_scale = tl.load(kv_scale_ptr + KV_HEADS + kv_head)
    dtype: tl.constexpr = q_MD.dtype

    # keys [first_key, end_key) are seen by some row, [main_key, main_end) by every row
    position_M = first_position + token_M
    low_position = first_position + first_row // GROUP
    high_position = first_position + (tl.minimum(first_row + BLOCK_M, num_rows) - 1) // GROUP
    end_key = high_position + 1
    last_block = high_position // BLOCK_SIZE
    first_key = 0
    main_key = 0
    main_end = (low_position + 1) // BLOCK_N * BLOCK_N
    if HAS_WINDOW:
        first_key = tl.maximum(low_position - window + 1, 0)
        main_key = tl.minimum(tl.cdiv(tl.maximum(high_position - window + 1, 0), BLOCK_N) * BLOCK_N, main_end)

    acc_MD = tl.zeros([BLOCK_M, DIM_PADDED], tl.float32)
    sum_M = tl.zeros([BLOCK_M], tl.float32)
    max_M = tl.full([BLOCK_M], _NEVER, tl.float32)

    # Every row sees these keys: no mask. A tile's block is looked up one tile ahead, off the path of its loads. With
    # OVERLAP a tile's product with V is held back until the next iteration, whose softmax it runs beside; the weights
    # cross as int16, for Triton would put a 16-bit float that crosses into shared memory. The first iteration's held
    # product is of zeros.
    block = _lookup(table_ptr, main_key, last_block, n, BLOCK_SIZE, BLOCK_N)
    held_row = _key_row(block, main_key, kv_head, n, KV_HEADS, BLOCK_SIZE, BLOCK_N)
    held_MN = tl.zeros([BLOCK_M, BLOCK_N], tl.int16)
    held_alpha_M = tl.full([BLOCK_M], 1.0, tl.float32)
    for key in tl.range(main_key, main_end, BLOCK_N):
        row = _key_row(block, key, kv_head, n, KV_HEADS, BLOCK_SIZE, BLOCK_N)
        block = _lookup(table_ptr, key + BLOCK_N, last_block, n, BLOCK_SIZE, BLOCK_N)
        k_ND = _load_tile(pool_ptr, pool_rows, row, n, d, USE_TMA, DIM, BLOCK_SIZE, BLOCK_N)
        s_MN = _scores(q_MD, k_ND, cap_in, cap_out, HAS_CAP)
        if OVERLAP:
            acc_MD = acc_MD * held_alpha_M[:, None]
            held_row += KV_HEADS * BLOCK_SIZE
            v_ND = _load_tile(pool_ptr, pool_rows, held_row, n, d, USE_TMA, DIM, BLOCK_SIZE, BLOCK_N)
            acc_MD = tl.dot(held_MN.to(dtype, bitcast=True), v_ND.to(dtype), acc_MD)
            held_row = row
        new_max_M = tl.maximum(max_M, tl.max(s_MN, 1) * score_scale)
        p_MN = tl.exp2(s_MN * score_scale - new_max_M[:, None])
        alpha_M = tl.exp2(max_M - new_max_M)
        sum_M = sum_M * alpha_M + tl.sum(p_MN, 1)
        max_M = new_max_M
        if OVERLAP:
            held_MN = p_MN.to(dtype).to(tl.int16, bitcast=True)
            held_alpha_M = alpha_M
        else:
            acc_MD = acc_MD * alpha_M[:, None]
            row += KV_HEADS * BLOCK_SIZE
            v_ND = _load_tile(pool_ptr, pool_rows, row, n, d, USE_TMA, DIM, BLOCK_SIZE, BLOCK_N)
            acc_MD = tl.dot(p_MN.to(dtype), v_ND.to(dtype), acc_MD, input_precision="ieee")
    if OVERLAP and main_key < main_end:
        held_row += KV_HEADS * BLOCK_SIZE
        v_ND = _load_tile(pool_ptr, pool_rows, held_row, n, d, USE_TMA, DIM, BLOCK_SIZE, BLOCK_N)
        acc_MD = acc_MD * held_alpha_M[:, None]
        acc_MD = tl.dot(held_MN.to(dtype, bitcast=True), v_ND.to(dtype), acc_MD)

    # Tiles where some row sees some keys only: at the window's edge, then at the diagonal. A slot that no row sees may
    # hold anything (its block may be another's or none), so it is not read: 0 * NaN is NaN.
    early_key = first_key // EDGE_N * EDGE_N
    late_key = tl.maximum(main_end, early_key)
    num_early = tl.maximum(main_key - early_key, 0)
    block = _lookup(table_ptr, tl.where(num_early > 0, early_key, late_key), last_block, e, BLOCK_SIZE, EDGE_N)
    for i in tl.range(0, num_early + end_key - late_key, EDGE_N):
        key = tl.where(i < num_early, early_key, late_key - num_early) + i
        next_key = tl.where(i + EDGE_N < num_early, early_key, late_key - num_early) + i + EDGE_N
        row = _key_row(block, key, kv_head, e, KV_HEADS, BLOCK_SIZE, EDGE_N)
        block = _lookup(table_ptr, next_key, last_block, e, BLOCK_SIZE, EDGE_N)
        key_N = key + e
        seen_ND = ((key_N >= first_key) & (key_N < end_key))[:, None] & (d[None, :] < DIM)
        k_ND = tl.load(_pointers(pool_ptr, row, e, d, DIM, BLOCK_SIZE, EDGE_N), seen_ND, other=0.0)
        s_MN = _scores(q_MD, k_ND, cap_in, cap_out, HAS_CAP)
        visible = key_N[None, :] <= position_M[:, None]
        if HAS_WINDOW:
            visible &= key_N[None, :] > position_M[:, None] - window
        s_MN = tl.where(visible, s_MN * score_scale, float("-inf"))
        new_max_M = tl.maximum(max_M, tl.max(s_MN, 1))
        p_MN = tl.exp2(s_MN - new_max_M[:, None])
        alpha_M = tl.exp2(max_M - new_max_M)
        sum_M = sum_M * alpha_M + tl.sum(p_MN, 1)
        max_M = new_max_M
        acc_MD = acc_MD * alpha_M[:, None]
        row += KV_HEADS * BLOCK_SIZE
        v_ND = tl.load(_pointers(pool_ptr, row, e, d, DIM, BLOCK_SIZE, EDGE_N), seen_ND, other=0.0)
        acc_MD = tl.dot(p_MN.to(dtype), v_ND.to(dtype), acc_MD, input_precision="ieee")

    out_MD = acc_MD * (value_scale / sum_M)[:, None]
    # read again, so that the rows' addresses need no registers through the loops
    first_row = tl.load(tile_ptr + 1, volatile=True)
    m = first_row + tl.arange(0, BLOCK_M)
    row_M = (query_start + m // GROUP).to(tl.int64)
    head_M = kv_head * GROUP + m % GROUP
    out_ptrs = out_ptr + row_M[:, None] * out_stride + head_M[:, None] * out_head_stride + d[None, :]
    tl.store(out_ptrs, out_MD.to(out_ptr.dtype.element_ty), (m[:, None] < num_rows) & (d[None, :] < DIM))
