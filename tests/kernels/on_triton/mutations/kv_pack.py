"""Breaks of ``pack`` and ``unpack`` that their tests must notice."""

_KERNEL = "kernels/kv_pack/triton_kernel.py"
_LAUNCHER = "kernels/kv_pack/triton_gpu.py"
_TEST = "tests/kernels/on_triton/test_kv_pack.py"

MUTATIONS = [
    # the sum
    (_KERNEL, "x ^= x >> 15", "x ^= x >> 14", _TEST),
    (_KERNEL, "+ ((y * word)", "- ((y * word)", _TEST),
    # where planes begin
    (_KERNEL, "plane // num_heads % 2 * POOL_HEADS", "plane // num_heads % 2 * num_heads", _TEST),
    (_KERNEL, "+ head_start + plane % num_heads", "+ plane % num_heads", _TEST),
    (_KERNEL, "(layer_start + plane // (2 * num_heads)).to(tl.int64)", "(plane // (2 * num_heads)).to(tl.int64)", _TEST),
    (_KERNEL, "(layer_start + plane // (2 * num_heads)).to(tl.int64)", "(layer_start + plane // (2 * num_heads))", _TEST),
    # raw
    (_KERNEL, "is_row = rows < num_rows", "is_row = rows < num_rows - 1", _TEST),
    (_KERNEL, "mask=is_row, other=0).to(tl.int64)", "mask=is_row, other=0)", _TEST),
    (_KERNEL, "token % BLOCK_SIZE * WORDS", "rows // PARTS % BLOCK_SIZE * WORDS", _TEST),
    (_KERNEL, "rows % PARTS * CHUNK", "rows % PARTS", _TEST),
    (_KERNEL, "position = (plane * num_rows + rows)", "position = (plane * num_tokens + rows)", _TEST),
    # quantised
    (_KERNEL, "block = tl.load(block_table_ptr + nth).to(tl.int64)", "block = tl.load(block_table_ptr + nth)", _TEST),
    (_KERNEL, "(token >= 0) & (token < num_tokens)", "(token > 0) & (token < num_tokens)", _TEST),
    (_KERNEL, "(token >= 0) & (token < num_tokens)", "(token >= 0) & (token < num_tokens - 1)", _TEST),
    (_KERNEL, "is_token & (dims < HEAD_DIM)", "is_token & (dims < HEAD_DIM - 1)", _TEST),
    (_KERNEL, "is_token & (columns < WORDS)", "is_token & (columns <= WORDS)", _TEST),
    (_KERNEL, "scales_start + plane * num_spanned + index", "scales_start + plane * num_spanned", _TEST),
    (_KERNEL, "tl.max(tl.abs(values), axis=1)", "tl.max(values, axis=1)", _TEST),
    (_KERNEL, "tl.div_rn(limit, amax)", "tl.div_rn(limit - 1, amax)", _TEST),
    (_KERNEL, "tl.div_rn(units, amax)", "tl.div_rn(units - 1, amax)", _TEST),
    (_KERNEL, "(codes ^ SIGN).to(tl.int32) - SIGN", "codes.to(tl.int32)", _TEST),
    (_KERNEL, "values *= scale_word", "values /= scale_word", _TEST),
    (_KERNEL, "tl.where(is_first, weighted(scale_position,", "tl.where(is_first, weighted(plane + 0 * scale_position,", _TEST),
    # int4's coarse values and steps
    (_KERNEL, "tl.where(is_token, scaled, -UNITS)", "scaled", _TEST),
    (_KERNEL, "tl.where(is_token, scaled, UNITS)", "tl.where(is_token, scaled, 0.0)", _TEST),
    (_KERNEL, "(0.5 / COARSE_STEP)", "(0.5 / COARSE_STEP + 0.001)", _TEST),
    (_KERNEL, "tl.where(is_token, tl.abs(rest), 0.0)", "tl.where(is_token, rest, 0.0)", _TEST),
    (_KERNEL, "tl.ceil(width * (1.0 / LIMIT))", "tl.floor(width * (1.0 / LIMIT))", _TEST),
    (_KERNEL, "step_position = coarse_position + HEAD_DIM // 4", "step_position = coarse_position + DIM // 4", _TEST),
    (_KERNEL, "(plane * num_spanned + index) * (HEAD_DIM // 2)", "(plane * num_spanned) * (HEAD_DIM // 2)", _TEST),
    (_KERNEL, "is_quad = quads < HEAD_DIM // 4", "is_quad = quads < DIM // 4", _TEST),
    (_KERNEL, "(bytes_of(coarse_words, DIM) ^ 128).to(tl.int32) - 128", "bytes_of(coarse_words, DIM).to(tl.int32)", _TEST),
    (_KERNEL, "+ (coarse * COARSE_STEP)[None, :]", "+ coarse[None, :]", _TEST),
    (_KERNEL, "        total += tl.sum(dim_sum, axis=0)", "        total += 0", _TEST),
    # the ends of the range
    (_KERNEL, "values = tl.clamp(values, -UNITS, UNITS)", "values = values", _TEST),
    (_KERNEL, "(scale > MOST_SCALE) & (scale < float", "(scale < 0) & (scale < float", _TEST),
    # halves of a group
    (_KERNEL, "((part + ahead) % PARTS - part) * DIM", "0 * ahead", _TEST),
    (_KERNEL, "dims + further < HEAD_DIM", "dims < HEAD_DIM", _TEST),
    (_KERNEL, "tl.where(is_first, weighted(scale_position, scale_word), 0)", "weighted(scale_position, scale_word)", _TEST),
    (_KERNEL, "columns = part * (DIM // PER_WORD) +", "columns =", _TEST),
    (_KERNEL, "quads = part * (DIM // 4) +", "quads =", _TEST),
    # groups of another block size
    (_KERNEL, "place // BLOCK_SIZE, mask", "nth + 0 * place, mask", _TEST),
    (_KERNEL, "place % BLOCK_SIZE * HEAD_DIM", "slots * HEAD_DIM", _TEST),
    # the launcher
    (_LAUNCHER, "spanned = len(blocks_of(packed, box))", "spanned = len(blocks_of(layout, box))", _TEST),
    (_LAUNCHER, "    total.zero_()\n", "", _TEST),
    (_LAUNCHER, "(tiles, -(-planes // each))", "(tiles, planes // each)", _TEST),
]  # fmt: skip
