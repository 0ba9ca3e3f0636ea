"""Breaks of ``rms_norm`` and ``add_rms_norm`` that their tests must notice."""

_KERNEL = "kernels/rms_norm/triton_kernel.py"
_TEST = "tests/kernels/on_triton/test_rms_norm.py"

MUTATIONS = [
    (_KERNEL, "inside = column < F", "inside = column < F + 1", _TEST),
    (_KERNEL, "inside = column < F", "inside = column < F - 1", _TEST),
    (_KERNEL, "x_ptr + row * X_STRIDE", "x_ptr + row * F", _TEST),
    (_KERNEL, "out_ptr + row * OUT_STRIDE", "out_ptr + row * F", _TEST),
    (_KERNEL, "residual_ptr + row * RESIDUAL_STRIDE", "residual_ptr + row * F", _TEST),
    (_KERNEL, "total = x + tl.load", "total = x - tl.load", _TEST),
    (_KERNEL, "x = rounded.to(tl.float32)", "x = total", _TEST),
    (_KERNEL, "* (1.0 / F) + eps", "* (1.0 / BLOCK) + eps", _TEST),
    (_KERNEL, "* (1.0 / F) + eps", "* (1.0 / F)", _TEST),
    (_KERNEL, "out = x * scale * weight", "out = x * scale", _TEST),
]
