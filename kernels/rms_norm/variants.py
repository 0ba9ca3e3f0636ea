"""Production launches of ``rms_norm`` and ``add_rms_norm``."""

from functools import partial

import torch

from biphase.kernels.gpu.variant import Variant
from biphase.kernels.rms_norm.triton_gpu import add_rms_norm, rms_norm

_FEATURES = {"llama-3-8b": 4096, "smollm2": 576, "llama-3.2-3b": 3072, "llama-3-70b": 8192, "qwen3-32b": 5120}
_ROWS, _OTHER_ROWS = 64, 17
_EPS = 1e-5


def variants() -> list[Variant]:
    """Mixtral-8x7B and Qwen3-8B have Llama-3-8B's width."""
    bf16 = [
        Variant(
            name=f"{'add_' if add else ''}rms_norm/{model}/bf16",
            run=partial(_run, features, add, torch.bfloat16),
            other_step=partial(_run, features, add, torch.bfloat16, _OTHER_ROWS),
            quick=add and model == "llama-3-8b",
            traits=frozenset({"wide_loads"}),
        )
        for model, features in _FEATURES.items()
        for add in (False, True)
    ]
    return [
        *bf16,
        Variant(name="add_rms_norm/llama-3-8b/fp16", run=partial(_run, 4096, True, torch.float16)),
        Variant(name="add_rms_norm/smollm2/fp32", run=partial(_run, 576, True, torch.float32)),
    ]


def _run(features: int, add: bool, dtype: torch.dtype, rows: int = _ROWS) -> None:
    x, residual = (torch.empty(rows, features, dtype=dtype, device="meta") for _ in range(2))
    weight = torch.empty(features, dtype=dtype, device="meta")
    if add:
        add_rms_norm(x, residual, weight, _EPS, x)
    else:
        rms_norm(residual, weight, _EPS, x)
