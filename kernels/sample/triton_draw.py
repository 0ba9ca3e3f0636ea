# mypy: ignore-errors
"""Last launch of a step's draws: noise, winner and log-probabilities. See ``triton_kernel``."""

import triton
import triton.language as tl

from biphase.kernels.sample.triton_noise import gumbel_tile
from biphase.kernels.sample.triton_row import (
    ACTIVE,
    BEST,
    BEST_ID,
    BRANCH,
    DRAWN,
    EDITED,
    FLAGS,
    FLOOR,
    HAS_TOP_K,
    HAS_TOP_P,
    INFINITY_KEY,
    LIMIT,
    LOGPROBS,
    NEED,
    NEGATIVE,
    NO_ID,
    NUM_TOP,
    POSITION,
    RAW_MAX,
    SEED,
    STATE,
    TEMPERATURE,
    WORDS,
    ends_last,
    fixed_mass,
    float_field,
    key_of,
    raw_logits,
    rising,
    row_logits,
    scaled,
    wide_field,
)

# z below it never wins: the best token's noise is at least -2.82, no token's is above 16.64 (noise.MAX_NOISE)
_LOWEST_Z: tl.constexpr = tl.constexpr(-19.5)
_NOTHING: tl.constexpr = tl.constexpr(-0x8000000000000000)
_FIXED_UNIT: tl.constexpr = tl.constexpr(1.0 / (1 << 40))


