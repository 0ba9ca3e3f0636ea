"""The kernel of ``rms_norm`` and ``add_rms_norm``; see triton_gpu.py."""

import triton
import triton.language as tl
from triton.language.extra import cuda


@triton.jit
def rms_norm_kernel(
    x_ptr,  # [N, F]
    residual_ptr,  # [N, F], or None: nothing to add
    weight_ptr,  # [F]
    out_ptr,  # [N, F], may be x
    eps,
    X_STRIDE: tl.constexpr,
    RESIDUAL_STRIDE: tl.constexpr,
    OUT_STRIDE: tl.constexpr,
    F: tl.constexpr,
    BLOCK: tl.constexpr,  # F, up to a power of two
    PDL: tl.constexpr,
):
    # grid: (N,), a row each: it stays in registers between the sum over it and its scaling
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < F
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    if PDL:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()
    x = tl.load(x_ptr + row * X_STRIDE + column, mask=inside, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        residual_row = residual_ptr + row * RESIDUAL_STRIDE + column
        total = x + tl.load(residual_row, mask=inside, other=0.0).to(tl.float32)
        rounded = total.to(residual_ptr.dtype.element_ty)
        tl.store(residual_row, rounded, mask=inside)
        x = rounded.to(tl.float32)  # what later layers will see of it
    scale = tl.rsqrt(tl.sum(x * x, axis=0) * (1.0 / F) + eps)
    out = x * scale * weight
    tl.store(out_ptr + row * OUT_STRIDE + column, out.to(out_ptr.dtype.element_ty), mask=inside)
