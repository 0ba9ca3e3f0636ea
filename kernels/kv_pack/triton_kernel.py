"""Triton kernels of kv_pack. See kv_pack.codec for the buffer, kv_pack.checksum for the sum, triton_gpu for launches.

The pool's planes (layer, K or V, head) of the box are counted in canonical order; ``plane`` is such a number.
"""

import triton
import triton.language as tl

from biphase.kernels.kv_pack import checksum, codec

START = tl.constexpr(checksum.START)
MUL_1 = tl.constexpr(checksum.MUL_1)
MUL_2 = tl.constexpr(checksum.MUL_2)
MUL_3 = tl.constexpr(checksum.MUL_3)
LEAST_AMAX = tl.constexpr(codec.LEAST_AMAX)
COARSE_STEP = tl.constexpr(codec.COARSE_STEP)
UNITS = tl.constexpr(float(codec.UNITS))
MOST_STEP = tl.constexpr(codec.MOST_STEP)
ROUND = tl.constexpr(1.5 * 2.0**23)  # a float32 that small numbers are rounded to integers by adding it

PER_CALL = ["token_start", "num_tokens", "layer_start", "head_start", "num_heads", "num_planes", "planes_per_program"]


@triton.jit
def weighted(position, word):
    """weight(position) * word mod 2^64; both 32 bits wide."""
    word = word.to(tl.uint32, bitcast=True)
    x = (position.to(tl.uint32) + START) * MUL_1
    x ^= x >> 15
    x *= MUL_2
    x ^= x >> 13
    y = (x ^ (x >> 16)) * MUL_3
    return x.to(tl.uint64) * word.to(tl.uint64) + ((y * word).to(tl.uint64) << 32)


