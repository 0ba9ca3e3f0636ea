"""Breaks of the experts' kernels that their tests must notice."""

_KERNEL = "kernels/moe/triton_kernel.py"
_TEST = "tests/kernels/on_triton/test_moe.py"
_ROUTING = f"{_TEST}::test_routing"
_TIES = f"{_TEST}::test_equal_logits_go_to_the_lower_expert"
_PADDING = f"{_TEST}::test_padding_tokens_take_no_expert"
_BROKEN = f"{_TEST}::test_broken_logits_break_that_token_only"
_IDLE = f"{_TEST}::test_feed_forward_with_idle_experts_and_padding"
_PRODUCTS = f"{_TEST}::test_feed_forward"
_ALL_PADDING = f"{_TEST}::test_a_step_of_padding_alone"

# fmt: off
MUTATIONS = [
    # routing: choices and weights
    (_KERNEL, "chosen = tl.min(tl.where(highest, expert, EP), axis=1)", "chosen = tl.max(tl.where(highest, expert, -1), axis=1)", _TIES),
    (_KERNEL, "tl.where(given == 0.0, 0.0, given)", "given", _TIES),
    (_KERNEL, "bits ^ ((bits >> 31) & 0x7FFFFFFF)", "bits", _ROUTING),
    (_KERNEL, "counted = tl.where(taken, counted, float(\"-inf\"))", "counted = counted", _ROUTING),
    (_KERNEL, "tl.where(broken[:, None], float(\"nan\"), weights)", "weights", _BROKEN),
    (_KERNEL, "return (taken & real[:, None]).to(tl.int32), choice", "return taken.to(tl.int32), choice", _PADDING),
    (_KERNEL, "tl.store(ids_ptr + token * K + j, tl.where(real, chosen, -1), mask=inside)", "tl.store(ids_ptr + token * K + j, chosen, mask=inside)", _PADDING),
    # routing: the grouping
    (_KERNEL, "starts = ends - counts\n", "starts = ends\n", _ROUTING),
    (_KERNEL, "tiles = (counts + TILE_ROWS - 1) // TILE_ROWS", "tiles = counts // TILE_ROWS", _ROUTING),
    (_KERNEL, "(tile_ends[None, :] <= tile[:, None])", "(tile_ends[None, :] < tile[:, None])", _ROUTING),
    (_KERNEL, "shifts = starts - (tile_ends - tiles) * TILE_ROWS", "shifts = starts - tile_ends * TILE_ROWS", _ROUTING),
    (_KERNEL, "pair = tl.arange(0, BT)[:, None] * K + choice", "pair = tl.arange(0, BT)[:, None] * K", _ROUTING),
    (_KERNEL, "pair = (block * BT + tl.arange(0, BT))[:, None] * K + choice", "pair = tl.arange(0, BT)[:, None] * K + choice", _ROUTING),
    (_KERNEL, "before = counts[None, :] + tl.cumsum(here, axis=0) - here", "before = counts[None, :] + tl.cumsum(here, axis=0)", _ROUTING),
    (_KERNEL, "tl.store(pairs_ptr + start + before + rank, pair, mask=placed)", "tl.store(pairs_ptr + start + rank, pair, mask=placed)", _ROUTING),
    # products
    (_KERNEL, "if tile >= tl.load(num_tiles_ptr):", "if tile > tl.load(num_tiles_ptr):", _ALL_PADDING),
    (_KERNEL, "inside = place < tl.load(starts_ptr + expert + 1)", "inside = place >= first", _PRODUCTS),
    (_KERNEL, "x_row = pair // K if FROM_TOKENS", "x_row = pair if FROM_TOKENS", _PRODUCTS),
    (_KERNEL, "tl.where(inside, place, first)", "tl.where(inside, pair, first)", _PRODUCTS),
    (_KERNEL, "matrix = w_ptr + expert.to(tl.int64) * ((2 if GATED else 1) * O * I)", "matrix = w_ptr + expert.to(tl.int64) * (O * I)", _PRODUCTS),
    (_KERNEL, "w_up = tl.load(w_at + O * I, mask=(start + k < I)[None, :], other=0.0)", "w_up = tl.load(w_at + O * I)", _PRODUCTS),
    (_KERNEL, "total = total / (1.0 + tl.exp(-total)) * up", "total = total / (1.0 + tl.exp(total)) * up", _PRODUCTS),
    (_KERNEL, "out_row = (place if FROM_TOKENS else pair).to(tl.int64)", "out_row = place.to(tl.int64)", _PRODUCTS),
    (_KERNEL, "mask=inside[:, None] & (column < O)[None, :])", "mask=inside[:, None])", _PRODUCTS),
    # their sum
    (_KERNEL, "mask=(column < F) & placed, other=0.0)", "mask=column < F, other=0.0)", _IDLE),
    (_KERNEL, "total += tl.load(weights_ptr + pair) * row.to(tl.float32)", "total += row.to(tl.float32)", _PRODUCTS),
    (_KERNEL, "tl.store(out_ptr + token * OUT_STRIDE + column", "tl.store(out_ptr + token * F + column", _PRODUCTS),
]
# fmt: on
