"""Production launches of ``silu_mul``."""

from functools import partial

import torch

from biphase.kernels.gpu.variant import Variant
from biphase.kernels.silu_mul.triton_gpu import silu_mul

_ROWS = 64


def variants() -> list[Variant]:
    """Mixtral-8x7B has Llama-3-8B's width."""
    vector = frozenset({"async_loads"})
    return [
        Variant(name="silu_mul/llama-3-8b/bf16", run=partial(_run, 14336, torch.bfloat16), quick=True, traits=vector),
        Variant(name="silu_mul/qwen3-8b/bf16", run=partial(_run, 12288, torch.bfloat16), traits=vector),
        Variant(name="silu_mul/qwen3-30b-a3b/bf16", run=partial(_run, 768, torch.bfloat16), traits=vector),
        Variant(name="silu_mul/llama-3-8b/fp16", run=partial(_run, 14336, torch.float16), traits=vector),
        Variant(name="silu_mul/smollm2/fp32", run=partial(_run, 1536, torch.float32), traits=vector),
    ]


def _run(intermediate: int, dtype: torch.dtype) -> None:
    silu_mul(
        torch.empty(_ROWS, 2 * intermediate, dtype=dtype, device="meta"),
        torch.empty(_ROWS, intermediate, dtype=dtype, device="meta"),
    )
