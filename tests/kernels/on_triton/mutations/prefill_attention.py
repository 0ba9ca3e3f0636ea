"""Breaks of ``prefill_attention`` that its tests must notice."""

_KERNEL = "kernels/prefill_attention/triton_kernel.py"
_PLAN = "kernels/prefill_attention/tile_plan.py"
_LAUNCHER = "kernels/prefill_attention/triton_gpu.py"
_TEST = "tests/kernels/on_triton/test_prefill_attention.py::"
_CASE = _TEST + "test_it_equals_the_reference"
_UNEVEN = _CASE + "[bf16, uneven, prefixes]"
_WINDOW = _CASE + "[window within a tile]"
_CAP = _CASE + "[soft cap]"
_FP8 = _CASE + "[fp8]"
_LOADS = _TEST + "test_every_way_to_load_gives_the_same"
_BULK = _LOADS + "[causal-bulk copies, a block per tile]"
_NO_OVERLAP = _LOADS + "[causal-pointers, half a block per tile]"
_TWO_BLOCKS = _LOADS + "[causal-pointers, two blocks per tile]"
_FOUR_BLOCKS = _LOADS + "[causal-pointers, four blocks per tile]"
_PLANNED = _TEST + "test_tiles_cover_every_row_once_heaviest_first"
_BEHIND = _TEST + "test_blocks_behind_the_window_are_not_read"
_SMALL_TILES = _LOADS + "[window-pointers, half a block per tile]"
_WINDOWED = _LOADS + "[window-pointers, a block per tile]"

MUTATIONS = [
    # masks
    (_KERNEL, "key_N[None, :] <= position_M[:, None]", "key_N[None, :] < position_M[:, None]", _UNEVEN),
    (
        _KERNEL,
        "key_N[None, :] > position_M[:, None] - window",
        "key_N[None, :] >= position_M[:, None] - window",
        _WINDOW,
    ),
    (_KERNEL, "(key_N >= first_key) & (key_N < end_key)", "(key_N >= first_key)", _UNEVEN),
    (_KERNEL, "(key_N >= first_key) & (key_N < end_key)", "(key_N < end_key)", _BEHIND),
    (_KERNEL, "main_end = (low_position + 1) // BLOCK_N", "main_end = (high_position + 1) // BLOCK_N", _NO_OVERLAP),
    (_KERNEL, "tl.maximum(high_position - window + 1, 0)", "tl.maximum(low_position - window + 1, 0)", _SMALL_TILES),
    (_KERNEL, "first_key = tl.maximum(low_position - window + 1, 0)", "first_key = main_key", _BEHIND),
    (_KERNEL, "early_key = first_key // EDGE_N * EDGE_N", "early_key = main_key", _WINDOWED),
    (_KERNEL, "tl.minimum(first_row + BLOCK_M, num_rows) - 1", "first_row + BLOCK_M - 1", _UNEVEN),
    (
        _KERNEL,
        "(m[:, None] < num_rows) & (d[None, :] < DIM))",
        "(m[:, None] <= num_rows) & (d[None, :] < DIM))",
        _UNEVEN,
    ),
    # addresses
    (_KERNEL, "tl.minimum(first + 1, last_block)", "tl.minimum(first, last_block)", _TWO_BLOCKS),
    (_KERNEL, "tl.minimum((key + n) // BLOCK_SIZE, last_block)", "tl.minimum(first, last_block)", _FOUR_BLOCKS),
    (_KERNEL, "key % BLOCK_SIZE if BLOCK_SIZE >= TILE", "0 * key if BLOCK_SIZE >= TILE", _NO_OVERLAP),
    (_KERNEL, "else n % BLOCK_SIZE", "else n", _FOUR_BLOCKS),
    (_KERNEL, "(block * 2 * KV_HEADS + kv_head) * BLOCK_SIZE", "(block * KV_HEADS + kv_head) * BLOCK_SIZE", _UNEVEN),
    (
        _KERNEL,
        "row.to(tl.int64) * DIM + n[:, None]",
        "row * DIM + n[:, None]",
        _TEST + "test_a_cache_past_2_to_the_31_elements",
    ),
    (_KERNEL, "token_M = m // GROUP", "token_M = m // (GROUP + 1)", _UNEVEN),
    # softmax
    (_KERNEL, "tl.max(s_MN, 1) * score_scale)", "tl.min(s_MN, 1) * score_scale)", _CASE + "[scores far apart]"),
    (_KERNEL, "cap_out - 2.0 * cap_out", "cap_out - cap_out", _CAP),
    (_KERNEL, "score_scale *= tl.load(kv_scale_ptr + kv_head)", "score_scale *= tl.load(kv_scale_ptr)", _FP8),
    (_KERNEL, "cap_in *= tl.load(kv_scale_ptr + kv_head)", "cap_in *= 1.0", _CASE + "_in_more_cases[cap, fp8]"),
    (_KERNEL, "tl.load(kv_scale_ptr + KV_HEADS + kv_head)", "tl.load(kv_scale_ptr + kv_head)", _FP8),
    (_KERNEL, "(value_scale / sum_M)", "(value_scale / (sum_M + 1.0))", _UNEVEN),
    (_KERNEL, "65504.0, tl.PropagateNan.ALL)", "65504.0)", _TEST + "test_a_query_that_is_not_a_number_is_seen"),
    # the product that is held back
    (
        _KERNEL,
        "        acc_MD = acc_MD * held_alpha_M[:, None]\n        acc_MD = tl.dot(held",
        "        acc_MD = tl.dot(held",
        _BULK,
    ),
    (_KERNEL, "            held_row = row\n", "", _BULK),
    (_KERNEL, "held_alpha_M = alpha_M", "held_alpha_M = 1.0 * held_alpha_M", _BULK),
    (_KERNEL, "if OVERLAP and main_key < main_end:", "if OVERLAP and main_key > main_end:", _BULK),
    (_KERNEL, "            acc_MD = acc_MD * alpha_M[:, None]\n", "", _NO_OVERLAP),
    # plan and launcher
    (_PLAN, "row = index * block_m", "row = index * block_m // 2", _PLANNED),
    (_PLAN, "position = (context - query)[sequence]", "position = (0 * context)[sequence]", _UNEVEN),
    (
        _PLAN,
        "starts = first_row + np.cumsum(query) - query",
        "starts = np.cumsum(query) - query",
        _PLANNED,
    ),
    (_LAUNCHER, "2 * scale * _LOG2E / soft_cap", "scale * _LOG2E / soft_cap", _CAP),
]
