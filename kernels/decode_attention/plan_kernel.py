# mypy: ignore-errors
"""The kernel that cuts a decode step into even runs of tiles, and the layout of the plan that it leaves.

The even cut of a flat list of tiles among a fixed number of programs, across the borders of the problems, is Stream-K's
(Osama et al. 2023, section 4). A tile is TILE consecutive positions of one sequence, for one kv head. A step's tiles are
numbered sequence by sequence; program p of a head owns the tiles [p * run, (p + 1) * run), so that lengths as uneven as
they may be give every program the same work, and the grid depends on nothing but the GPU.

``run`` is chosen for two waves of programs where that leaves each a long run: their ends are then spread, and a slow
multiprocessor gets fewer. Short steps get one program per place instead, down to one tile each: time there is latency.
"""

import triton
import triton.language as tl

# a sequence's row of the plan
FIRST_TILE = tl.constexpr(0)  # number of its first tile in the step's list
END_TILE = tl.constexpr(1)
TILE_SHIFT = tl.constexpr(2)  # position // TILE of its first tile: above 0 where a window hides what lies before
CONTEXT = tl.constexpr(3)
QUERY_START = tl.constexpr(4)
QUERY_LEN = tl.constexpr(5)  # 0 where nothing is to be computed
FIRST_PROGRAM = tl.constexpr(6)
NUM_PARTS = tl.constexpr(7)  # programs that share it
PLAN_FIELDS = tl.constexpr(8)

# a program's run
RUN_FIRST = tl.constexpr(0)
RUN_END = tl.constexpr(1)
RUN_FIRST_SEQ = tl.constexpr(2)
RUN_END_SEQ = tl.constexpr(3)
RUN_FIELDS = tl.constexpr(4)


@triton.jit(
    do_not_specialize=["num_seqs", "window"], do_not_specialize_on_alignment=["context_lens_ptr", "query_starts_ptr"]
)
def plan_kernel(
    context_lens_ptr,  # [B]
    query_starts_ptr,  # [B + 1]
    rows_ptr,  # [max B, PLAN_FIELDS] int32
    runs_ptr,  # [PROGRAMS, RUN_FIELDS] int32
    num_seqs,
    window,  # 0: none
    TILE: tl.constexpr,
    PROGRAMS: tl.constexpr,  # per kv head
    RESIDENT: tl.constexpr,  # of them, how many the GPU holds at once
    LONG_RUN: tl.constexpr,
    MAX_SEQS: tl.constexpr,
    RUNS: tl.constexpr,
    PDL: tl.constexpr,
):
    # grid: (cdiv(PROGRAMS, RUNS),): each program adds up all lengths anew, so that none waits for another
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    seq_B = tl.arange(0, MAX_SEQS)
    real_B = seq_B < num_seqs
    context_B = tl.load(context_lens_ptr + seq_B, mask=real_B, other=0)
    query_start_B = tl.load(query_starts_ptr + seq_B, mask=real_B, other=0)
    query_len_B = tl.load(query_starts_ptr + seq_B + 1, mask=real_B, other=0) - query_start_B
    query_len_B = tl.where(context_B > 0, query_len_B, 0)
    lowest_B = tl.where(window > 0, tl.maximum(context_B - query_len_B + 1 - window, 0), 0)
    shift_B = lowest_B // TILE
    num_tiles_B = tl.where(query_len_B > 0, tl.cdiv(context_B, TILE) - shift_B, 0)
    end_B = tl.cumsum(num_tiles_B, 0)
    first_B = end_B - num_tiles_B
    total = tl.sum(num_tiles_B, 0)

    run = tl.maximum(tl.cdiv(total, PROGRAMS), tl.minimum(tl.cdiv(total, RESIDENT), LONG_RUN))
    run = tl.maximum(run, 1)

    if tl.program_id(0) == 0:
        row_ptr_B = rows_ptr + seq_B * PLAN_FIELDS
        first_program_B = first_B // run
        num_parts_B = tl.where(query_len_B > 0, (end_B - 1) // run - first_program_B + 1, 0)
        tl.store(row_ptr_B + FIRST_TILE, first_B, mask=real_B)
        tl.store(row_ptr_B + END_TILE, end_B, mask=real_B)
        tl.store(row_ptr_B + TILE_SHIFT, shift_B, mask=real_B)
        tl.store(row_ptr_B + CONTEXT, context_B, mask=real_B)
        tl.store(row_ptr_B + QUERY_START, query_start_B, mask=real_B)
        tl.store(row_ptr_B + QUERY_LEN, query_len_B, mask=real_B)
        tl.store(row_ptr_B + FIRST_PROGRAM, first_program_B, mask=real_B)
        tl.store(row_ptr_B + NUM_PARTS, num_parts_B, mask=real_B)

    program_P = tl.program_id(0) * RUNS + tl.arange(0, RUNS)
    run_first_P = tl.minimum(program_P * run, total)
    run_end_P = tl.minimum(run_first_P + run, total)
    # a run begins in the first sequence that ends past its first tile, and ends in the last that begins before its end
    first_seq_P = tl.sum((end_B[None, :] <= run_first_P[:, None]).to(tl.int32), 1)
    end_seq_P = tl.sum((real_B[None, :] & (first_B[None, :] < run_end_P[:, None])).to(tl.int32), 1)
    kept_P = program_P < PROGRAMS
    run_ptr_P = runs_ptr + program_P * RUN_FIELDS
    tl.store(run_ptr_P + RUN_FIRST, run_first_P, mask=kept_P)
    tl.store(run_ptr_P + RUN_END, run_end_P, mask=kept_P)
    tl.store(run_ptr_P + RUN_FIRST_SEQ, first_seq_P, mask=kept_P)
    tl.store(run_ptr_P + RUN_END_SEQ, tl.where(run_first_P < run_end_P, end_seq_P, first_seq_P), mask=kept_P)
