"""The kernel of ``fill``; see torch_blocks.py for what it computes."""

import triton
import triton.language as tl


@triton.jit
def _mix(x):
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit(do_not_specialize=["key_low", "key_high", "first", "width", "pitch"])
def fill_kernel(
    out_ptr,  # [rows, width] contiguous
    key_low,
    key_high,
    first,
    width,
    pitch,
    step,
    BLOCK: tl.constexpr,
):
    # grid: (rows * blocks of width,)
    blocks = (width + BLOCK - 1) // BLOCK
    row = tl.program_id(0).to(tl.int64) // blocks
    column = (tl.program_id(0).to(tl.int64) % blocks) * BLOCK + tl.arange(0, BLOCK)
    index = first.to(tl.int64) + row * pitch + column
    mixed = _mix(index.to(tl.uint32) ^ key_low.to(tl.uint32))
    mixed = _mix(mixed ^ ((index >> 32).to(tl.uint32) + key_high.to(tl.uint32)))
    value = ((mixed >> 8).to(tl.int32) - 0x800000).to(tl.float32) * step
    tl.store(out_ptr + row * width + column, value.to(out_ptr.dtype.element_ty), mask=column < width)
