"""A case of ``decode_attention``, its tensors over a cache that holds NaN wherever it may not read, and a workspace for it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from biphase.kernels.decode_attention.reference import decode_attention_paged_reference
from biphase.kernels.decode_attention.triton_gpu import DecodeWorkspace
from support.paged_cache import PagedCache, poisoned_pool

FP8 = torch.float8_e4m3fn


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """``contexts`` of 0 are padding. ``query_lens``: 1 each where not given. ``programs``: per kv head."""

    contexts: tuple[int, ...]
    query_lens: tuple[int, ...] = ()
    max_query_len: int = 1
    heads: int = 4
    kv_heads: int = 2
    dim: int = 64
    block_size: int = 16
    tile: int = 16
    programs: int = 3
    dtype: torch.dtype = torch.float32
    kv_dtype: torch.dtype | None = None
    window: int | None = None
    soft_cap: float | None = None
    q_size: float = 1.5
    seed: int = 0

    @property
    def scale(self) -> float:
        return self.dim**-0.5 * 1.5 / self.q_size


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    q: torch.Tensor
    cache: PagedCache
    query_starts: torch.Tensor
    expected: torch.Tensor


def workspace_of(case: Case, device: torch.device, max_seqs: int | None = None) -> DecodeWorkspace:
    workspace = DecodeWorkspace.allocate(
        max_seqs=max_seqs or len(case.contexts),
        max_query_len=case.max_query_len,
        num_heads=case.heads,
        num_kv_heads=case.kv_heads,
        head_dim=case.dim,
        block_size=case.block_size,
        kv_dtype=case.kv_dtype or case.dtype,
        device=device,
        window=case.window,
    )
    chosen = workspace.settings | {"TILE": case.tile, "LONG_RUN": 4}
    parts = 2 * case.programs * case.heads * case.max_query_len
    return replace(
        workspace,
        settings=chosen,
        resident=max(1, case.programs // 2),
        num_programs=case.programs,
        rows=torch.full_like(workspace.rows, -(2**30)),
        runs=torch.full((case.programs, 4), -(2**30), dtype=torch.int32, device=device),
        part_out=torch.full((parts * case.dim,), torch.nan, device=device),
        part_lse=torch.full((parts,), torch.nan, device=device),
    )


def inputs_of(case: Case, device: torch.device) -> Inputs:
    generator = torch.Generator().manual_seed(case.seed)
    kv_dtype = case.kv_dtype or case.dtype
    kv_scale = (torch.rand(2, case.kv_heads, generator=generator) + 0.5) / 100 if kv_dtype == FP8 else None
    keys, values = (
        [torch.randn(length, case.kv_heads, case.dim, generator=generator) for length in case.contexts]
        for _ in range(2)
    )
    cache = poisoned_pool(
        [key.to(device) for key in keys],
        [value.to(device) for value in values],
        block_size=case.block_size,
        dtype=kv_dtype,
        kv_scale=None if kv_scale is None else kv_scale.to(device),
        reserved_tokens=case.block_size,
        seed=case.seed,
    )
    query_lens = case.query_lens or (1,) * len(case.contexts)
    starts = torch.tensor([0, *torch.tensor(query_lens).cumsum(0)], dtype=torch.int32)
    # q as a view of the fused product, as the model has it
    fused = torch.randn(int(starts[-1]), case.heads + 2 * case.kv_heads, case.dim, generator=generator)
    q = (fused * case.q_size).to(case.dtype).to(device)[:, : case.heads]
    expected = torch.full(q.shape, torch.nan, device=device)
    decode_attention_paged_reference(
        q.float(),
        cache.pool,
        cache.block_tables,
        cache.context_lens,
        starts,
        None,
        expected,
        scale=case.scale,
        window=case.window,
        soft_cap=case.soft_cap,
        kv_scale=cache.kv_scale,
        max_query_len=case.max_query_len,
    )
    _forget_unseen(cache, query_lens, case.window)
    return Inputs(q=q, cache=cache, query_starts=starts.to(device), expected=expected)


def _forget_unseen(cache: PagedCache, query_lens: Sequence[int], window: int | None) -> None:
    """Blocks that the window has left behind are free: the table names one that holds NaN."""
    free = min(set(range(len(cache.pool))) - set(cache.block_tables.flatten().tolist()))
    for row, (context, query_len) in enumerate(zip(cache.context_lens.tolist(), query_lens, strict=True)):
        if window is not None:
            cache.block_tables[row, : max(0, context - query_len + 1 - window) // cache.block_size] = free
