"""The kernels of routing and of the products by expert; see triton_gpu.py and routing.py.

BT tokens of a program, E experts (EP: up to a power of two), K of them per token.
"""

import triton
import triton.language as tl

_NOT_A_KEY = tl.constexpr(-(2**31))  # below the key of any expert, of one whose logit is -inf too


@triton.jit
def _is_nan(x):
    return x != x  # noqa: PLR0124


@triton.jit
def _choose(
    logits_ptr, slots_ptr, weights_ptr, ids_ptr, first, num_tokens, stride,
    E: tl.constexpr, EP: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, RENORMALIZE: tl.constexpr,
):  # fmt: skip
    """Writes ids and weights of BT tokens; returns whether a token takes an expert, and as which choice, both [BT, EP]."""
    token = first + tl.arange(0, BT)
    expert = tl.arange(0, EP)[None, :]
    inside = token < num_tokens
    real = inside
    if slots_ptr is not None:
        real = inside & (tl.load(slots_ptr + token, mask=inside, other=-1) >= 0)
    at = logits_ptr + token.to(tl.int64)[:, None] * stride + expert
    asked = real[:, None] & (expert < E)
    # integers that rise with the logits; NaN counts as -inf, -0.0 as 0.0
    given = tl.load(at, mask=asked, other=float("-inf")).to(tl.float32)
    bits = tl.where(_is_nan(given), float("-inf"), tl.where(given == 0.0, 0.0, given)).to(tl.int32, bitcast=True)
    keys = tl.where(expert < E, bits ^ ((bits >> 31) & 0x7FFFFFFF), _NOT_A_KEY)
    choice = tl.full([BT, EP], -1, tl.int32)
    for j in range(K):
        highest = keys == tl.max(keys, axis=1)[:, None]
        chosen = tl.min(tl.where(highest, expert, EP), axis=1)
        tl.store(ids_ptr + token * K + j, tl.where(real, chosen, -1), mask=inside)
        best = expert == chosen[:, None]
        choice = tl.where(best, j, choice)
        keys = tl.where(best, _NOT_A_KEY, keys)
    taken = choice >= 0
    # read again: kept in registers through the loop, they would spill
    given = tl.load(at, mask=asked, other=float("-inf")).to(tl.float32)
    counted = tl.where(_is_nan(given), float("-inf"), given)
    if RENORMALIZE:
        counted = tl.where(taken, counted, float("-inf"))
    likely = tl.exp(counted - tl.max(counted, axis=1)[:, None])
    weights = likely / tl.sum(likely, axis=1)[:, None]
    broken = tl.max(_is_nan(given).to(tl.int32), axis=1) > 0
    weights = tl.where(broken[:, None], float("nan"), weights)
    pair = token[:, None] * K + choice
    tl.store(weights_ptr + pair, tl.where(real[:, None], weights, 0.0), mask=taken & inside[:, None])
    return (taken & real[:, None]).to(tl.int32), choice


