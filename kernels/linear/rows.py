"""Matrix product of the dense layers on token-major activations, ``out_NO = x_NI @ weight_OI.T``: cuBLAS, through torch.

Shapes: N tokens, O output features, I input features. cuBLAS accumulates products of bfloat16 and float16 in float32, but
may add the parts of a split sum in the narrow type, and a product of float32 may run as tf32: torch has process-wide
switches for both, which ``accumulate_in_float32`` sets. Without torch's ``out=`` each call would allocate, which a CUDA
graph turns into memory held for ever.
"""

import torch

from biphase.kernels.gpu.check import check_dtype, check_rows, check_same_device, check_shape

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def accumulate_in_float32() -> None:
    """For this process: no narrow sums and no tf32 in cuBLAS. Whoever owns the model calls it once, before any product."""
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_tf32 = False


def linear_rows(
    x_NI: torch.Tensor, weight_OI: torch.Tensor, out_NO: torch.Tensor, bias_O: torch.Tensor | None = None
) -> None:
    """``out = x @ weight.T (+ bias)``; ``out`` must not overlap ``x``. All of one dtype, rows aligned to 16 bytes.

    Raises ValueError naming the argument.
    """
    check_shape("weight", weight_OI, None, None)
    out_features, in_features = weight_OI.shape
    check_dtype("weight", weight_OI, *_DTYPES)
    check_shape("x", x_NI, None, in_features)
    check_shape("out", out_NO, x_NI.shape[0], out_features)
    for name, tensor in {"x": x_NI, "weight": weight_OI, "out": out_NO}.items():
        check_dtype(name, tensor, weight_OI.dtype)
        check_rows(name, tensor)
    if bias_O is not None:
        check_dtype("bias", bias_O, weight_OI.dtype)
        check_shape("bias", bias_O, out_features)
        check_rows("bias", bias_O)
    check_same_device(x=x_NI, weight=weight_OI, out=out_NO, bias=bias_O)
    if bias_O is None:
        torch.mm(x_NI, weight_OI.t(), out=out_NO)
    else:
        torch.addmm(bias_O, x_NI, weight_OI.t(), out=out_NO)


def linear_rows_reference(
    x_NI: torch.Tensor, weight_OI: torch.Tensor, out_NO: torch.Tensor, bias_O: torch.Tensor | None = None
) -> None:
    """The same in float64."""
    product = x_NI.double() @ weight_OI.double().t()
    out_NO.copy_(product if bias_O is None else product + bias_O.double())
