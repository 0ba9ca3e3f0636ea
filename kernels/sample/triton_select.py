# mypy: ignore-errors
"""The exact threshold of top-k or top-p without a sort: three launches, each finding the next digit of its key.

Keys are the bits of -z, so the order of keys is the order of z (radix selection, most significant digit first; Alabi
et al., "Fast k-selection algorithms for graphics processing units", 2012). Each launch adds up, per value of the
digit, the tokens (top-k) or their mass (top-p) that share the digits found before; the program of a row that ends last
walks down the sums to the digit in which the k-th token, or the mass p, lies. Sums are integers: no order changes
them. The last digit is counted by split, which tells each split how many of the tokens at the threshold are its own to
keep, lowest ids first.
"""

import triton
import triton.language as tl

from biphase.kernels.sample.triton_row import (
    EDITED,
    EXCESS,
    FLAGS,
    HAS_TOP_K,
    HAS_TOP_P,
    LIMIT,
    NEED,
    PREFIX,
    STATE,
    TEMPERATURE,
    TOP_K,
    TOP_P,
    WANTED,
    WORDS,
    ends_last,
    fixed_mass,
    float_field,
    key_of,
    row_logits,
    scaled,
    wide_field,
    z_of,
)


@triton.jit(do_not_specialize=["tiles_per_split"])
def digit_kernel(
    logits_ptr,
    logits_stride,
    words_ptr,
    edits_ptr,
    edits_stride,
    row_max_ptr,
    state_ptr,
    histogram_ptr,  # [R, FIRST_BINS] int64, all zero before and after
    split_histogram_ptr,  # [R, MAX_SPLITS, LAST_BINS] int32, all zero before and after
    ties_before_ptr,  # [R, MAX_SPLITS] int32, out
    vocab_size,
    tiles_per_split,
    BY_MASS: tl.constexpr,
    DIGIT: tl.constexpr,  # 0, 1, 2
    FIRST_BINS: tl.constexpr,
    MIDDLE_BINS: tl.constexpr,
    LAST_BINS: tl.constexpr,
    TILE: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    record_ptr = words_ptr + row * WORDS
    flags = tl.load(record_ptr + FLAGS)
    if (flags & (HAS_TOP_P if BY_MASS else HAS_TOP_K)) == 0:
        return
    BINS: tl.constexpr = FIRST_BINS if DIGIT == 0 else (MIDDLE_BINS if DIGIT == 1 else LAST_BINS)
    BELOW: tl.constexpr = MIDDLE_BINS * LAST_BINS if DIGIT == 0 else (LAST_BINS if DIGIT == 1 else 1)
    state_ptr += row * STATE
    logits_ptr += row * logits_stride
    edits_ptr += row * edits_stride
    histogram_ptr += row * FIRST_BINS
    split_histogram_ptr += row * MAX_SPLITS * LAST_BINS
    edited = (flags & EDITED) != 0
    row_max = tl.load(row_max_ptr + row)
    temperature = float_field(record_ptr, TEMPERATURE)
    limit = tl.load(state_ptr + LIMIT).to(tl.int32)
    prefix = tl.load(state_ptr + PREFIX).to(tl.int32)
    first = split * tiles_per_split * TILE
    last = min(first + tiles_per_split * TILE, vocab_size)
    lanes = tl.arange(0, TILE)
    for start in range(first, last, TILE):
        offsets = start + lanes
        z = scaled(row_logits(logits_ptr, edits_ptr, offsets, offsets < last, edited), row_max, temperature)
        key = key_of(z)
        live = (offsets < last) & (key <= limit)
        if DIGIT > 0:
            live = live & (key // (BELOW * BINS) == prefix)
        digit = (key // BELOW) % BINS
        if DIGIT == 2:
            at = split_histogram_ptr + split * LAST_BINS + digit
            tl.atomic_add(at, tl.full([TILE], 1, tl.int32), mask=live, sem="relaxed")
        elif BY_MASS:
            mass = fixed_mass(z)
            tl.atomic_add(histogram_ptr + digit, mass, mask=live & (mass > 0), sem="relaxed")
        else:
            tl.atomic_add(histogram_ptr + digit, tl.full([TILE], 1, tl.int64), mask=live, sem="relaxed")

    if ends_last(state_ptr):
        bins = tl.arange(0, BINS)
        excess = tl.load(state_ptr + EXCESS)
        if DIGIT == 2:
            count = tl.zeros([BINS], tl.int32)
            for other in range(tl.num_programs(1)):
                count += tl.load(split_histogram_ptr + other * LAST_BINS + bins, cache_modifier=".cg")
            amount = count.to(tl.int64)
            if BY_MASS:
                amount = amount * fixed_mass(z_of(prefix * BINS + bins))
        else:
            amount = tl.load(histogram_ptr + bins, cache_modifier=".cg")
            tl.store(histogram_ptr + bins, tl.zeros([BINS], tl.int64))
        if DIGIT > 0:
            wanted = tl.load(state_ptr + WANTED)
        elif BY_MASS:
            # of the tokens at top-k's threshold some are out, all of one mass
            total = tl.sum(amount, axis=0) - excess * fixed_mass(z_of(limit))
            wanted = _part(total, wide_field(record_ptr, TOP_P).to(tl.float64, bitcast=True))
        else:
            wanted = tl.load(record_ptr + TOP_K).to(tl.int64)
        running = tl.cumsum(amount, axis=0)
        short = running < wanted
        digit = tl.minimum(tl.sum(short.to(tl.int32), axis=0), BINS - 1)
        wanted -= tl.max(tl.where(short, running, 0), axis=0)
        key = prefix * BINS + digit if DIGIT > 0 else digit
        if DIGIT < 2:
            tl.store(state_ptr + PREFIX, key.to(tl.int64))
            tl.store(state_ptr + WANTED, wanted)
        else:
            there = tl.sum(tl.where(bins == digit, count, 0), axis=0).to(tl.int64)
            need = wanted
            if BY_MASS:
                mass = fixed_mass(z_of(key))
                need = (wanted + mass - 1) // tl.maximum(mass, 1)
                there -= tl.where(key == limit, excess, 0)
            need = tl.maximum(tl.minimum(need, there), 1)
            tl.store(state_ptr + LIMIT, key.to(tl.int64))
            tl.store(state_ptr + NEED, need)
            tl.store(state_ptr + EXCESS, there - need)
            splits = tl.arange(0, MAX_SPLITS)
            used = splits < tl.num_programs(1)
            ties = tl.load(split_histogram_ptr + splits * LAST_BINS + digit, mask=used, other=0, cache_modifier=".cg")
            tl.store(ties_before_ptr + row * MAX_SPLITS + splits, tl.cumsum(ties, axis=0) - ties)
            tl.debug_barrier()
            for other in range(tl.num_programs(1)):
                tl.store(split_histogram_ptr + other * LAST_BINS + bins, tl.zeros([BINS], tl.int32))


@triton.jit
def _part(total, p):
    """The least integer that is no less than p * total, at least 1."""
    exact = total.to(tl.float64) * p
    part = exact.to(tl.int64)
    part += (part.to(tl.float64) < exact).to(tl.int64)
    return tl.maximum(part, 1)