@triton.jit
def _lay_out(
    counts, starts_ptr, tile_experts_ptr, tile_firsts_ptr, num_tiles_ptr,
    E: tl.constexpr, EP: tl.constexpr, TILE_ROWS: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Where each expert's pairs begin, and the tiles, from the ``counts`` [EP]; returns the starts."""
    expert = tl.arange(0, EP)
    ends = tl.cumsum(counts, axis=0)
    starts = ends - counts
    tl.store(starts_ptr + 1 + expert, ends, mask=expert < E)
    tl.store(starts_ptr + expert, starts, mask=expert == 0)
    tiles = (counts + TILE_ROWS - 1) // TILE_ROWS
    tile_ends = tl.cumsum(tiles, axis=0)
    # of an expert's tile t the first place is starts + (t - its first tile) * TILE_ROWS
    shifts = starts - (tile_ends - tiles) * TILE_ROWS
    num_tiles = tl.sum(tiles, axis=0)
    tl.store(num_tiles_ptr, num_tiles)
    for first in range(0, num_tiles, BLOCK_T):
        tile = first + tl.arange(0, BLOCK_T)
        owner = tl.sum((tile_ends[None, :] <= tile[:, None]).to(tl.int32), axis=1)
        shift = tl.sum(tl.where(expert[None, :] == owner[:, None], shifts[None, :], 0), axis=1)
        tl.store(tile_experts_ptr + tile, owner, mask=tile < num_tiles)
        tl.store(tile_firsts_ptr + tile, shift + tile * TILE_ROWS, mask=tile < num_tiles)
    return starts


@triton.jit(do_not_specialize=["num_tokens"])
def route_at_once_kernel(
    logits_ptr,  # [N, E]
    slots_ptr,  # [N] int64 or None; below 0: the token takes no experts
    weights_ptr, ids_ptr, pairs_ptr, starts_ptr, tile_experts_ptr, tile_firsts_ptr, num_tiles_ptr,  # of the Routing
    num_tokens,
    STRIDE: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, K: tl.constexpr, BT: tl.constexpr,
    RENORMALIZE: tl.constexpr, TILE_ROWS: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    # grid: (1,), for steps of up to BT tokens
    taken, choice = _choose(
        logits_ptr, slots_ptr, weights_ptr, ids_ptr, 0, num_tokens, STRIDE, E, EP, K, BT, RENORMALIZE
    )
    starts = _lay_out(
        tl.sum(taken, axis=0), starts_ptr, tile_experts_ptr, tile_firsts_ptr, num_tiles_ptr, E, EP, TILE_ROWS, BLOCK_T
    )
    rank = tl.cumsum(taken, axis=0) - taken
    pair = tl.arange(0, BT)[:, None] * K + choice
    tl.store(pairs_ptr + starts[None, :] + rank, pair, mask=taken > 0)


@triton.jit(do_not_specialize=["num_tokens"])
def choose_kernel(
    logits_ptr, slots_ptr, weights_ptr, ids_ptr,
    ranks_ptr,  # [P]
    block_counts_ptr,  # [blocks, E]
    num_tokens,
    STRIDE: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, K: tl.constexpr, BT: tl.constexpr,
    RENORMALIZE: tl.constexpr,
):  # fmt: skip
    # grid: (blocks of BT tokens,)
    block = tl.program_id(0)
    taken, choice = _choose(
        logits_ptr, slots_ptr, weights_ptr, ids_ptr, block * BT, num_tokens, STRIDE, E, EP, K, BT, RENORMALIZE
    )
    rank = tl.cumsum(taken, axis=0) - taken
    pair = (block * BT + tl.arange(0, BT))[:, None] * K + choice
    tl.store(ranks_ptr + pair, rank, mask=taken > 0)
    expert = tl.arange(0, EP)
    tl.store(block_counts_ptr + block * E + expert, tl.sum(taken, axis=0), mask=expert < E)


@triton.jit(do_not_specialize=["num_blocks"])
def lay_out_kernel(
    block_counts_ptr,  # [blocks, E]: becomes the pairs before each block's
    starts_ptr, tile_experts_ptr, tile_firsts_ptr, num_tiles_ptr,
    num_blocks,
    E: tl.constexpr, EP: tl.constexpr, TILE_ROWS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    # grid: (1,)
    expert = tl.arange(0, EP)[None, :]
    counts = tl.zeros([EP], tl.int32)
    for first in range(0, num_blocks, BLOCK_B):
        block = first + tl.arange(0, BLOCK_B)[:, None]
        inside = (block < num_blocks) & (expert < E)
        here = tl.load(block_counts_ptr + block * E + expert, mask=inside, other=0)
        before = counts[None, :] + tl.cumsum(here, axis=0) - here
        tl.store(block_counts_ptr + block * E + expert, before, mask=inside)
        counts += tl.sum(here, axis=0)
    _lay_out(counts, starts_ptr, tile_experts_ptr, tile_firsts_ptr, num_tiles_ptr, E, EP, TILE_ROWS, BLOCK_T)


@triton.jit(do_not_specialize=["num_pairs"])
def place_kernel(
    ids_ptr, ranks_ptr, block_counts_ptr, starts_ptr, pairs_ptr, num_pairs,
    E: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # grid: (blocks of BLOCK pairs,)
    pair = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    expert = tl.load(ids_ptr + pair, mask=pair < num_pairs, other=-1)
    placed = expert >= 0
    before = tl.load(block_counts_ptr + pair // (K * BT) * E + expert, mask=placed, other=0)
    start = tl.load(starts_ptr + expert, mask=placed, other=0)
    rank = tl.load(ranks_ptr + pair, mask=placed, other=0)
    tl.store(pairs_ptr + start + before + rank, pair, mask=placed)


@triton.jit(do_not_specialize=["max_tiles"])
def grouped_product_kernel(
    x_ptr,  # FROM_TOKENS: [N, I], else [P, I] in the order of sorted_pairs
    w_ptr,  # [E, O, I]; GATED: [E, 2 * O, I], gate above up
    out_ptr,  # FROM_TOKENS: [P, O] in the order of sorted_pairs, else [P, O] by pair
    pairs_ptr, starts_ptr, tile_experts_ptr, tile_firsts_ptr, num_tiles_ptr,
    max_tiles,
    X_STRIDE: tl.constexpr, OUT_STRIDE: tl.constexpr, O: tl.constexpr, I: tl.constexpr, K: tl.constexpr,
    FROM_TOKENS: tl.constexpr, GATED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    # grid: (max_tiles * blocks of O,). GROUP_M tiles go through all columns together: their x stays in the L2 cache,
    # and of the weights each block is read from memory once for all of an expert's tiles among them
    COLUMNS: tl.constexpr = (O + BLOCK_N - 1) // BLOCK_N
    pid = tl.program_id(0)
    group = pid // (GROUP_M * COLUMNS)
    height = tl.minimum(max_tiles - group * GROUP_M, GROUP_M)
    within = pid - group * (GROUP_M * COLUMNS)
    tile = group * GROUP_M + within % height
    if tile >= tl.load(num_tiles_ptr):
        return
    expert = tl.load(tile_experts_ptr + tile)
    first = tl.load(tile_firsts_ptr + tile)
    place = first + tl.arange(0, BLOCK_M)
    inside = place < tl.load(starts_ptr + expert + 1)
    pair = tl.load(pairs_ptr + place, mask=inside, other=0)
    # rows and columns past the end repeat a real one, so that loads need no mask; what comes of them is not stored
    x_row = pair // K if FROM_TOKENS else tl.where(inside, place, first)
    column = within // height * BLOCK_N + tl.arange(0, BLOCK_N)
    w_row = tl.where(column < O, column, 0)
    k = tl.arange(0, BLOCK_K)
    x_at = x_ptr + x_row.to(tl.int64)[:, None] * X_STRIDE + k[None, :]
    matrix = w_ptr + expert.to(tl.int64) * ((2 if GATED else 1) * O * I)
    w_at = matrix + w_row.to(tl.int64)[:, None] * I + k[None, :]
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if GATED:
        up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, I, BLOCK_K):
        if I % BLOCK_K == 0:
            x = tl.load(x_at)
            w = tl.load(w_at)
        else:
            x = tl.load(x_at, mask=(start + k < I)[None, :], other=0.0)
            w = tl.load(w_at, mask=(start + k < I)[None, :], other=0.0)
        total = tl.dot(x, w.T, total, input_precision="ieee")
        if GATED:
            if I % BLOCK_K == 0:
                w_up = tl.load(w_at + O * I)
            else:
                w_up = tl.load(w_at + O * I, mask=(start + k < I)[None, :], other=0.0)
            up = tl.dot(x, w_up.T, up, input_precision="ieee")
        x_at += BLOCK_K
        w_at += BLOCK_K
    if GATED:
        total = total / (1.0 + tl.exp(-total)) * up
    out_row = (place if FROM_TOKENS else pair).to(tl.int64)
    out_at = out_ptr + out_row[:, None] * OUT_STRIDE + column[None, :]
    tl.store(out_at, total.to(out_ptr.dtype.element_ty), mask=inside[:, None] & (column < O)[None, :])


@triton.jit
def combine_kernel(
    rows_ptr,  # [P, F] by pair
    weights_ptr,  # [N, k]
    ids_ptr,  # [N, k]
    out_ptr,  # [N, F]
    ROWS_STRIDE: tl.constexpr, OUT_STRIDE: tl.constexpr, F: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # grid: (N, blocks of F)
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for j in tl.static_range(K):
        pair = token * K + j
        placed = tl.load(ids_ptr + pair) >= 0
        row = tl.load(rows_ptr + pair * ROWS_STRIDE + column, mask=(column < F) & placed, other=0.0)
        total += tl.load(weights_ptr + pair) * row.to(tl.float32)
    tl.store(out_ptr + token * OUT_STRIDE + column, total.to(out_ptr.dtype.element_ty), mask=column < F)
