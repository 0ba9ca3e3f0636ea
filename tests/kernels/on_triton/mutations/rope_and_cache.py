"""Breaks of ``rope_and_cache`` that its tests must notice."""

_KERNEL = "kernels/rope_and_cache/triton_kernel.py"
_TABLE = "kernels/rope_and_cache/rotation_table.py"
_LAUNCHER = "kernels/rope_and_cache/triton_gpu.py"
_TEST = "tests/kernels/on_triton/test_rope_and_cache.py"

MUTATIONS = [
    (_KERNEL, "head_exists = head < tl.where(is_q, H, K)", "head_exists = head < H + K", _TEST),
    (_KERNEL, "tl.where(is_q, 0, H + side * K)", "tl.where(is_q, 0, H + side)", _TEST),
    (_KERNEL, "token.to(tl.int64) * ROW_STRIDE", "token.to(tl.int64) * ((H + 2 * K) * D)", _TEST),
    (_KERNEL, "inside = head_exists[:, None] & (column < HALF)[None, :]", "inside = head_exists[:, None]", _TEST),
    (_KERNEL, "first.to(dtype), mask=inside & is_real", "first.to(dtype), mask=inside", _TEST),
    (_KERNEL, "first * cos - second * sin", "first * cos + second * sin", _TEST),
    (_KERNEL, "second * cos + first * sin", "second * cos + turned * sin", _TEST),
    (_KERNEL, "position.to(tl.int64) * (2 * HALF)", "position.to(tl.int64) * HALF", _TEST),
    (_KERNEL, "squares += tl.sum(rest * rest, axis=1)", "squares += 0.0", _TEST),
    (_KERNEL, "rest *= scale", "rest *= 1.0", _TEST),
    (_KERNEL, "((block * 2 + side) * K + head) * BLOCK_SIZE", "((block + side) * K + head) * BLOCK_SIZE", _TEST),
    (_KERNEL, "offset = slot % BLOCK_SIZE", "offset = slot % (BLOCK_SIZE - 1)", _TEST),
    (_KERNEL, "kv_scale_ptr + side * K + head", "kv_scale_ptr + head", _TEST),
    (_KERNEL, "-448.0, 448.0", "-500.0, 500.0", _TEST),
    (_LAUNCHER, "num_blocks * block_size, ", "num_blocks * block_size + 1, ", _TEST),
    (_LAUNCHER, '"positions", positions, table.shape[0]', '"positions", positions, table.numel()', _TEST),
    (_TABLE, "(angles.cos(), angles.sin())", "(angles.sin(), angles.cos())", _TEST),
]
