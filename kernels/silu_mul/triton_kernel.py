"""The kernel of ``silu_mul``; see triton_gpu.py."""

import triton
import triton.language as tl
from triton.language.extra import cuda


@triton.jit
def silu_mul_kernel(
    gate_up_ptr,  # [N, 2 I]: gate, then up
    out_ptr,  # [N, I]
    GATE_UP_STRIDE: tl.constexpr,
    OUT_STRIDE: tl.constexpr,
    I: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    # grid: (N * parts of a row,), the parts of one row beside each other; flat, as a second axis ends at 65535
    PARTS: tl.constexpr = (I + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    row = (program // PARTS).to(tl.int64)
    column = program % PARTS * BLOCK + tl.arange(0, BLOCK)
    inside = column < I
    if PDL:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()
    gate_row = gate_up_ptr + row * GATE_UP_STRIDE + column
    gate = tl.load(gate_row, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_row + I, mask=inside, other=0.0).to(tl.float32)
    out = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out_ptr + row * OUT_STRIDE + column, out.to(out_ptr.dtype.element_ty), mask=inside)
