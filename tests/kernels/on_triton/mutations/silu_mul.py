"""Breaks of ``silu_mul`` that its tests must notice."""

_KERNEL = "kernels/silu_mul/triton_kernel.py"
_TEST = "tests/kernels/on_triton/test_silu_mul.py"

MUTATIONS = [
    (_KERNEL, "inside = column < I", "inside = column < I - 1", _TEST),
    (_KERNEL, "inside = column < I", "inside = column < I + 1", _TEST),
    (_KERNEL, "gate_up_ptr + row * GATE_UP_STRIDE", "gate_up_ptr + row * (2 * I)", _TEST),
    (_KERNEL, "out_ptr + row * OUT_STRIDE", "out_ptr + row * I", _TEST),
    (_KERNEL, "program % PARTS * BLOCK", "program % PARTS * (BLOCK - 1)", _TEST),
    (_KERNEL, "tl.load(gate_row + I,", "tl.load(gate_row,", _TEST),
    (_KERNEL, "tl.exp(-gate)", "tl.exp(gate)", _TEST),
]