@triton.jit(do_not_specialize=["vocab_start", "tiles_per_split"])
def draw_kernel(
    logits_ptr,
    logits_stride,
    words_ptr,
    edits_ptr,
    edits_stride,
    row_max_ptr,
    state_ptr,
    partial_values_ptr,
    partial_ids_ptr,
    partial_sums_ptr,  # [R, MAX_SPLITS] int64
    groups_ptr,
    ties_before_ptr,  # [R, MAX_SPLITS] int32
    token_ids_ptr,  # [R] int64, out
    scores_ptr,  # [R] float32, out
    logprobs_ptr,  # [R] float32, out
    top_ids_ptr,  # [R, MAX_TOP] int32, out
    top_logprobs_ptr,  # [R, MAX_TOP] float32, out
    vocab_start,
    vocab_size,
    tiles_per_split,
    TILE: tl.constexpr,
    GROUP: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    MAX_TOP: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    record_ptr = words_ptr + row * WORDS
    flags = tl.load(record_ptr + FLAGS)
    if (flags & ACTIVE) == 0:
        return
    state_ptr += row * STATE
    best_id = tl.load(state_ptr + BEST_ID).to(tl.int32)
    score = tl.load(state_ptr + BEST).to(tl.int32).to(tl.float32, bitcast=True)
    row_max = tl.load(row_max_ptr + row)
    drawn = (flags & DRAWN) != 0
    with_logprobs = (flags & LOGPROBS) != 0
    if (flags & (DRAWN | LOGPROBS)) == 0:
        if split == 0:
            tl.store(token_ids_ptr + row, best_id.to(tl.int64) + vocab_start)
            tl.store(scores_ptr + row, score)
        return
    logits_ptr += row * logits_stride
    first = split * tiles_per_split * TILE
    last = min(first + tiles_per_split * TILE, vocab_size)
    values_ptr = partial_values_ptr + (row * 2 + 1) * MAX_SPLITS
    ids_ptr = partial_ids_ptr + (row * 2 + 1) * MAX_SPLITS
    sums_ptr = partial_sums_ptr + row * MAX_SPLITS
    raw_max = tl.load(state_ptr + RAW_MAX).to(tl.int32).to(tl.float32, bitcast=True)
    if drawn:
        own_score, own_token = _best_score(
            logits_ptr, edits_ptr + row * edits_stride, record_ptr, state_ptr, ties_before_ptr + row * MAX_SPLITS, flags,
            row_max, vocab_start, split, first, last, TILE,
        )  # fmt: skip
        tl.store(values_ptr + split, own_score)
        tl.store(ids_ptr + split, own_token)
    if with_logprobs:
        total = tl.full((), 0, tl.int64)
        for start in range(first, last, TILE):
            offsets = start + tl.arange(0, TILE)
            total += tl.sum(fixed_mass(raw_logits(logits_ptr, offsets, offsets < last) - raw_max), axis=0)
        tl.store(sums_ptr + split, total)

    if ends_last(state_ptr):
        splits = tl.arange(0, MAX_SPLITS)
        used = splits < tl.num_programs(1)
        token = best_id
        if drawn:
            values = tl.load(values_ptr + splits, mask=used, other=NEGATIVE, cache_modifier=".cg")
            ids = tl.load(ids_ptr + splits, mask=used, other=NO_ID, cache_modifier=".cg")
            score = tl.max(values, axis=0)
            token = tl.min(tl.where(used & (values == score), ids, NO_ID), axis=0)
        tl.store(token_ids_ptr + row, token.to(tl.int64) + vocab_start)
        tl.store(scores_ptr + row, score)
        if with_logprobs:
            total = tl.sum(tl.load(sums_ptr + splits, mask=used, other=0, cache_modifier=".cg"), axis=0)
            log_total = tl.log(total.to(tl.float32) * _FIXED_UNIT)
            chosen = tl.load(logits_ptr + token).to(tl.float32)
            tl.store(logprobs_ptr + row, chosen - raw_max - log_total)
            _best_n(
                logits_ptr, groups_ptr + (row * 2 + 1) * NUM_GROUPS, tl.load(record_ptr + NUM_TOP), raw_max,
                log_total, top_ids_ptr + row * MAX_TOP, top_logprobs_ptr + row * MAX_TOP, vocab_start, vocab_size,
                GROUP, NUM_GROUPS,
            )  # fmt: skip


@triton.jit
def _best_score(
    logits_ptr, edits_ptr, record_ptr, state_ptr, ties_before_ptr, flags, row_max, vocab_start, split, first, last,
    TILE: tl.constexpr,
):  # fmt: skip
    """The split's largest z + noise among what the filters leave, and its token, the lowest of equals."""
    temperature = float_field(record_ptr, TEMPERATURE)
    floor = tl.maximum(float_field(record_ptr, FLOOR), _LOWEST_Z)
    seed = wide_field(record_ptr, SEED)
    branch = wide_field(record_ptr, BRANCH)
    position = wide_field(record_ptr, POSITION)
    edited = (flags & EDITED) != 0
    filtered = (flags & (HAS_TOP_K | HAS_TOP_P)) != 0
    limit = tl.full((), INFINITY_KEY, tl.int32)
    ties_left = tl.full((), 0, tl.int32)
    if filtered:
        limit = tl.load(state_ptr + LIMIT).to(tl.int32)
        ties_left = tl.load(state_ptr + NEED).to(tl.int32) - tl.load(ties_before_ptr + split)
    lanes = tl.arange(0, TILE)
    best = tl.full([TILE], NEGATIVE, tl.float32)
    best_id = first + lanes
    for start in range(first, last, TILE):
        offsets = start + lanes
        z = scaled(row_logits(logits_ptr, edits_ptr, offsets, offsets < last, edited), row_max, temperature)
        keep = z >= floor
        if filtered:
            key = key_of(z)
            tie = ((key == limit) & (offsets < last)).to(tl.int32)
            num_ties = tl.sum(tie, axis=0)
            keep = keep & (key <= limit)
            if num_ties > 0:
                keep = keep & ((tie == 0) | (tl.cumsum(tie, axis=0) <= ties_left))
                ties_left -= num_ties
        if tl.max(keep.to(tl.int32), axis=0) != 0:
            score = z + gumbel_tile(seed, branch, position, vocab_start + start, TILE)
            better = keep & (score > best)
            best = tl.where(better, score, best)
            best_id = tl.where(better, offsets, best_id)
    highest = tl.max(best, axis=0)
    return highest, tl.min(tl.where(best == highest, best_id, NO_ID), axis=0)


@triton.jit
def _best_n(
    logits_ptr, groups_ptr, num_top, raw_max, log_total, top_ids_ptr, top_logprobs_ptr, vocab_start, vocab_size,
    GROUP: tl.constexpr, NUM_GROUPS: tl.constexpr,
):  # fmt: skip
    """The num_top best raw logits one by one: the best group by its maximum, then that group without what was taken.

    A token or group is one int64, its logit's order above and its id's complement below, so equals go by id.
    """
    groups = tl.arange(0, NUM_GROUPS)
    in_group = tl.arange(0, GROUP)
    used = groups < tl.cdiv(vocab_size, GROUP)
    maxima = tl.load(groups_ptr + groups, mask=used, other=NEGATIVE, cache_modifier=".cg")
    packed = tl.where(used, _packed(maxima, groups), _NOTHING)
    taken = tl.full((), 0x7FFFFFFFFFFFFFFF, tl.int64)
    for place in range(num_top):
        group = (tl.max(packed, axis=0) & 0xFFFFFFFF).to(tl.int32) ^ NO_ID
        ids = group * GROUP + in_group
        tokens = _packed(raw_logits(logits_ptr, ids, ids < vocab_size), ids)
        # tokens are taken in falling order, so what was taken before is what does not rank below the last
        tokens = tl.where((ids < vocab_size) & (tokens < taken), tokens, _NOTHING)
        taken = tl.max(tokens, axis=0)
        left = tl.max(tl.where(tokens < taken, tokens, _NOTHING), axis=0)
        left = tl.where(left == _NOTHING, left, ((left >> 32) << 32) | (group ^ NO_ID).to(tl.int64))
        packed = tl.where(groups == group, left, packed)
        tl.store(top_ids_ptr + place, ((taken & 0xFFFFFFFF).to(tl.int32) ^ NO_ID) + vocab_start)
        order = (taken >> 32).to(tl.int32)
        x = (order ^ ((order >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
        tl.store(top_logprobs_ptr + place, x - raw_max - log_total)


@triton.jit
def _packed(x, ids):
    return (rising(x).to(tl.int64) << 32) | (ids ^ NO_ID).to(tl.int64)
