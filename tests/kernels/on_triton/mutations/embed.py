"""Breaks of ``embed`` that its tests must notice."""

_KERNEL = "kernels/embed/triton_kernel.py"
_LAUNCHER = "kernels/embed/triton_gpu.py"
_CHECK = "kernels/gpu/table_check.py"
_TEST = "tests/kernels/on_triton/test_embed.py"

MUTATIONS = [
    (_KERNEL, "inside = feature < num_features", "inside = feature < num_features - 1", _TEST),
    (_KERNEL, "tl.where(source >= 0, drawn, given)", "given", _TEST),
    (_KERNEL, "token.to(tl.int64) * table_stride", "token.to(tl.int64) * (table_stride + 1)", _TEST),
    (_LAUNCHER, "where=~from_drawn", "where=None", _TEST),
    (_LAUNCHER, "sources[from_drawn].long()", "sources[~from_drawn].long()", _TEST),
    (_CHECK, "(values >= end)", "(values > end)", _TEST),
    (
        _CHECK,
        "not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())",
        "True",
        "tests/kernels/on_triton/test_check.py",
    ),
]
