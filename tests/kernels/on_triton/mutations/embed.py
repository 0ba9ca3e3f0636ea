"""Breaks of ``embed`` that its tests must notice."""

_KERNEL = "kernels/embed/triton_kernel.py"
_TEST = "tests/kernels/on_triton/test_embed.py"

MUTATIONS = [
    (_KERNEL, "inside = feature < num_features", "inside = feature < num_features - 1", _TEST),
    (_KERNEL, "tl.where(source >= 0, drawn, given)", "given", _TEST),
    (_KERNEL, "token.to(tl.int64) * table_stride", "token.to(tl.int64) * (table_stride + 1)", _TEST),
]
