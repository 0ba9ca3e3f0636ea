"""The kernel of ``embed``; see triton_gpu.py."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["num_features"])
def embed_kernel(
    token_ids_ptr,
    sources_ptr,
    drawn_ptr,
    table_ptr,
    out_ptr,
    num_features,
    table_stride: tl.constexpr,
    out_stride: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    source = tl.load(sources_ptr + row)
    given = tl.load(token_ids_ptr + row)
    drawn = tl.load(drawn_ptr + tl.maximum(source, 0), mask=source >= 0, other=0)
    token = tl.where(source >= 0, drawn, given)
    feature = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = feature < num_features
    values = tl.load(table_ptr + token.to(tl.int64) * table_stride + feature, mask=inside, other=0.0)
    tl.store(out_ptr + row.to(tl.int64) * out_stride + feature, values, mask=inside)
