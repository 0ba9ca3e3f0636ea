"""Sampling as production launches it: many rows and one, vocabularies of Llama 3 and Qwen3."""

from collections.abc import Callable

import torch

from biphase.kernels.gpu.variant import Variant
from biphase.kernels.sample.buffers import SampleOut, SampleWorkspace
from biphase.kernels.sample.params import SampleParams
from biphase.kernels.sample.triton_gpu import sample

_META = torch.device("meta")
_LLAMA, _QWEN = 128_256, 151_936


def variants() -> list[Variant]:
    return [
        Variant(name=name, run=run, other_step=other, quick=quick, traits=frozenset({"wide_loads"}))
        for name, run, other, quick in (
            ("llama3-r64-bf16", _run(64, _LLAMA, torch.bfloat16), _run(37, _LLAMA, torch.bfloat16), True),
            ("qwen3-r64-bf16", _run(64, _QWEN, torch.bfloat16), _run(1, _QWEN, torch.bfloat16), False),
            ("llama3-r1-bf16", _run(1, _LLAMA, torch.bfloat16), _run(16, _LLAMA, torch.bfloat16), False),
            ("llama3-r256-bf16", _run(256, _LLAMA, torch.bfloat16), _run(1, _LLAMA, torch.bfloat16), False),
            ("llama3-r64-fp32", _run(64, _LLAMA, torch.float32), _run(5, _LLAMA, torch.float32), False),
        )
    ]


def _run(rows: int, vocab_size: int, dtype: torch.dtype) -> Callable[[], None]:
    def run() -> None:
        sample(
            torch.empty(rows, vocab_size, dtype=dtype, device=_META),
            SampleParams(max_rows=256, vocab_size=vocab_size, device=_META),
            SampleOut.allocate(256, _META),
            SampleWorkspace(max_rows=256, vocab_size=vocab_size, device=_META),
        )

    return run