@triton.jit
def plane_offset(plane, layer_start, head_start, num_heads, num_blocks, POOL_HEADS: tl.constexpr, RUN: tl.constexpr):
    """Where a plane of block 0 begins in the pool; ``RUN`` is the size of one head of one block."""
    layer = (layer_start + plane // (2 * num_heads)).to(tl.int64)
    row = plane // num_heads % 2 * POOL_HEADS + head_start + plane % num_heads
    return layer * num_blocks * (2 * POOL_HEADS * RUN) + row.to(tl.int64) * RUN


@triton.jit(do_not_specialize=[*PER_CALL, "num_blocks"], do_not_specialize_on_alignment=["block_table_ptr"])
def move_kernel(
    pool_ptr,  # words
    block_table_ptr,
    buffer_ptr,  # words
    total_ptr,
    token_start,
    num_tokens,
    layer_start,
    head_start,
    num_heads,
    num_planes,
    planes_per_program,
    num_blocks,
    PACK: tl.constexpr,
    POOL_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WORDS: tl.constexpr,  # of one token of one head
    CHUNK: tl.constexpr,  # largest power of two that divides WORDS
    TILE: tl.constexpr,  # words that a program moves at once
):
    """Copy between pool and buffer. A program has some rows of CHUNK words of a plane, and those of the planes after it."""
    ROWS: tl.constexpr = TILE // CHUNK
    PARTS: tl.constexpr = WORDS // CHUNK
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    num_rows = num_tokens * PARTS
    is_row = rows < num_rows
    token = token_start + rows // PARTS
    block = tl.load(block_table_ptr + token // BLOCK_SIZE, mask=is_row, other=0).to(tl.int64)
    in_plane = block * (2 * POOL_HEADS * BLOCK_SIZE * WORDS) + token % BLOCK_SIZE * WORDS + rows % PARTS * CHUNK
    columns = tl.arange(0, CHUNK)[None, :]
    mask = is_row[:, None]
    sums = tl.zeros((ROWS, CHUNK), tl.uint64)
    first_plane = tl.program_id(1) * planes_per_program
    for plane in range(first_plane, min(first_plane + planes_per_program, num_planes)):
        in_pool = plane_offset(plane, layer_start, head_start, num_heads, num_blocks, POOL_HEADS, BLOCK_SIZE * WORDS)
        pool = pool_ptr + in_pool + in_plane[:, None] + columns
        position = (plane * num_rows + rows)[:, None] * CHUNK + columns
        if PACK:
            words = tl.load(pool, mask=mask, other=0)
            tl.store(buffer_ptr + position, words, mask=mask)
        else:
            words = tl.load(buffer_ptr + position, mask=mask, other=0)
            tl.store(pool, words, mask=mask)
        sums += weighted(position, words)
    tl.atomic_add(total_ptr, tl.sum(tl.sum(sums, axis=1), axis=0).to(tl.int64, bitcast=True), sem="relaxed")


@triton.jit
def four_to_a_word(codes, DIM: tl.constexpr):
    """Words [DIM / 4] of bytes [DIM], given as uint32 of which the low 8 bits count."""
    shifts = (tl.arange(0, 4) * 8)[None, :]
    return tl.sum(tl.reshape(codes & 255, (DIM // 4, 4)) << shifts, axis=1).to(tl.uint32)


@triton.jit
def bytes_of(words, DIM: tl.constexpr):
    """The inverse."""
    shifts = (tl.arange(0, 4) * 8)[None, :]
    return tl.reshape((words[:, None] >> shifts) & 255, (DIM,))


@triton.jit(
    do_not_specialize=[*PER_CALL, "num_blocks", "num_spanned"], do_not_specialize_on_alignment=["block_table_ptr"]
)
def quantized_kernel(
    pool_ptr,
    block_table_ptr,
    buffer_ptr,  # words: codes, what describes each dim of a group, scales
    total_ptr,
    token_start,
    num_tokens,
    layer_start,
    head_start,
    num_heads,
    num_planes,
    planes_per_program,
    num_blocks,
    num_spanned,  # groups of a plane
    PACK: tl.constexpr,
    FP8: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BITS: tl.constexpr,
    LIMIT: tl.constexpr,
    MOST_SCALE: tl.constexpr,
    POOL_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    GROUP: tl.constexpr,  # tokens of a group: the block size of the pool that is, or was, packed
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,  # that part of HEAD_DIM, up to a power of two, which a program has
    PARTS: tl.constexpr,  # as many of them are there
):
    """Quantise from pool to buffer, or back. A program has one group, of one plane and those after it; or a part of its
    dims, where all of them are too many for its registers."""
    PER_WORD: tl.constexpr = 32 // BITS
    WORDS: tl.constexpr = HEAD_DIM // PER_WORD
    CODE: tl.constexpr = (1 << BITS) - 1
    index = tl.program_id(0)
    nth = token_start // GROUP + index
    slots = tl.arange(0, GROUP)
    token = nth * GROUP + slots - token_start  # of the box
    in_box = (token >= 0) & (token < num_tokens)
    is_token = in_box[:, None]
    part = tl.program_id(2)
    dims = part * DIM + tl.arange(0, DIM)[None, :]
    if GROUP == BLOCK_SIZE:
        block = tl.load(block_table_ptr + nth).to(tl.int64)
        in_block = block * (2 * POOL_HEADS * BLOCK_SIZE * HEAD_DIM) + (slots * HEAD_DIM)[:, None] + dims
    else:
        place = tl.maximum(token_start + token, 0)
        blocks = tl.load(block_table_ptr + place // BLOCK_SIZE, mask=in_box, other=0).to(tl.int64)
        rows = blocks * (2 * POOL_HEADS * BLOCK_SIZE * HEAD_DIM) + place % BLOCK_SIZE * HEAD_DIM
        in_block = rows[:, None] + dims
    is_value = is_token & (dims < HEAD_DIM)
    columns = part * (DIM // PER_WORD) + tl.arange(0, DIM // PER_WORD)[None, :]
    is_word = is_token & (columns < WORDS)
    shifts = (tl.arange(0, PER_WORD) * BITS)[None, None, :]
    quads = part * (DIM // 4) + tl.arange(0, DIM // 4)
    is_quad = quads < HEAD_DIM // 4
    # one sum per word, or per token where a large group leaves no registers for that
    PER_TOKEN: tl.constexpr = GROUP * DIM > 16384
    sums = tl.zeros((GROUP, 1 if PER_TOKEN else DIM // PER_WORD), tl.uint64)
    scale_sum = tl.zeros((1,), tl.uint64)
    is_first = tl.full((1,), 0, tl.int32) == part
    dim_sum = tl.zeros((DIM // 4,), tl.uint64)
    codes_end = num_planes * num_tokens * WORDS
    scales_start = codes_end + num_planes * num_spanned * (HEAD_DIM // 2) if RESIDUAL else codes_end
    first_plane = tl.program_id(1) * planes_per_program
    for plane in range(first_plane, min(first_plane + planes_per_program, num_planes)):
        in_pool = plane_offset(plane, layer_start, head_start, num_heads, num_blocks, POOL_HEADS, BLOCK_SIZE * HEAD_DIM)
        pool = pool_ptr + in_pool + in_block
        position = (plane * num_tokens + token)[:, None] * WORDS + columns
        scale_position = scales_start + plane * num_spanned + index + tl.zeros((1,), tl.int32)
        coarse_position = codes_end + (plane * num_spanned + index) * (HEAD_DIM // 2) + quads
        step_position = coarse_position + HEAD_DIM // 4
        if PACK:
            values = tl.load(pool, mask=is_value, other=0.0).to(tl.float32)
            amax = tl.maximum(tl.max(tl.max(tl.abs(values), axis=1), axis=0), LEAST_AMAX)
            for ahead in tl.static_range(1, PARTS):
                further = ((part + ahead) % PARTS - part) * DIM
                is_further = is_token & (dims + further < HEAD_DIM)
                others = tl.load(pool + further, mask=is_further, other=0.0).to(tl.float32)
                amax = tl.maximum(amax, tl.max(tl.max(tl.abs(others), axis=1), axis=0))
            limit = tl.full((1,), LIMIT, tl.float32)
            if RESIDUAL:
                units = tl.full((1,), UNITS, tl.float32)
                scale = tl.div_rn(amax, units)
                # clamps also keep products from being fused with the addition below
                scaled = tl.clamp(values * tl.div_rn(units, amax)[:, None], -UNITS, UNITS)
                highest = tl.max(tl.where(is_token, scaled, -UNITS), axis=0)
                lowest = tl.min(tl.where(is_token, scaled, UNITS), axis=0)
                rounded = (highest + lowest) * (0.5 / COARSE_STEP) + ROUND
                rest = scaled - ((rounded - ROUND) * COARSE_STEP)[None, :]
                width = tl.max(tl.where(is_token, tl.abs(rest), 0.0), axis=0)
                one = tl.full((DIM,), 1.0, tl.float32)
                step = tl.clamp(tl.ceil(width * (1.0 / LIMIT)), 1.0, MOST_STEP)
                scaled = tl.clamp(rest * tl.div_rn(one, step)[None, :], -LIMIT, LIMIT)
                coarse_words = four_to_a_word(rounded.to(tl.uint32, bitcast=True), DIM)
                step_words = four_to_a_word(step.to(tl.uint32), DIM)
                coarse_words = tl.where(is_quad, coarse_words, 0).to(tl.uint32)
                step_words = tl.where(is_quad, step_words, 0).to(tl.uint32)
                tl.store(buffer_ptr + coarse_position, coarse_words.to(tl.int32, bitcast=True), mask=is_quad)
                tl.store(buffer_ptr + step_position, step_words.to(tl.int32, bitcast=True), mask=is_quad)
            else:
                scale = tl.div_rn(amax, limit)
                scaled = tl.clamp(values * tl.div_rn(limit, amax)[:, None], -LIMIT, LIMIT)
            scale = tl.where((scale > MOST_SCALE) & (scale < float("inf")), MOST_SCALE, scale)
            if FP8:
                codes = scaled.to(tl.float8e4nv).to(tl.uint8, bitcast=True).to(tl.uint32)
            else:
                codes = (scaled + ROUND).to(tl.uint32, bitcast=True) & CODE
            words = tl.sum(tl.reshape(codes, (GROUP, DIM // PER_WORD, PER_WORD)) << shifts, axis=2)
            words = tl.where(is_word, words, 0).to(tl.uint32)
            scale_word = scale.to(tl.uint32, bitcast=True)
            tl.store(buffer_ptr + position, words.to(tl.int32, bitcast=True), mask=is_word)
            tl.store(buffer_ptr + scale_position, scale_word.to(tl.int32, bitcast=True), mask=is_first)
        else:
            words = tl.load(buffer_ptr + position, mask=is_word, other=0).to(tl.uint32, bitcast=True)
            scale_word = tl.load(buffer_ptr + scale_position).to(tl.uint32, bitcast=True)
            codes = tl.reshape((words[:, :, None] >> shifts) & CODE, (GROUP, DIM))
            if FP8:
                values = codes.to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float32)
            else:
                SIGN: tl.constexpr = 1 << (BITS - 1)
                whole = (codes ^ SIGN).to(tl.int32) - SIGN
                if RESIDUAL:
                    coarse_words = tl.load(buffer_ptr + coarse_position, mask=is_quad, other=0)
                    step_words = tl.load(buffer_ptr + step_position, mask=is_quad, other=0)
                    coarse_words = coarse_words.to(tl.uint32, bitcast=True)
                    step_words = step_words.to(tl.uint32, bitcast=True)
                    coarse = (bytes_of(coarse_words, DIM) ^ 128).to(tl.int32) - 128
                    step = bytes_of(step_words, DIM).to(tl.int32)
                    whole = whole * step[None, :] + (coarse * COARSE_STEP)[None, :]
                values = whole.to(tl.float32)
                if RESIDUAL:
                    values = tl.clamp(values, -UNITS, UNITS)
            values *= scale_word.to(tl.float32, bitcast=True)[:, None]
            tl.store(pool, values.to(pool_ptr.dtype.element_ty), mask=is_value)
        products = weighted(position, words)
        sums += tl.sum(products, axis=1, keep_dims=True) if PER_TOKEN else products
        scale_sum += tl.where(is_first, weighted(scale_position, scale_word), 0)
        if RESIDUAL:
            dim_sum += weighted(coarse_position, coarse_words) + weighted(step_position, step_words)
    total = tl.sum(tl.sum(sums, axis=1), axis=0) + tl.sum(scale_sum, axis=0)
    if RESIDUAL:
        total += tl.sum(dim_sum, axis=0)
    tl.atomic_add(total_ptr, total.to(tl.int64, bitcast=True), sem="relaxed")
