"""Production launches of ``fill``: whole tensors, and a slice of every row."""

from functools import partial

import torch

from biphase.kernels.dummy_weights.triton_gpu import fill
from biphase.kernels.gpu.variant import Variant

_LARGE = 2**63 - 25
"""A key of which both halves are used."""


def variants() -> list[Variant]:
    return [
        Variant(name="dummy_weights/llama-3-8b/bf16", run=partial(_run, torch.bfloat16, (28672, 4096)), quick=True),
        Variant(name="dummy_weights/smollm2/fp32", run=partial(_run, torch.float32, (576, 576))),
        Variant(name="dummy_weights/slice/fp16", run=partial(_run, torch.float16, (8, 4096, 7168), 14336)),
    ]


def _run(dtype: torch.dtype, shape: tuple[int, ...], pitch: int | None = None) -> None:
    fill(torch.empty(shape, dtype=dtype, device="meta"), _LARGE, spread=0.03, pitch=pitch)
