"""Triton kernels of decode attention: attention over runs of tiles, and the join of the sequences that were cut.

Source: Flash-Decoding (Dao, Haziza, Massa, Sizov 2023) for splitting a sequence's keys among programs and joining by
log-sum-exp; FlashAttention-2 (Dao 2023, section 3.1) for the online softmax. How the work is cut: plan_kernel.py.

A program that ends within a sequence, or begins within one, leaves a partial result: in its slot 2p + 1 if the sequence
begins with this program, else in 2p (at most one of each). A sequence of a single part is written to the output at once.

An fp8 pool is read as int16, two codes at a time: tensor cores take 16-bit operands, and only 16-bit elements can be
transposed on their way out of shared memory (ldmatrix). Even and odd dimensions are then a product each, in float16,
which holds every e4m3 value; sums over the dimensions add up, and V's halves are interleaved when they are stored.

Letters: G query heads per kv head; M rows of a program, of the J x G rows (query token, head) of a sequence; T positions
of a tile; C elements of the pool per token and head: D, or D / 2 pairs.
"""

import triton
import triton.language as tl

from biphase.kernels.decode_attention.plan_kernel import (
    CONTEXT,
    END_TILE,
    FIRST_PROGRAM,
    FIRST_TILE,
    NUM_PARTS,
    PLAN_FIELDS,
    QUERY_LEN,
    QUERY_START,
    RUN_END,
    RUN_END_SEQ,
    RUN_FIELDS,
    RUN_FIRST,
    RUN_FIRST_SEQ,
    TILE_SHIFT,
)

HIDDEN = tl.constexpr(-1.0e30)
"""Logit of a position that a row may not see. Finite: a row that sees nothing in a part weighs exp2(HIDDEN - ...) = 0 in
the join instead of NaN."""
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _low(pair):
    """The e4m3 code at the lower address."""
    return pair.to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float16)


@triton.jit
def _high(pair):
    return (pair >> 8).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float16)


@triton.jit
def _store(row_ptr_M1, column_C, even_MC, odd_MC, ok_MC, PAIRS: tl.constexpr):
    dtype: tl.constexpr = row_ptr_M1.dtype.element_ty
    if PAIRS:
        tl.store(row_ptr_M1 + 2 * column_C[None, :], even_MC.to(dtype), mask=ok_MC)
        tl.store(row_ptr_M1 + 2 * column_C[None, :] + 1, odd_MC.to(dtype), mask=ok_MC)
    else:
        tl.store(row_ptr_M1 + column_C[None, :], even_MC.to(dtype), mask=ok_MC)


