"""``fill`` on a GPU: bound by the memory it writes, 16 GB in well under a second."""

import torch

from biphase.kernels.dummy_weights.torch_blocks import row_shape, signed_halves, step_of
from biphase.kernels.dummy_weights.triton_kernel import fill_kernel
from biphase.kernels.gpu.check import check_base, check_dtype
from biphase.kernels.gpu.launch import launch

_BLOCK = 2048


def fill(out: torch.Tensor, key: int, *, spread: float, first: int = 0, pitch: int | None = None) -> None:
    """As in torch_blocks.py, bit for bit; ``out`` aligned to 16 bytes. Raises ValueError naming the argument."""
    check_dtype("out", out, torch.bfloat16, torch.float16, torch.float32)
    check_base("out", out)
    rows, width, pitch = row_shape(out, pitch)
    low, high = signed_halves(key)
    launch(
        fill_kernel,
        (rows * -(-width // _BLOCK),),
        out,
        low,
        high,
        first,
        width,
        pitch,
        step_of(spread),
        BLOCK=_BLOCK,
        num_warps=4,
    )
