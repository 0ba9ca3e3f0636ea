# mypy: ignore-errors
"""First launch of a step's draws: edits of the rows and their maxima. Then come the searches of ``triton_select`` and
the draw itself in ``triton_draw``.

Grid of all: (rows, splits); a split is ``tiles_per_split`` tiles of a row, and the program of a row that ends last
puts the splits' results together. What a row does not need it leaves at once, so one fixed grid, and one CUDA graph,
serves any mixture. A draw depends on its own row alone: maxima and sums are exact, noise goes by token id.
"""

import triton
import triton.language as tl

from biphase.kernels.sample.triton_edits import edit_range
from biphase.kernels.sample.triton_row import (
    ACTIVE,
    BEST,
    BEST_ID,
    EDITED,
    EXCESS,
    FLAGS,
    HAS_TOP_K,
    INFINITY_KEY,
    LIMIT,
    LOGPROBS,
    NEGATIVE,
    NO_ID,
    PENALISED,
    RAW_MAX,
    STATE,
    TEMPERATURE,
    TOP_K,
    WORDS,
    ends_last,
    float_field,
    key_of,
    raw_logits,
    rising,
    row_logits,
    scaled,
)


@triton.jit(do_not_specialize=["vocab_start", "tiles_per_split"])
def prepare_kernel(
    logits_ptr,  # [R, V] float32, bfloat16 or float16
    logits_stride,
    words_ptr,  # int32: R records, then what they point to
    edits_ptr,  # [R, edits_stride] float32
    counts_ptr,  # the same as int32
    edits_stride,
    late_ids_ptr,  # int64
    row_max_ptr,  # [R] float32, out
    state_ptr,  # [R, STATE] int64
    partial_values_ptr,  # [R, 2, MAX_SPLITS] float32
    partial_ids_ptr,  # [R, 2, MAX_SPLITS] int32
    groups_ptr,  # [R, 2, NUM_GROUPS] float32: largest logit of GROUP tokens, edited and raw
    vocab_start,
    vocab_size,
    tiles_per_split,
    TILE: tl.constexpr,
    GROUP: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    record_ptr = words_ptr + row * WORDS
    flags = tl.load(record_ptr + FLAGS)
    if (flags & ACTIVE) == 0:
        return
    logits_ptr += row * logits_stride
    edits_ptr += row * edits_stride
    state_ptr += row * STATE
    groups_ptr += row * 2 * NUM_GROUPS
    first = split * tiles_per_split * TILE
    last = min(first + tiles_per_split * TILE, vocab_size)
    edited = (flags & EDITED) != 0
    with_groups = (flags & HAS_TOP_K) != 0
    with_raw = (flags & LOGPROBS) != 0
    if edited:
        penalised = (flags & PENALISED) != 0
        counts_ptr += row * edits_stride
        edit_range(
            logits_ptr, words_ptr, record_ptr, edits_ptr, counts_ptr, late_ids_ptr, vocab_start, penalised, first, last,
            TILE,
        )  # fmt: skip

    lanes = tl.arange(0, TILE)
    group_lanes = tl.arange(0, TILE // GROUP)
    best = tl.full([TILE], NEGATIVE, tl.float32)
    best_id = first + lanes
    for start in range(first, last, TILE):
        offsets = start + lanes
        x = row_logits(logits_ptr, edits_ptr, offsets, offsets < last, edited)
        better = x > best
        best = tl.where(better, x, best)
        best_id = tl.where(better, offsets, best_id)
        group = start // GROUP + group_lanes
        if with_groups:
            tl.store(groups_ptr + group, tl.max(tl.reshape(x, [TILE // GROUP, GROUP]), axis=1), mask=group < NUM_GROUPS)
        if with_raw:
            raw = raw_logits(logits_ptr, offsets, offsets < last)
            of_group = tl.max(tl.reshape(raw, [TILE // GROUP, GROUP]), axis=1)
            tl.store(groups_ptr + NUM_GROUPS + group, of_group, mask=group < NUM_GROUPS)
    highest = tl.max(best, axis=0)
    values_ptr = partial_values_ptr + row * 2 * MAX_SPLITS
    ids_ptr = partial_ids_ptr + row * 2 * MAX_SPLITS
    tl.store(values_ptr + split, highest)
    tl.store(ids_ptr + split, tl.min(tl.where(best == highest, best_id, NO_ID), axis=0))

    if ends_last(state_ptr):
        splits = tl.arange(0, MAX_SPLITS)
        used = splits < tl.num_programs(1)
        values = tl.load(values_ptr + splits, mask=used, other=NEGATIVE, cache_modifier=".cg")
        ids = tl.load(ids_ptr + splits, mask=used, other=NO_ID, cache_modifier=".cg")
        row_max = tl.max(values, axis=0)
        tl.store(row_max_ptr + row, row_max)
        tl.store(state_ptr + BEST, row_max.to(tl.int32, bitcast=True).to(tl.int64))
        tl.store(state_ptr + BEST_ID, tl.min(tl.where(used & (values == row_max), ids, NO_ID), axis=0).to(tl.int64))
        if with_raw:
            raw_maxima = _groups(groups_ptr + NUM_GROUPS, tl.cdiv(vocab_size, GROUP), NUM_GROUPS)
            tl.store(state_ptr + RAW_MAX, tl.max(raw_maxima, axis=0).to(tl.int32, bitcast=True).to(tl.int64))
        limit = tl.full((), INFINITY_KEY, tl.int32)
        if with_groups:
            least = _kth_group(groups_ptr, tl.load(record_ptr + TOP_K), tl.cdiv(vocab_size, GROUP), NUM_GROUPS)
            limit = key_of(scaled(least, row_max, float_field(record_ptr, TEMPERATURE)))
        tl.store(state_ptr + LIMIT, limit.to(tl.int64))
        tl.store(state_ptr + EXCESS, row * 0)


@triton.jit
def _groups(groups_ptr, used_groups, NUM_GROUPS: tl.constexpr):
    groups = tl.arange(0, NUM_GROUPS)
    return tl.load(groups_ptr + groups, mask=groups < used_groups, other=NEGATIVE, cache_modifier=".cg")


@triton.jit
def _kth_group(groups_ptr, top_k, used_groups, NUM_GROUPS: tl.constexpr):
    """The top_k-th largest of the groups' maxima: no less than top_k tokens reach it. -inf where groups are too few."""
    order = rising(_groups(groups_ptr, used_groups, NUM_GROUPS)).to(tl.uint32, bitcast=True) ^ 0x80000000
    found = tl.full((), 0, tl.uint32)
    bit = tl.full((), 0x80000000, tl.uint32)
    for _ in range(32):
        candidate = found | bit
        if tl.sum((order >= candidate).to(tl.int32), axis=0) >= top_k:
            found = candidate
        bit = bit >> 1
    bits = (found ^ 0x80000000).to(tl.int32, bitcast=True)
    least = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    return tl.where(top_k <= used_groups, least, NEGATIVE)
