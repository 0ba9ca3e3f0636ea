"""Triton kernels of decode attention: the plan of a step, attention over runs of tiles, and the join of what was cut.

Source: Flash-Decoding (Dao, Haziza, Massa, Sizov 2023) for splitting the keys of a sequence among programs and joining
by log-sum-exp; the online softmax of FlashAttention-2 (Dao 2023, section 3.1); the even cut of a flat list of tiles
among a fixed number of programs, across the borders of the problems, is Stream-K's (Osama et al. 2023, section 4).

A tile is TILE consecutive positions of one sequence and one kv head. A step's tiles are numbered sequence by sequence;
program p of a head owns the tiles [p * run, (p + 1) * run). A program that ends within a sequence, or begins within one,
leaves a partial result: in its slot 2p + 1 if the sequence begins with this program, else in 2p (at most one of each).

Letters: B sequences, G query heads per kv head, J query tokens, rows = J x G of them, D head_dim.
"""

import triton
import triton.language as tl
from triton.language.extra import cuda

# fields of the plan's row of a sequence
FIRST_TILE = tl.constexpr(0)
"""Number of the sequence's first tile in the step's list."""
END_TILE = tl.constexpr(1)
TILE_SHIFT = tl.constexpr(2)
"""Position // TILE of the first tile: above 0 where a window hides what lies before."""
CONTEXT = tl.constexpr(3)
QUERY_START = tl.constexpr(4)
QUERY_LEN = tl.constexpr(5)
"""0 where nothing is to be computed."""
FIRST_PROGRAM = tl.constexpr(6)
NUM_PARTS = tl.constexpr(7)
PLAN_FIELDS = tl.constexpr(8)

HIDDEN = tl.constexpr(-1.0e30)
"""Logit of a position that a row may not see. Finite, so that a row which sees nothing in a part gets weight
exp2(HIDDEN - ...) = 0 in the join instead of NaN."""
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit(do_not_specialize=["num_seqs", "window"], do_not_specialize_on_alignment=["context_lens", "query_starts"])
def plan_kernel(
    context_lens,  # [B]
    query_starts,  # [B + 1]
    rows,  # [max B, PLAN_FIELDS] int32
    runs,  # [PROGRAMS, 4] int32: first tile, end tile, first sequence, end sequence
    num_seqs,
    window,  # 0: none
    TILE: tl.constexpr,
    PROGRAMS: tl.constexpr,
    RESIDENT: tl.constexpr,  # of those programs, how many a GPU holds at once
    LONG_RUN: tl.constexpr,
    MAX_SEQS: tl.constexpr,
    RUNS: tl.constexpr,
):
    # grid: (cdiv(PROGRAMS, RUNS),); each program adds up all lengths anew, so that none waits for another
    seq = tl.arange(0, MAX_SEQS)
    real = seq < num_seqs
    context = tl.load(context_lens + seq, mask=real, other=0)
    query_start = tl.load(query_starts + seq, mask=real, other=0)
    query_len = tl.load(query_starts + seq + 1, mask=real, other=0) - query_start
    query_len = tl.where(context > 0, query_len, 0)
    first_seen = tl.where(window > 0, tl.maximum(context - query_len + 1 - window, 0), 0)
    shift = first_seen // TILE
    num_tiles = tl.where(query_len > 0, tl.cdiv(context, TILE) - shift, 0)
    end = tl.cumsum(num_tiles, 0)
    first = end - num_tiles
    total = tl.sum(num_tiles, 0)

    # all programs where that leaves each a long run, else one program per place on the GPU, but never less than a tile
    run = tl.maximum(tl.cdiv(total, PROGRAMS), tl.minimum(tl.cdiv(total, RESIDENT), LONG_RUN))
    run = tl.maximum(run, 1)

    if tl.program_id(0) == 0:
        at = rows + seq * PLAN_FIELDS
        first_program = first // run
        tl.store(at + FIRST_TILE, first, mask=real)
        tl.store(at + END_TILE, end, mask=real)
        tl.store(at + TILE_SHIFT, shift, mask=real)
        tl.store(at + CONTEXT, context, mask=real)
        tl.store(at + QUERY_START, query_start, mask=real)
        tl.store(at + QUERY_LEN, query_len, mask=real)
        tl.store(at + FIRST_PROGRAM, first_program, mask=real)
        num_parts = tl.where(query_len > 0, (end - 1) // run - first_program + 1, 0)
        tl.store(at + NUM_PARTS, num_parts, mask=real)

    program = tl.program_id(0) * RUNS + tl.arange(0, RUNS)
    run_first = tl.minimum(program * run, total)
    run_end = tl.minimum(run_first + run, total)
    # sequences that end before the run's first tile are those that it skips; padding ends where the last one does
    skipped = tl.sum((end[None, :] <= run_first[:, None]).to(tl.int32), 1)
    reached = tl.sum((real[None, :] & (first[None, :] < run_end[:, None])).to(tl.int32), 1)
    kept = program < PROGRAMS
    tl.store(runs + program * 4, run_first, mask=kept)
    tl.store(runs + program * 4 + 1, run_end, mask=kept)
    tl.store(runs + program * 4 + 2, skipped, mask=kept)
    tl.store(runs + program * 4 + 3, tl.where(run_first < run_end, reached, skipped), mask=kept)


@triton.jit
def _low(pair):
    """Of two e4m3 codes in an int16, the one at the lower address, as float16 (which holds every e4m3 value)."""
    return pair.to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float16)


