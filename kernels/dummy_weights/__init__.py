"""Random weights that are a pure function of a key and each element's index: the same values on every device, in any
slice. ``fill`` runs Triton's kernel on a GPU that has it and torch operations elsewhere; both give the same bits."""

import importlib.util
import os

import torch

from biphase.kernels.dummy_weights import torch_blocks


def fill(out: torch.Tensor, key: int, *, spread: float, first: int = 0, pitch: int | None = None) -> None:
    """Uniform values from -spread to spread into the contiguous ``out``; arguments as in torch_blocks.py."""
    if out.is_cuda and os.environ.get("BIPHASE_KERNELS") != "torch" and importlib.util.find_spec("triton"):
        from biphase.kernels.dummy_weights import triton_gpu

        triton_gpu.fill(out, key, spread=spread, first=first, pitch=pitch)
    else:
        torch_blocks.fill(out, key, spread=spread, first=first, pitch=pitch)


__all__ = ["fill"]
