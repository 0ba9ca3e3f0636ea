"""Production launches of ``embed``."""

import torch

from biphase.kernels.embed.triton_gpu import embed
from biphase.kernels.gpu.variant import Variant


def variants() -> list[Variant]:
    def run(vocab: int, features: int, dtype: torch.dtype) -> None:
        rows = 64
        embed(
            torch.empty(rows, dtype=torch.int64, device="meta"),
            torch.empty(rows, dtype=torch.int32, device="meta"),
            torch.empty(rows, dtype=torch.int64, device="meta"),
            torch.empty(vocab, features, dtype=dtype, device="meta"),
            torch.empty(rows, features, dtype=dtype, device="meta"),
        )

    return [
        Variant(name="embed/llama-3-8b/bf16", run=lambda: run(128256, 4096, torch.bfloat16), quick=True),
        Variant(name="embed/qwen3-8b/bf16", run=lambda: run(151936, 4096, torch.bfloat16)),
        Variant(name="embed/smollm2/fp32", run=lambda: run(49152, 576, torch.float32)),
    ]
