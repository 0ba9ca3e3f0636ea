"""The gate of the feed-forward layer, ``silu(gate) * up`` (Shazeer, 2020), gate and up side by side in one buffer.

Each row is split over programs, so that one token alone still occupies many multiprocessors. N tokens, I intermediate.
"""

import torch

from biphase.kernels.gpu.check import check_dtype, check_rows, check_same_device, check_shape
from biphase.kernels.gpu.dependent_launch import dependent_launch
from biphase.kernels.gpu.launch import launch
from biphase.kernels.gpu.target import Target, target_of
from biphase.kernels.gpu.tuning import Settings, tuned
from biphase.kernels.silu_mul.triton_kernel import silu_mul_kernel

OP = "silu_mul"
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def silu_mul(gate_up_NX: torch.Tensor, out_NI: torch.Tensor) -> None:
    """``out = silu(gate_up[:, :I]) * gate_up[:, I:]``, in float32 up to ``out``'s dtype.

    ``out`` [N, I] must not overlap ``gate_up`` [N, 2 I]; rows aligned to 16 bytes. Raises ValueError naming the argument.
    """
    check_shape("out", out_NI, None, None)
    num_rows, intermediate = out_NI.shape
    check_shape("gate_up", gate_up_NX, num_rows, 2 * intermediate)
    for name, tensor in {"gate_up": gate_up_NX, "out": out_NI}.items():
        check_dtype(name, tensor, *_DTYPES)
        check_rows(name, tensor)
    check_same_device(gate_up=gate_up_NX, out=out_NI)
    target, key = target_of(out_NI.device), key_of(intermediate)
    settings = tuned(OP, target, key) or default_settings(target, key)
    launch(
        silu_mul_kernel,
        (num_rows * -(-intermediate // settings["BLOCK"]),),
        gate_up_NX,
        out_NI,
        GATE_UP_STRIDE=gate_up_NX.stride(0),
        OUT_STRIDE=out_NI.stride(0),
        I=intermediate,
        **dependent_launch(target),
        **settings,
    )


def default_settings(target: Target, key: str) -> Settings:
    """One 16-byte load of gate and one of up (bfloat16) in each thread."""
    return {"BLOCK": 1024, "num_warps": 4}


def candidates(target: Target, key: str) -> list[Settings]:
    return [
        {"BLOCK": block, "num_warps": warps}
        for block in (512, 1024, 2048, 4096)
        for warps in (2, 4, 8)
        if 256 <= block // warps <= 1024
    ]


def key_of(intermediate: int) -> str:
    return f"I{intermediate}"
