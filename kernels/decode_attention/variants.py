"""Production launches of ``plan_decode`` and ``decode_attention``."""

from dataclasses import dataclass
from functools import partial

import torch

from biphase.kernels.decode_attention.triton_gpu import decode_attention, plan_decode
from biphase.kernels.decode_attention.workspace import FP8, DecodeWorkspace
from biphase.kernels.gpu.variant import Variant

_TRAITS = frozenset({"async_loads", "mma_sync"})


@dataclass(frozen=True, slots=True, kw_only=True)
class _Case:
    """Llama-3-8B's attention, as Qwen3-8B and Mixtral-8x7B have it, but for what is given."""

    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    dtype: torch.dtype = torch.bfloat16
    kv_dtype: torch.dtype = torch.bfloat16
    block_size: int = 64
    window: int | None = None
    soft_cap: float | None = None
    query_len: int = 1
    max_seqs: int = 256


_CASES = {
    "llama-3-8b/bf16": _Case(),
    "llama-3-8b/fp8": _Case(kv_dtype=FP8),
    "llama-3-8b/fp16": _Case(dtype=torch.float16, kv_dtype=torch.float16),
    "llama-3-8b/fp32": _Case(dtype=torch.float32, kv_dtype=torch.float32),
    "llama-3-8b/bf16/seqs1024": _Case(max_seqs=1024),
    "llama-3-8b/bf16/seqs4096": _Case(max_seqs=4096),
    "llama-3-8b/bf16/block16": _Case(block_size=16),
    "llama-3-8b/bf16/block32": _Case(block_size=32),
    "llama-3-8b/bf16/block128": _Case(block_size=128),
    "llama-3-8b/fp8/block16": _Case(kv_dtype=FP8, block_size=16),
    "llama-3-8b/bf16/query4": _Case(query_len=4),
    "llama-3-8b/bf16/query8": _Case(query_len=8),
    "llama-3-8b/fp8/query4": _Case(kv_dtype=FP8, query_len=4),
    "llama-3-70b/bf16/query8": _Case(heads=64, query_len=8),
    "llama-3-70b/fp8/query8": _Case(heads=64, query_len=8, kv_dtype=FP8),
    "mistral-7b/bf16/window": _Case(window=4096),
    "mistral-7b/fp8/window": _Case(window=4096, kv_dtype=FP8),
    "llama-3.2-1b/bf16": _Case(head_dim=64),
    "llama-3.2-1b/fp8": _Case(head_dim=64, kv_dtype=FP8),
    "llama-2-7b/bf16": _Case(kv_heads=32),
    "phi-3-mini/bf16/window": _Case(kv_heads=32, head_dim=96, window=2047),
    "phi-3-mini/fp8/window": _Case(kv_heads=32, head_dim=96, window=2047, kv_dtype=FP8),
    "gemma-2-9b/bf16/cap": _Case(heads=16, head_dim=256, soft_cap=50.0),
    "gemma-2-9b/bf16/cap/window": _Case(heads=16, head_dim=256, soft_cap=50.0, window=4096),
    "gemma-2-9b/fp8/cap": _Case(heads=16, head_dim=256, soft_cap=50.0, kv_dtype=FP8),
    "gemma-2-9b/fp8/cap/window/query8": _Case(
        heads=16, head_dim=256, soft_cap=50.0, window=4096, kv_dtype=FP8, query_len=8
    ),
    "tiny/fp32": _Case(heads=4, kv_heads=2, head_dim=64, dtype=torch.float32, kv_dtype=torch.float32, block_size=16),
}
_QUICK = ("llama-3-8b/bf16", "llama-3-8b/fp8")


def variants() -> list[Variant]:
    return [
        Variant(
            name=f"decode_attention/{name}",
            run=partial(_run, case, 64, 512, 8),
            other_step=partial(_run, case, 1, 1001, 1001),
            min_capability=89 if case.kv_dtype == FP8 else 80,
            quick=name in _QUICK,
            traits=_TRAITS if case.dtype != torch.float32 else frozenset({"async_loads"}),
        )
        for name, case in _CASES.items()
    ]


def _run(case: _Case, num_seqs: int, table_width: int, num_blocks: int) -> None:
    device = torch.device("meta")
    workspace = DecodeWorkspace.allocate(
        max_seqs=case.max_seqs,
        max_query_len=case.query_len,
        num_heads=case.heads,
        num_kv_heads=case.kv_heads,
        head_dim=case.head_dim,
        block_size=case.block_size,
        kv_dtype=case.kv_dtype,
        device=device,
        window=case.window,
    )
    tokens = num_seqs * case.query_len
    qkv = torch.empty(tokens, (case.heads + 2 * case.kv_heads) * case.head_dim, dtype=case.dtype, device=device)
    lens = torch.empty(num_seqs, dtype=torch.int32, device=device)
    starts = torch.empty(num_seqs + 1, dtype=torch.int32, device=device)
    plan_decode(lens, starts, workspace)
    decode_attention(
        qkv[:, : case.heads * case.head_dim].view(tokens, case.heads, case.head_dim),
        torch.empty(num_blocks, 2, case.kv_heads, case.block_size, case.head_dim, device=device, dtype=case.kv_dtype),
        torch.empty(num_seqs, table_width, dtype=torch.int32, device=device),
        lens,
        starts,
        workspace,
        torch.empty(tokens, case.heads, case.head_dim, dtype=case.dtype, device=device),
        scale=case.head_dim**-0.5,
        window=case.window,
        soft_cap=case.soft_cap,
        kv_scale=torch.empty(2, case.kv_heads, device=device) if case.kv_dtype == FP8 else None,
        max_query_len=case.query_len,
    )
