"""Breaks of ``decode_attention`` that its tests must notice."""

_PLAN = "kernels/decode_attention/plan_kernel.py"
_KERNEL = "kernels/decode_attention/triton_kernel.py"
_TEST = "tests/kernels/on_triton/test_decode_attention.py::"
_PLANS = _TEST + "test_plan_gives_every_tile_to_one_program_and_all_the_same"
_UNEVEN = _TEST + "test_lengths[uneven]"
_MIXED = _TEST + "test_several_query_tokens[mixed]"
_WINDOW = _TEST + "test_window[17-16]"
_FP8 = _TEST + "test_types[fp8, windowed, capped, 3 tokens]"
_ONE_LAUNCH = _TEST + "test_one_launch_serves_all_lengths"

MUTATIONS = [
    (_PLAN, "shift_B = lowest_B // TILE", "shift_B = 0 * lowest_B", _PLANS),
    (_PLAN, "end_B[None, :] <= run_first_P", "end_B[None, :] < run_first_P", _PLANS),
    (_PLAN, "first_B[None, :] < run_end_P", "first_B[None, :] <= run_end_P", _PLANS),
    (_PLAN, "(end_B - 1) // run - first_program_B + 1", "end_B // run - first_program_B + 1", _PLANS),
    (_PLAN, "tl.minimum(tl.cdiv(total, RESIDENT), LONG_RUN)", "LONG_RUN", _PLANS),
    (_KERNEL, "position_T[None, :] <= last_seen_M", "position_T[None, :] < last_seen_M", _UNEVEN),
    (_KERNEL, "position_T[None, :] > (last_seen_M - window)", "position_T[None, :] >= (last_seen_M - window)", _WINDOW),
    (_KERNEL, "place_T = tl.minimum(tl.maximum(position_T, lowest), last) %", "place_T = position_T %", _UNEVEN),
    (_KERNEL, "lowest = tl.maximum(context - query_len + 1 - window, 0)", "lowest = 0", _TEST + "test_window[17-32]"),
    (_KERNEL, "query_M < query_len", "query_M < query_len + 1", _MIXED),
    (_KERNEL, "context - query_len + tl.minimum(query_M", "context - 1 + tl.minimum(0 * query_M", _MIXED),
    (_KERNEL, "kv_head * GROUP + row_M % GROUP", "kv_head + row_M % GROUP", _UNEVEN),
    (_KERNEL, "block.to(tl.int64) * (2 * TO_V)", "block * (2 * TO_V)", _TEST + "test_offsets_past_two_to_the_31"),
    (_KERNEL, "v_ptr_TC = k_ptr_TC + TO_V", "v_ptr_TC = k_ptr_TC", _UNEVEN),
    (_KERNEL, "acc_MC *= fade_M[:, None]", "acc_MC *= 1.0", _ONE_LAUNCH),
    (_KERNEL, "sums_MT * fade_M[:, None] + weights_MT", "sums_MT + weights_MT", _ONE_LAUNCH),
    (_KERNEL, "(program == first_program)", "(program != first_program)", _UNEVEN),
    (_KERNEL, "most_M + tl.log2(sum_M)", "most_M", _UNEVEN),
    (_KERNEL, "first_tile = tl.maximum(run_first, seq_first)", "first_tile = seq_first", _UNEVEN),
    (_KERNEL, "row_ptr_M1 + 2 * column_C[None, :] + 1", "row_ptr_M1 + 2 * column_C[None, :]", _FP8),
    (_KERNEL, "(pair >> 8).to(tl.uint8)", "pair.to(tl.uint8)", _FP8),
    (_KERNEL, "kv_scale_ptr + NUM_KV_HEADS + kv_head", "kv_scale_ptr + kv_head", _FP8),
    (_KERNEL, "logit_scale *= 2.0 / cap", "logit_scale *= 1.0 / cap", _FP8),
    (_KERNEL, "q_most_M * logit_scale", "logit_scale + 0.0 * q_most_M", _FP8),
    (_KERNEL, "lse_P - new_most", "new_most - lse_P", _UNEVEN),
    (_KERNEL, "2 * (first_program + number_P)", "2 * (first_program + number_P) + 1", _UNEVEN),
    (_KERNEL, "(query_start + row // GROUP).to", "query_start.to", _MIXED),
]
