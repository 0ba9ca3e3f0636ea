"""RMS norm over the features of each token (Zhang and Sennrich, 2019), alone or with the residual's addition before it.

One program per row, the row in registers, so each element is read once. N tokens, F features (any up to 32768).
"""

import torch

from biphase.kernels.gpu.check import check_contiguous, check_dtype, check_rows, check_same_device, check_shape
from biphase.kernels.gpu.dependent_launch import dependent_launch
from biphase.kernels.gpu.launch import launch
from biphase.kernels.gpu.target import Target, target_of
from biphase.kernels.gpu.tuning import Settings, tuned
from biphase.kernels.rms_norm.triton_kernel import rms_norm_kernel

OP = "rms_norm"
_MAX_FEATURES = 32768
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def rms_norm(x_NF: torch.Tensor, weight_F: torch.Tensor, eps: float, out_NF: torch.Tensor) -> None:
    """``out = x / sqrt(mean(x^2) + eps) * weight``, in float32 up to ``out``'s dtype. ``out`` may be ``x``.

    Rows of ``x`` and ``out`` aligned to 16 bytes. Raises ValueError naming the argument.
    """
    _launch(x_NF, None, weight_F, eps, out_NF)


def add_rms_norm(
    x_NF: torch.Tensor, residual_NF: torch.Tensor, weight_F: torch.Tensor, eps: float, out_NF: torch.Tensor
) -> None:
    """``residual += x`` (rounded to its dtype), then ``out = rms_norm(residual)``. ``out`` may be ``x``.

    Otherwise as ``rms_norm``.
    """
    if residual_NF.data_ptr() == out_NF.data_ptr() and residual_NF.numel() and not residual_NF.is_meta:
        raise ValueError("out is residual, which is kept for later layers")
    _launch(x_NF, residual_NF, weight_F, eps, out_NF)


def default_settings(target: Target, key: str) -> Settings:
    """16 elements a thread (two 16-byte loads of bfloat16): enough in flight for many rows, short chains for one."""
    return {"num_warps": min(32, max(1, _block(int(key.removeprefix("F"))) // 512))}


def candidates(target: Target, key: str) -> list[Settings]:
    return [{"num_warps": warps} for warps in (1, 2, 4, 8, 16, 32) if 64 <= _block(int(key[1:])) // warps <= 4096]


def key_of(num_features: int) -> str:
    return f"F{num_features}"


def _block(num_features: int) -> int:
    return 1 << (num_features - 1).bit_length()


def _launch(
    x_NF: torch.Tensor, residual_NF: torch.Tensor | None, weight_F: torch.Tensor, eps: float, out_NF: torch.Tensor
) -> None:
    check_shape("x", x_NF, None, None)
    num_rows, num_features = x_NF.shape
    if not 0 < num_features <= _MAX_FEATURES:
        raise ValueError(f"x has {num_features} features, supported: 1 to {_MAX_FEATURES}")
    rows = {"x": x_NF, "out": out_NF} | ({} if residual_NF is None else {"residual": residual_NF})
    for name, tensor in rows.items():
        check_dtype(name, tensor, *_DTYPES)
        check_shape(name, tensor, num_rows, num_features)
        check_rows(name, tensor)
    check_dtype("weight", weight_F, *_DTYPES)
    check_shape("weight", weight_F, num_features)
    check_contiguous("weight", weight_F)
    check_rows("weight", weight_F)
    check_same_device(weight=weight_F, **rows)
    target, key = target_of(x_NF.device), key_of(num_features)
    launch(
        rms_norm_kernel,
        (num_rows,),
        x_NF,
        residual_NF,
        weight_F,
        out_NF,
        eps,
        X_STRIDE=x_NF.stride(0),
        RESIDUAL_STRIDE=0 if residual_NF is None else residual_NF.stride(0),
        OUT_STRIDE=out_NF.stride(0),
        F=num_features,
        BLOCK=_block(num_features),
        **dependent_launch(target),
        **(tuned(OP, target, key) or default_settings(target, key)),
    )
