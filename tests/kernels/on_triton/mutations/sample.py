"""Breaks of ``sample`` that its tests must notice."""

_FIRST, _SELECT = "kernels/sample/triton_kernel.py", "kernels/sample/triton_select.py"
_DRAW, _EDITS = "kernels/sample/triton_draw.py", "kernels/sample/triton_edits.py"
_NOISE, _ROW = "kernels/sample/triton_noise.py", "kernels/sample/triton_row.py"
_TEST = "tests/kernels/on_triton/test_sample.py"
_MIXED = f"{_TEST}::test_every_kind_of_row_side_by_side"
_TIES = f"{_TEST}::test_among_equals_the_lowest_ids_are_kept"
_EQUALS = f"{_TEST}::test_greedy_takes_the_lowest_of_equals_whatever_program_finds_it"
_SHARDS = f"{_TEST}::test_shards_of_the_vocabulary_draw_what_the_whole_draws"
_NAN = f"{_TEST}::test_nan_and_forbidden_tokens_never_win"
_BIASES = f"{_TEST}::test_a_row_may_have_more_biases_than_a_program_has_lanes"
_NOISE_TEST = "tests/kernels/on_triton/test_sample_noise.py"

MUTATIONS = [
    # noise
    (_NOISE, "c2 = high0 ^ c3 ^ key1", "c2 = high0 ^ c3", _NOISE_TEST),
    (
        _NOISE,
        "even = tl.join((c0 >> 41).to(tl.int32), (c2 >> 41)",
        "even = tl.join((c0 >> 41).to(tl.int32), (c1 >> 41)",
        _NOISE_TEST,
    ),
    (_NOISE, "(bits.to(tl.float32) + 0.5)", "(bits.to(tl.float32) + 1.0)", _NOISE_TEST),
    # first launch
    (_FIRST, "better = x > best", "better = x >= best", _EQUALS),
    (_FIRST, "logits_ptr += row * logits_stride", "logits_ptr += row * vocab_size", _MIXED),
    (_FIRST, "last = min(first + tiles_per_split * TILE, vocab_size)", "last = first + tiles_per_split * TILE", _MIXED),
    (_FIRST, ">= top_k:", ">= 1:", _MIXED),
    (_FIRST, "tl.where(top_k <= used_groups, least, NEGATIVE)", "tl.where(top_k <= used_groups, least, 0.0)", _NAN),
    (_FIRST, "tl.store(row_max_ptr + row, row_max)", "tl.store(row_max_ptr + row, values)", _MIXED),
    # edits
    (_EDITS, "if IS_PROMPT:", "if not IS_PROMPT:", _MIXED),
    (_EDITS, "tl.where(x > 0, tl.div_rn(x, repetition), x * repetition)", "tl.div_rn(x, repetition)", _MIXED),
    (_EDITS, "tl.where(outputs > 0, x - taken, x)", "x - taken", _MIXED),
    (_EDITS, "(offsets >> 5)", "(offsets >> 4)", _MIXED),
    (_EDITS, "at = start + 2 * lanes", "at = start + lanes", _BIASES),
    (_EDITS, "other=-1) - vocab_start\n        tl.store(", "other=-1)\n        tl.store(", _SHARDS),
    (_EDITS, "late = tl.load(late_ids_ptr + late_row)", "late = tl.load(late_ids_ptr)", _TEST),
    # thresholds
    (_SELECT, "live = (offsets < last) & (key <= limit)", "live = offsets < last", _TIES),
    (_SELECT, "live = live & (key // (BELOW * BINS) == prefix)", "live = live & (key >= 0)", _MIXED),
    (_SELECT, "short = running < wanted", "short = running <= wanted", _MIXED),
    (_SELECT, "- excess * fixed_mass(z_of(limit))", "- 0 * fixed_mass(z_of(limit))", _TIES),
    (_SELECT, "tl.cumsum(ties, axis=0) - ties)", "tl.cumsum(ties, axis=0))", _TIES),
    (_SELECT, "tl.store(histogram_ptr + bins, tl.zeros([BINS], tl.int64))", "pass", _MIXED),
    # draw
    (_DRAW, "tl.cumsum(tie, axis=0) <= ties_left", "tl.cumsum(tie, axis=0) < ties_left", _TIES),
    (_DRAW, "ties_left -= num_ties", "ties_left -= 0", _TIES),
    (_DRAW, "better = keep & (score > best)", "better = score > best", _MIXED),
    (_DRAW, "keep = z >= floor", "keep = z >= _LOWEST_Z", f"{_TEST}::test_min_p_keeps_its_floor_and_nothing_below"),
    (_DRAW, "vocab_start + start, TILE)", "start, TILE)", _SHARDS),
    (_DRAW, "offsets < last) - raw_max), axis=0)", "offsets < last)), axis=0)", _MIXED),
    (_DRAW, "(tokens < taken), tokens, _NOTHING)", "(tokens <= taken), tokens, _NOTHING)", _MIXED),
    (_DRAW, "(left >> 32) << 32) | (group ^ NO_ID)", "(left >> 32) << 32) | (group & NO_ID)", _MIXED),
    # what they share
    (_ROW, "& 0x7FFFFFFF\n\n\n@triton.jit\ndef z_of", "& 0x7FFFFFFE\n\n\n@triton.jit\ndef z_of", _MIXED),
    (_ROW, "tl.where(x == x, x, NEGATIVE)", "x", _NAN),
    (_ROW, "before == tl.num_programs(1) - 1", "before == 0", _MIXED),
]