@triton.jit(do_not_specialize=["table_stride", "window"], do_not_specialize_on_alignment=["tables_ptr"])
def split_kernel(
    q_ptr,  # [N, H, D]
    pool_ptr,  # [blocks, 2, K, BLOCK_SIZE, D]; fp8: [..., D / 2] int16
    tables_ptr,  # [B, W] int32
    kv_scale_ptr,  # [2, K] float32 or None
    rows_ptr,
    runs_ptr,
    part_out_ptr,  # [2 * PROGRAMS, K, J x G, D] float32: normalised
    part_lse_ptr,  # [2 * PROGRAMS, K, J x G] float32: log2 of the sum of exponentials
    out_ptr,  # [N, H, D]
    q_stride,
    out_stride,
    table_stride,
    scale,
    window,
    cap,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    QUERY_ROWS: tl.constexpr,  # J x G
    ROWS: tl.constexpr,
    ROW_TILES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,  # HEAD_DIM up to a power of two
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    FP8: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
    PDL: tl.constexpr,
):
    # grid: (K * ROW_TILES, PROGRAMS): programs that read the same blocks run side by side
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    program = tl.program_id(1)
    kv_head = tl.program_id(0) // ROW_TILES
    row_M = (tl.program_id(0) % ROW_TILES) * ROWS + tl.arange(0, ROWS)
    query_M = row_M // GROUP
    head_M = kv_head * GROUP + row_M % GROUP
    run_ptr = runs_ptr + program * RUN_FIELDS
    run_first = tl.load(run_ptr + RUN_FIRST)
    run_end = tl.load(run_ptr + RUN_END)
    first_seq = tl.load(run_ptr + RUN_FIRST_SEQ)
    end_seq = tl.load(run_ptr + RUN_END_SEQ)

    WIDTH: tl.constexpr = HEAD_DIM // 2 if FP8 else HEAD_DIM
    COLUMNS: tl.constexpr = DIM // 2 if FP8 else DIM
    TO_V: tl.constexpr = NUM_KV_HEADS * BLOCK_SIZE * WIDTH
    column_C = tl.arange(0, COLUMNS)
    in_head_C = column_C < WIDTH
    head_ptr_1C = pool_ptr + kv_head * (BLOCK_SIZE * WIDTH) + column_C[None, :]
    token_T = tl.arange(0, TILE)

    logit_scale = scale * LOG2_E
    if CAPPED:
        logit_scale *= 2.0 / cap
    out_scale = 1.0
    if FP8:
        logit_scale *= tl.load(kv_scale_ptr + kv_head)
        out_scale = tl.load(kv_scale_ptr + NUM_KV_HEADS + kv_head)

    for seq in tl.range(first_seq, end_seq, num_stages=1):
        entry_ptr = rows_ptr + seq * PLAN_FIELDS
        seq_first = tl.load(entry_ptr + FIRST_TILE)
        seq_end = tl.load(entry_ptr + END_TILE)
        shift = tl.load(entry_ptr + TILE_SHIFT)
        context = tl.load(entry_ptr + CONTEXT)
        query_start = tl.load(entry_ptr + QUERY_START)
        query_len = tl.load(entry_ptr + QUERY_LEN)
        first_program = tl.load(entry_ptr + FIRST_PROGRAM)
        num_parts = tl.load(entry_ptr + NUM_PARTS)

        row_ok_M = query_M < query_len
        ok_MC = row_ok_M[:, None] & in_head_C[None, :]
        last_seen_M = context - query_len + tl.minimum(query_M, query_len - 1)
        lowest = 0
        if WINDOWED:
            lowest = tl.maximum(context - query_len + 1 - window, 0)
        last = tl.maximum(context - 1, 0)  # an empty sequence looks into its table, too
        token_M = (query_start + query_M).to(tl.int64)
        q_ptr_M1 = q_ptr + (token_M * q_stride + head_M * HEAD_DIM)[:, None]
        out_ptr_M1 = out_ptr + (token_M * out_stride + head_M * HEAD_DIM)[:, None]
        if FP8:
            q_even_MC = tl.load(q_ptr_M1 + 2 * column_C[None, :], mask=ok_MC, other=0.0).to(tl.float32)
            q_odd_MC = tl.load(q_ptr_M1 + 2 * column_C[None, :] + 1, mask=ok_MC, other=0.0).to(tl.float32)
            # a query may exceed float16's range: rows are brought to 1 at most, and the logits carry the factor
            q_most_M = tl.maximum(tl.max(tl.abs(q_even_MC), 1), tl.max(tl.abs(q_odd_MC), 1))
            q_most_M = tl.where(q_most_M > 0.0, q_most_M, 1.0)
            q_even_MC = (q_even_MC / q_most_M[:, None]).to(tl.float16)
            q_odd_MC = (q_odd_MC / q_most_M[:, None]).to(tl.float16)
            row_scale_M = q_most_M * logit_scale
        else:
            q_MC = tl.load(q_ptr_M1 + column_C[None, :], mask=ok_MC, other=0.0)

        most_M = tl.full([ROWS], HIDDEN, tl.float32)
        # summed over tiles only, so that no tile waits for a sum across its warps
        sums_MT = tl.zeros([ROWS, TILE], tl.float32)
        acc_MC = tl.zeros([ROWS, COLUMNS], tl.float32)
        odd_MC = tl.zeros([ROWS, COLUMNS], tl.float32)

        first_tile = tl.maximum(run_first, seq_first) - seq_first + shift
        end_tile = tl.minimum(run_end, seq_end) - seq_first + shift
        table_ptr = tables_ptr + seq * table_stride
        # Positions outside [lowest, context) read the nearest one inside, which weighs 0 for them: what was never
        # written is not touched, and the loads need no mask. A tile's block is looked up one tile ahead of its keys.
        if BLOCK_SIZE >= TILE:
            block = tl.load(table_ptr + first_tile * TILE // BLOCK_SIZE)
        else:
            nearest_T = tl.minimum(tl.maximum(first_tile * TILE + token_T, lowest), last)
            block = tl.load(table_ptr + nearest_T // BLOCK_SIZE)
        for tile in range(first_tile, end_tile):
            position_T = tile * TILE + token_T
            place_T = tl.minimum(tl.maximum(position_T, lowest), last) % BLOCK_SIZE
            block_start = block.to(tl.int64) * (2 * TO_V)
            if BLOCK_SIZE >= TILE:
                k_ptr_TC = (head_ptr_1C + block_start) + (place_T * WIDTH)[:, None]
                block = tl.load(table_ptr + tl.minimum((tile + 1) * TILE, last) // BLOCK_SIZE)
            else:
                k_ptr_TC = head_ptr_1C + (block_start + place_T * WIDTH)[:, None]
                block = tl.load(table_ptr + tl.minimum(position_T + TILE, last) // BLOCK_SIZE)
            # Triton's pipeline wants a load without a mask where none is needed
            k_TC = tl.load(k_ptr_TC) if WIDTH == COLUMNS else tl.load(k_ptr_TC, mask=in_head_C[None, :], other=0)
            if FP8:
                logits_MT = tl.dot(q_even_MC, tl.trans(_low(k_TC)))
                logits_MT = tl.dot(q_odd_MC, tl.trans(_high(k_TC)), logits_MT) * row_scale_M[:, None]
            else:
                logits_MT = tl.dot(q_MC, tl.trans(k_TC), input_precision="ieee") * logit_scale
            if CAPPED:  # cap * tanh(x / cap), x / cap * 2 log2(e) being at hand; saturates at both ends
                logits_MT = cap * LOG2_E - 2.0 * LOG2_E * cap / (tl.exp2(logits_MT) + 1.0)
            seen_MT = position_T[None, :] <= last_seen_M[:, None]
            if WINDOWED:
                seen_MT &= position_T[None, :] > (last_seen_M - window)[:, None]
            logits_MT = tl.where(seen_MT, logits_MT, HIDDEN)

            new_most_M = tl.maximum(most_M, tl.max(logits_MT, 1))
            fade_M = tl.exp2(most_M - new_most_M)
            weights_MT = tl.exp2(logits_MT - new_most_M[:, None])
            most_M = new_most_M
            sums_MT = sums_MT * fade_M[:, None] + weights_MT
            v_ptr_TC = k_ptr_TC + TO_V
            v_TC = tl.load(v_ptr_TC) if WIDTH == COLUMNS else tl.load(v_ptr_TC, mask=in_head_C[None, :], other=0)
            acc_MC *= fade_M[:, None]
            if FP8:
                odd_MC *= fade_M[:, None]
                weights_MT = weights_MT.to(tl.float16)
                acc_MC = tl.dot(weights_MT, _low(v_TC), acc_MC)
                odd_MC = tl.dot(weights_MT, _high(v_TC), odd_MC)
            else:
                acc_MC = tl.dot(weights_MT.to(v_TC.dtype), v_TC, acc_MC, input_precision="ieee")

        sum_M = tl.sum(sums_MT, 1)
        acc_MC *= (out_scale / sum_M)[:, None]
        odd_MC *= (out_scale / sum_M)[:, None]
        if num_parts == 1:
            _store(out_ptr_M1, column_C, acc_MC, odd_MC, ok_MC, FP8)
        elif num_parts > 1:
            slot = 2 * program + (program == first_program).to(tl.int32)
            part_M = (slot.to(tl.int64) * NUM_KV_HEADS + kv_head) * QUERY_ROWS + row_M
            tl.store(part_lse_ptr + part_M, most_M + tl.log2(sum_M), mask=row_ok_M)
            _store(part_out_ptr + (part_M * HEAD_DIM)[:, None], column_C, acc_MC, odd_MC, ok_MC, FP8)


@triton.jit
def join_kernel(
    rows_ptr,
    part_out_ptr,
    part_lse_ptr,
    out_ptr,
    out_stride,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    QUERY_ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    PARTS: tl.constexpr,
    PDL: tl.constexpr,
):
    # grid: (K * QUERY_ROWS, B): one query head of one query token
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    kv_head = tl.program_id(0) // QUERY_ROWS
    row = tl.program_id(0) % QUERY_ROWS
    entry_ptr = rows_ptr + tl.program_id(1) * PLAN_FIELDS
    query_start = tl.load(entry_ptr + QUERY_START)
    query_len = tl.load(entry_ptr + QUERY_LEN)
    first_program = tl.load(entry_ptr + FIRST_PROGRAM)
    num_parts = tl.load(entry_ptr + NUM_PARTS)
    if (num_parts < 2) | (row // GROUP >= query_len):
        return

    column_D = tl.arange(0, DIM)
    most = HIDDEN
    total = 0.0
    acc_D = tl.zeros([DIM], tl.float32)
    for start in range(0, num_parts, PARTS):
        number_P = start + tl.arange(0, PARTS)
        ok_P = number_P < num_parts
        slot_P = 2 * (first_program + number_P) + (number_P == 0).to(tl.int32)
        part_P = (slot_P.to(tl.int64) * NUM_KV_HEADS + kv_head) * QUERY_ROWS + row
        lse_P = tl.load(part_lse_ptr + part_P, mask=ok_P, other=HIDDEN)
        ok_PD = ok_P[:, None] & (column_D < HEAD_DIM)[None, :]
        out_PD = tl.load(part_out_ptr + part_P[:, None] * HEAD_DIM + column_D[None, :], mask=ok_PD, other=0.0)
        new_most = tl.maximum(most, tl.max(lse_P, 0))
        fade = tl.exp2(most - new_most)
        weight_P = tl.exp2(lse_P - new_most)
        most = new_most
        total = total * fade + tl.sum(weight_P, 0)
        acc_D = acc_D * fade + tl.sum(out_PD * weight_P[:, None], 0)
    token = (query_start + row // GROUP).to(tl.int64)
    out_ptr_D = out_ptr + token * out_stride + (kv_head * GROUP + row % GROUP) * HEAD_DIM + column_D
    tl.store(out_ptr_D, (acc_D / total).to(out_ptr.dtype.element_ty), mask=column_D < HEAD_DIM)
