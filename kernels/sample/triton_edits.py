# mypy: ignore-errors
"""Edits of one program's range of a row's logits: see ``edits``, which computes the same in the same order.

A program scans the row's whole history for the tokens of its own range, so that no step needs another program.
Steps that read what other threads wrote are kept apart by barriers.
"""

import triton
import triton.language as tl

from biphase.kernels.sample.triton_row import (
    BIAS,
    FORBID,
    FREQUENCY,
    LATE_ROW,
    MASK_START,
    NEGATIVE,
    OUTPUT,
    PRESENCE,
    PROMPT,
    REPETITION,
    float_field,
    raw_logits,
)

# a token's count: how often it was put out, and one bit for the prompt
_IN_PROMPT: tl.constexpr = tl.constexpr(1 << 30)
_OUTPUTS: tl.constexpr = tl.constexpr((1 << 30) - 1)


@triton.jit
def edit_range(
    logits_ptr, words_ptr, record_ptr, edits_ptr, counts_ptr, late_ids_ptr, vocab_start, penalised, first, last,
    TILE: tl.constexpr,
):  # fmt: skip
    """``edits`` [first, last) = the row's logits, edited. ``counts``: the same memory as int32. Ids are global ones."""
    lanes = tl.arange(0, TILE)
    if penalised:
        for start in range(first, last, TILE):
            tl.store(counts_ptr + start + lanes, tl.zeros([TILE], tl.int32), mask=start + lanes < last)
        tl.debug_barrier()
        _count(words_ptr, record_ptr, counts_ptr, vocab_start, first, last, OUTPUT, False, TILE)
        _count(words_ptr, record_ptr, counts_ptr, vocab_start, first, last, PROMPT, True, TILE)
        late_row = tl.load(record_ptr + LATE_ROW)
        if late_row >= 0:
            late = tl.load(late_ids_ptr + late_row).to(tl.int32) - vocab_start
            if (late >= first) & (late < last):
                tl.atomic_add(counts_ptr + late, 1, sem="relaxed")
        tl.debug_barrier()
    mask_start = tl.load(record_ptr + MASK_START)
    for start in range(first, last, TILE):
        offsets = start + lanes
        inside = offsets < last
        x = raw_logits(logits_ptr, offsets, inside)
        if penalised:
            counts = tl.load(counts_ptr + offsets, mask=inside, other=0, cache_modifier=".cg")
            x = _penalised(x, counts, record_ptr)
        if mask_start >= 0:
            allowed = tl.load(words_ptr + mask_start + (offsets >> 5), mask=inside, other=0) >> (offsets & 31)
            x = tl.where((allowed & 1) != 0, x, NEGATIVE)
        tl.store(edits_ptr + offsets, x, mask=inside)
    tl.debug_barrier()
    _add_bias(words_ptr, record_ptr, edits_ptr, vocab_start, first, last, TILE)
    tl.debug_barrier()
    begin, end = tl.load(record_ptr + FORBID), tl.load(record_ptr + FORBID + 1)
    for start in range(begin, end, TILE):
        at = start + lanes
        token = tl.load(words_ptr + at, mask=at < end, other=-1) - vocab_start
        tl.store(
            edits_ptr + token,
            tl.full([TILE], NEGATIVE, tl.float32),
            mask=(token >= first) & (token < last) & (at < end),
        )
    tl.debug_barrier()


@triton.jit
def _count(
    words_ptr, record_ptr, counts_ptr, vocab_start, first, last, HISTORY: tl.constexpr, IS_PROMPT: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    lanes = tl.arange(0, TILE)
    begin, end = tl.load(record_ptr + HISTORY), tl.load(record_ptr + HISTORY + 1)
    for start in range(begin, end, TILE):
        at = start + lanes
        token = tl.load(words_ptr + at, mask=at < end, other=-1) - vocab_start
        own = (token >= first) & (token < last) & (at < end)
        if IS_PROMPT:
            tl.atomic_or(counts_ptr + token, tl.full([TILE], _IN_PROMPT, tl.int32), mask=own, sem="relaxed")
        else:
            tl.atomic_add(counts_ptr + token, tl.full([TILE], 1, tl.int32), mask=own, sem="relaxed")


@triton.jit
def _penalised(x, counts, record_ptr):
    repetition = float_field(record_ptr, REPETITION)
    outputs = counts & _OUTPUTS
    repeated = tl.where(x > 0, tl.div_rn(x, repetition), x * repetition)
    x = tl.where(counts != 0, repeated, x)
    taken = float_field(record_ptr, FREQUENCY) * outputs.to(tl.float32) + float_field(record_ptr, PRESENCE)
    return tl.where(outputs > 0, x - taken, x)


@triton.jit
def _add_bias(words_ptr, record_ptr, edits_ptr, vocab_start, first, last, TILE: tl.constexpr):
    lanes = tl.arange(0, TILE)
    begin, end = tl.load(record_ptr + BIAS), tl.load(record_ptr + BIAS + 1)
    for start in range(begin, end, 2 * TILE):
        at = start + 2 * lanes
        token = tl.load(words_ptr + at, mask=at < end, other=-1) - vocab_start
        value = tl.load(words_ptr + at + 1, mask=at < end, other=0).to(tl.float32, bitcast=True)
        own = (token >= first) & (token < last) & (at < end)
        x = tl.load(edits_ptr + token, mask=own, other=0.0)
        tl.store(edits_ptr + token, x + value, mask=own)