@triton.jit
def _high(pair):
    return (pair >> 8).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float16)


@triton.jit(do_not_specialize=["table_stride", "window"], do_not_specialize_on_alignment=["tables"])
def split_kernel(
    q,  # [N, H, D], rows q_stride elements apart
    pool,  # [blocks, 2, K, BLOCK_SIZE, D]; fp8: two codes seen as one int16
    tables,  # [B, W] int32
    kv_scale,  # [2, K] float32 or None
    rows,
    runs,
    part_out,  # [2 * PROGRAMS, K, QUERY_ROWS, D] float32: normalised
    part_lse,  # [2 * PROGRAMS, K, QUERY_ROWS] float32: log2 of the sum of exponentials
    out,  # [N, H, D]
    q_stride,
    out_stride,
    table_stride,
    scale,
    window,
    cap,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    QUERY_ROWS: tl.constexpr,
    ROWS: tl.constexpr,
    ROW_TILES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    FP8: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    # grid: (PROGRAMS, K * ROW_TILES)
    if PDL:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()
    program = tl.program_id(0)
    kv_head = tl.program_id(1) // ROW_TILES
    row = (tl.program_id(1) % ROW_TILES) * ROWS + tl.arange(0, ROWS)
    run_first = tl.load(runs + program * 4)
    run_end = tl.load(runs + program * 4 + 1)
    first_seq = tl.load(runs + program * 4 + 2)
    end_seq = tl.load(runs + program * 4 + 3)

    WIDTH: tl.constexpr = HEAD_DIM // 2 if FP8 else HEAD_DIM  # elements of the pool per token and head
    PADDED: tl.constexpr = DIM // 2 if FP8 else DIM
    column = tl.arange(0, PADDED)
    column_ok = column < WIDTH
    head_at = pool + kv_head * (BLOCK_SIZE * WIDTH) + column[None, :]
    to_v: tl.constexpr = NUM_KV_HEADS * BLOCK_SIZE * WIDTH
    to_block: tl.constexpr = 2 * to_v
    token = tl.arange(0, TILE)

    logit_scale = scale * LOG2_E
    if CAPPED:
        logit_scale *= 2.0 / cap
    out_scale = 1.0
    if FP8:
        logit_scale *= tl.load(kv_scale + kv_head)
        out_scale = tl.load(kv_scale + NUM_KV_HEADS + kv_head)

    for seq in tl.range(first_seq, end_seq, num_stages=1):
        entry = rows + seq * PLAN_FIELDS
        seq_first = tl.load(entry + FIRST_TILE)
        seq_end = tl.load(entry + END_TILE)
        shift = tl.load(entry + TILE_SHIFT)
        context = tl.load(entry + CONTEXT)
        query_start = tl.load(entry + QUERY_START)
        query_len = tl.load(entry + QUERY_LEN)
        first_program = tl.load(entry + FIRST_PROGRAM)
        num_parts = tl.load(entry + NUM_PARTS)

        query = row // GROUP
        row_ok = query < query_len
        head = kv_head * GROUP + row % GROUP
        last_seen = context - query_len + tl.minimum(query, query_len - 1)
        lowest = 0
        if WINDOWED:
            lowest = tl.maximum(context - query_len + 1 - window, 0)
        q_at = q + (query_start + query).to(tl.int64)[:, None] * q_stride + head[:, None] * HEAD_DIM
        out_at = out + (query_start + query).to(tl.int64)[:, None] * out_stride + head[:, None] * HEAD_DIM
        q_ok = row_ok[:, None] & column_ok[None, :]
        if FP8:
            q_even = tl.load(q_at + 2 * column[None, :], mask=q_ok, other=0.0).to(tl.float32)
            q_odd = tl.load(q_at + 2 * column[None, :] + 1, mask=q_ok, other=0.0).to(tl.float32)
            # float16 has too little range for any query: rows are brought to 1 at most, the logits carry the factor
            q_most = tl.maximum(tl.max(tl.abs(q_even), 1), tl.max(tl.abs(q_odd), 1))
            q_most = tl.where(q_most > 0.0, q_most, 1.0)
            q_even = (q_even * (1.0 / q_most)[:, None]).to(tl.float16)
            q_odd = (q_odd * (1.0 / q_most)[:, None]).to(tl.float16)
            row_scale = q_most * logit_scale
        else:
            q_rows = tl.load(q_at + column[None, :], mask=q_ok, other=0.0)

        first_tile = tl.maximum(run_first, seq_first) - seq_first + shift
        end_tile = tl.minimum(run_end, seq_end) - seq_first + shift
        last = tl.maximum(context - 1, 0)  # an empty sequence's table is looked at too
        table = tables + seq * table_stride

        most = tl.full([ROWS], HIDDEN, tl.float32)
        # summed over tiles only, so that no tile waits for a sum across its warps
        sums = tl.zeros([ROWS, TILE], tl.float32)
        acc = tl.zeros([ROWS, PADDED], tl.float32)
        acc_odd = tl.zeros([ROWS, PADDED], tl.float32)
        # places outside [lowest, context) read the nearest place inside: nothing that was never written is touched, and
        # the loads need no mask. A tile's table entries are fetched one tile ahead of its keys.
        if BLOCK_SIZE >= TILE:
            block = tl.load(table + first_tile * TILE // BLOCK_SIZE)
        else:
            block = tl.load(table + tl.minimum(tl.maximum(first_tile * TILE + token, lowest), last) // BLOCK_SIZE)
        for tile in range(first_tile, end_tile):
            position = tile * TILE + token
            nearest = tl.minimum(tl.maximum(position, lowest), last)
            place = nearest % BLOCK_SIZE
            if BLOCK_SIZE >= TILE:
                at = (head_at + block.to(tl.int64) * to_block) + (place * WIDTH)[:, None]
                block = tl.load(table + tl.minimum((tile + 1) * TILE, last) // BLOCK_SIZE)
            else:
                at = head_at + (block.to(tl.int64) * to_block + place * WIDTH)[:, None]
                block = tl.load(table + tl.minimum(position + TILE, last) // BLOCK_SIZE)

            k = tl.load(at) if WIDTH == PADDED else tl.load(at, mask=column_ok[None, :], other=0)
            if FP8:
                logits = tl.dot(q_even, tl.trans(_low(k)))
                logits = tl.dot(q_odd, tl.trans(_high(k)), logits) * row_scale[:, None]
            else:
                logits = tl.dot(q_rows, tl.trans(k), input_precision=PRECISION) * logit_scale
            if (
                CAPPED
            ):  # cap * tanh(x / cap), by an exponential that saturates at both ends; logits hold 2 log2(e) x / cap
                logits = cap * LOG2_E - 2.0 * LOG2_E * cap / (tl.exp2(logits) + 1.0)
            seen = position[None, :] <= last_seen[:, None]
            if WINDOWED:
                seen &= position[None, :] > (last_seen - window)[:, None]
            logits = tl.where(seen, logits, HIDDEN)

            most_now = tl.maximum(most, tl.max(logits, 1))
            fade = tl.exp2(most - most_now)
            weights = tl.exp2(logits - most_now[:, None])
            most = most_now
            sums = sums * fade[:, None] + weights
            v = tl.load(at + to_v) if WIDTH == PADDED else tl.load(at + to_v, mask=column_ok[None, :], other=0)
            acc *= fade[:, None]
            if FP8:
                acc_odd *= fade[:, None]
                weights = weights.to(tl.float16)
                acc = tl.dot(weights, _low(v), acc)
                acc_odd = tl.dot(weights, _high(v), acc_odd)
            else:
                acc = tl.dot(weights.to(v.dtype), v, acc, input_precision=PRECISION)

        total = tl.sum(sums, 1)
        norm = out_scale / total
        acc *= norm[:, None]
        if FP8:
            acc_odd *= norm[:, None]
        if num_parts == 1:
            if FP8:
                tl.store(out_at + 2 * column[None, :], acc.to(out.dtype.element_ty), mask=q_ok)
                tl.store(out_at + 2 * column[None, :] + 1, acc_odd.to(out.dtype.element_ty), mask=q_ok)
            else:
                tl.store(out_at + column[None, :], acc.to(out.dtype.element_ty), mask=q_ok)
        elif num_parts > 1:
            slot = 2 * program + (program == first_program).to(tl.int32)
            part = (slot.to(tl.int64) * NUM_KV_HEADS + kv_head) * QUERY_ROWS + row
            tl.store(part_lse + part, most + tl.log2(total), mask=row_ok)
            part_at = part_out + part[:, None] * HEAD_DIM
            if FP8:
                tl.store(part_at + 2 * column[None, :], acc, mask=q_ok)
                tl.store(part_at + 2 * column[None, :] + 1, acc_odd, mask=q_ok)
            else:
                tl.store(part_at + column[None, :], acc, mask=q_ok)


@triton.jit
def join_kernel(
    rows,
    part_out,
    part_lse,
    out,
    out_stride,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    QUERY_ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    PARTS: tl.constexpr,
    PDL: tl.constexpr,
):
    # grid: (B, K * QUERY_ROWS): one query head of one query token, its parts in the order of their keys
    if PDL:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()
    seq = tl.program_id(0)
    kv_head = tl.program_id(1) // QUERY_ROWS
    row = tl.program_id(1) % QUERY_ROWS
    entry = rows + seq * PLAN_FIELDS
    query_start = tl.load(entry + QUERY_START)
    query_len = tl.load(entry + QUERY_LEN)
    first_program = tl.load(entry + FIRST_PROGRAM)
    num_parts = tl.load(entry + NUM_PARTS)
    if (num_parts < 2) | (row // GROUP >= query_len):
        return

    column = tl.arange(0, DIM)
    most = HIDDEN
    total = 0.0
    acc = tl.zeros([DIM], tl.float32)
    for start in range(0, num_parts, PARTS):
        part = start + tl.arange(0, PARTS)
        ok = part < num_parts
        slot = 2 * (first_program + part) + (part == 0).to(tl.int32)
        at = (slot.to(tl.int64) * NUM_KV_HEADS + kv_head) * QUERY_ROWS + row
        lse = tl.load(part_lse + at, mask=ok, other=HIDDEN)
        values = tl.load(
            part_out + at[:, None] * HEAD_DIM + column[None, :],
            mask=ok[:, None] & (column < HEAD_DIM)[None, :],
            other=0.0,
        )
        most_now = tl.maximum(most, tl.max(lse, 0))
        fade = tl.exp2(most - most_now)
        weights = tl.exp2(lse - most_now)
        most = most_now
        total = total * fade + tl.sum(weights, 0)
        acc = acc * fade + tl.sum(values * weights[:, None], 0)
    head = kv_head * GROUP + row % GROUP
    out_at = out + (query_start + row // GROUP).to(tl.int64) * out_stride + head * HEAD_DIM + column
    tl.store(out_at, (acc / total).to(out.dtype.element_ty), mask=column < HEAD_DIM)
