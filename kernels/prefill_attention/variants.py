"""Production launches of ``prefill_attention``."""

from dataclasses import dataclass

import torch

from biphase.kernels.gpu.variant import Variant
from biphase.kernels.prefill_attention.triton_gpu import plan_prefill, prefill_attention

_TRAITS = frozenset({"async_loads", "mma_wide"})
_F8 = torch.float8_e4m3fn


@dataclass(frozen=True, slots=True, kw_only=True)
class _Model:
    name: str
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    block_size: int = 64
    dtype: torch.dtype = torch.bfloat16
    kv_dtype: torch.dtype = torch.bfloat16
    window: int | None = None
    soft_cap: float | None = None


def _run(model: _Model) -> None:
    tokens, blocks = 2048, 4096
    width = (model.heads + 2 * model.kv_heads) * model.head_dim
    qkv = torch.empty(tokens, width, dtype=model.dtype, device="meta")
    pool = torch.empty(blocks, 2, model.kv_heads, model.block_size, model.head_dim, dtype=model.kv_dtype, device="meta")
    tables = torch.empty(2, 512, dtype=torch.int32, device="meta")
    plan = plan_prefill([1500, 548], [1500, 8000], tables, pool, num_heads=model.heads)
    prefill_attention(
        qkv[:, : model.heads * model.head_dim].view(tokens, model.heads, model.head_dim),
        pool,
        plan,
        torch.empty(tokens, model.heads, model.head_dim, dtype=model.dtype, device="meta"),
        scale=model.head_dim**-0.5,
        window=model.window,
        soft_cap=model.soft_cap,
        kv_scale=torch.empty(2, model.kv_heads, device="meta") if model.kv_dtype == _F8 else None,
    )


def variants() -> list[Variant]:
    models = [
        # Qwen3-8B and Mixtral-8x7B have the same heads
        _Model(name="llama-3-8b/bf16"),
        _Model(name="llama-3-8b/fp16", dtype=torch.float16, kv_dtype=torch.float16),
        _Model(name="llama-3-8b/fp8", kv_dtype=_F8),
        _Model(name="llama-3-8b/fp8/blocks of 16", kv_dtype=_F8, block_size=16),
        _Model(name="llama-3-8b/bf16/blocks of 16", block_size=16),
        _Model(name="llama-3-8b/bf16/blocks of 32", block_size=32),
        _Model(name="llama-3-8b/bf16/blocks of 128", block_size=128),
        _Model(name="llama-3-8b/f32", dtype=torch.float32, kv_dtype=torch.float32),
        _Model(name="mistral-7b/bf16", window=4096),
        _Model(name="llama-2-7b/bf16", kv_heads=32),
        _Model(name="llama-3.2-1b/bf16", head_dim=64),
        _Model(name="llama-3.2-1b/fp8", head_dim=64, kv_dtype=_F8),
        _Model(name="smollm2-135m/f32", heads=9, kv_heads=3, head_dim=64, dtype=torch.float32, kv_dtype=torch.float32),
        _Model(name="phi-3-mini/bf16", kv_heads=32, head_dim=96, window=2047),
        _Model(name="phi-3-mini/fp8", kv_heads=32, head_dim=96, kv_dtype=_F8),
        _Model(name="gemma-2-9b/bf16", heads=16, kv_heads=8, head_dim=256, window=4096, soft_cap=50.0),
        _Model(name="gemma-2-9b/fp8", heads=16, kv_heads=8, head_dim=256, kv_dtype=_F8, soft_cap=50.0),
        _Model(name="d256/fp8", heads=16, kv_heads=8, head_dim=256, kv_dtype=_F8),
        _Model(name="d256/f32", heads=8, kv_heads=4, head_dim=256, dtype=torch.float32, kv_dtype=torch.float32),
    ]
    return [
        Variant(
            name=f"prefill_attention/{model.name}",
            run=lambda model=model: _run(model),  # type: ignore[misc]
            min_capability=89 if model.kv_dtype == _F8 else 80,
            quick=model.name == "llama-3-8b/bf16",
            traits=_TRAITS if model.dtype != torch.float32 else frozenset({"async_loads"}),
        )
        for model in models
    ]
