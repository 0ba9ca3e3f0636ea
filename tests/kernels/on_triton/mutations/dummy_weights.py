"""Breaks of ``fill`` that its tests must notice."""

_KERNEL = "kernels/dummy_weights/triton_kernel.py"
_TEST = "tests/kernels/on_triton/test_dummy_weights.py"
_BITS = f"{_TEST}::test_both_backends_equal_the_reference_bit_for_bit"

MUTATIONS = [
    (_KERNEL, "return x ^ (x >> 16)", "return x", _BITS),
    (_KERNEL, "(index >> 32).to(tl.uint32) + key_high", "key_high", _BITS),
    (_KERNEL, "row * pitch + column\n", "row * width + column\n", f"{_TEST}::test_slices_equal_the_whole"),
    (_KERNEL, "- 0x800000", "- 0x7FFFFF", _BITS),
    (_KERNEL, "mask=column < width)", "mask=column < width - 1)", _BITS),
]
