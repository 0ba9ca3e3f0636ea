"""Production launches of ``silu_mul``."""

from functools import partial

import torch

from biphase.kernels.gpu.variant import Variant
from biphase.kernels.silu_mul.triton_gpu import silu_mul

_ROWS, _OTHER_ROWS = 64, 17
_CASES = {
    "llama-3-8b/bf16": (14336, torch.bfloat16),
    "qwen3-8b/bf16": (12288, torch.bfloat16),
    "qwen3-30b-a3b/bf16": (768, torch.bfloat16),
    "llama-3-8b/fp16": (14336, torch.float16),
    "smollm2/fp32": (1536, torch.float32),
}


def variants() -> list[Variant]:
    """Mixtral-8x7B has Llama-3-8B's width."""
    return [
        Variant(
            name=f"silu_mul/{name}",
            run=partial(_run, intermediate, dtype, _ROWS),
            other_step=partial(_run, intermediate, dtype, _OTHER_ROWS),
            quick=name == "llama-3-8b/bf16",
            traits=frozenset({"wide_loads"}),
        )
        for name, (intermediate, dtype) in _CASES.items()
    ]


def _run(intermediate: int, dtype: torch.dtype, rows: int) -> None:
    silu_mul(
        torch.empty(rows, 2 * intermediate, dtype=dtype, device="meta"),
        torch.empty(rows, intermediate, dtype=dtype, device="meta"),
    )
