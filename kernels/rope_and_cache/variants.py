"""Production launches of ``rope_and_cache``."""

from dataclasses import dataclass
from functools import partial

import torch

from biphase.kernels.gpu.variant import Variant
from biphase.kernels.rope_and_cache.triton_gpu import rope_and_cache

_TOKENS, _OTHER_TOKENS, _BLOCKS, _POSITIONS = 64, 17, 32, 8192
_FP8 = torch.float8_e4m3fn


@dataclass(frozen=True, slots=True, kw_only=True)
class _Case:
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    rotary_dim: int = 128
    block_size: int = 64
    qk_norm: bool = False
    dtype: torch.dtype = torch.bfloat16
    pool_dtype: torch.dtype = torch.bfloat16


_CASES = {
    "llama-3-8b/bf16": _Case(),
    "llama-3-8b/bf16/fp8": _Case(pool_dtype=_FP8),
    "llama-3-8b/fp16": _Case(dtype=torch.float16, pool_dtype=torch.float16),
    "llama-3-8b/bf16/block 16": _Case(block_size=16),
    "llama-3-70b of 8/bf16": _Case(heads=8, kv_heads=1),
    "qwen3-8b/bf16": _Case(qk_norm=True),
    "qwen3-8b/bf16/fp8": _Case(qk_norm=True, pool_dtype=_FP8),
    "qwen3-30b-a3b/bf16": _Case(kv_heads=4, qk_norm=True),
    "llama-3.2-1b/bf16": _Case(head_dim=64, rotary_dim=64),
    "phi-3-mini/bf16": _Case(kv_heads=32, head_dim=96, rotary_dim=96),
    "head_dim 256/bf16": _Case(heads=16, head_dim=256, rotary_dim=256),
    "partial/bf16": _Case(rotary_dim=32),
    "glm-4.5/bf16": _Case(heads=96, rotary_dim=64, qk_norm=True),
    "smollm2/fp32": _Case(
        heads=9, kv_heads=3, head_dim=64, rotary_dim=64, dtype=torch.float32, pool_dtype=torch.float32
    ),
}
_QUICK = ("qwen3-8b/bf16", "llama-3-8b/bf16/fp8")


def variants() -> list[Variant]:
    """Mixtral-8x7B has Llama-3-8B's heads."""
    return [
        Variant(
            name=f"rope_and_cache/{name}",
            run=partial(_run, case, _TOKENS),
            other_step=partial(_run, case, _OTHER_TOKENS),
            min_capability=89 if case.pool_dtype == _FP8 else 80,
            quick=name in _QUICK,
            traits=frozenset({"wide_loads"}),
        )
        for name, case in _CASES.items()
    ]


def _run(case: _Case, tokens: int) -> None:
    def tensor(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    norm = tensor(case.head_dim, dtype=case.dtype) if case.qk_norm else None
    rope_and_cache(
        tensor(tokens, (case.heads + 2 * case.kv_heads) * case.head_dim, dtype=case.dtype),
        tensor(tokens, dtype=torch.int32),
        tensor(tokens, dtype=torch.int64),
        tensor(_POSITIONS, 2, case.rotary_dim // 2, dtype=torch.float32),
        tensor(_BLOCKS, 2, case.kv_heads, case.block_size, case.head_dim, dtype=case.pool_dtype),
        num_heads=case.heads,
        q_norm=norm,
        k_norm=norm,
        kv_scale=tensor(2, case.kv_heads, dtype=torch.float32) if case.pool_dtype == _FP8 else None,
    )
