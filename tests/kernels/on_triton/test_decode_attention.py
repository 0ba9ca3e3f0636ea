"""``decode_attention`` against its reference, over a cache that holds NaN wherever it may not read.

What matters is how the work is cut: every case says on how many programs per head it runs (``resident``), and tiles are
16 or 32 tokens, so that a few hundred tokens are many tiles.
"""

from dataclasses import dataclass, replace

import pytest
import torch
from support.paged_cache import PagedCache, assert_near, poisoned_pool

from biphase.kernels.decode_attention.reference import decode_attention_paged_reference
from biphase.kernels.decode_attention.triton_gpu import DecodeWorkspace, decode_attention, plan_decode

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
    seed: int = 0


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
    q = (fused * 1.5).to(case.dtype).to(device)[:, : case.heads]
    expected = torch.full(q.shape, torch.nan, device=device)
    decode_attention_paged_reference(
        q.float(),
        cache.pool,
        cache.block_tables,
        cache.context_lens,
        starts,
        None,
        expected,
        scale=case.dim**-0.5,
        window=case.window,
        soft_cap=case.soft_cap,
        kv_scale=cache.kv_scale,
        max_query_len=case.max_query_len,
    )
    return Inputs(q=q, cache=cache, query_starts=starts.to(device), expected=expected)


def run(case: Case, inputs: Inputs, workspace: DecodeWorkspace, out: torch.Tensor) -> None:
    plan_decode(inputs.cache.context_lens, inputs.query_starts, workspace)
    for _ in range(2):  # two layers on one plan, over the partial results of the first
        decode_attention(
            inputs.q,
            inputs.cache.pool,
            inputs.cache.block_tables,
            inputs.cache.context_lens,
            inputs.query_starts,
            workspace,
            out,
            scale=case.dim**-0.5,
            window=case.window,
            soft_cap=case.soft_cap,
            kv_scale=inputs.cache.kv_scale,
            max_query_len=case.max_query_len,
        )


def check(case: Case, device: torch.device) -> None:
    inputs = inputs_of(case, device)
    out = torch.full(inputs.q.shape, torch.nan, dtype=case.dtype, device=device)
    run(case, inputs, workspace_of(case, device), out)
    real = ~inputs.expected.isnan().any(-1).any(-1)
    assert bool(out[~real].isnan().all()), "rows of padding were written"
    half = torch.float16 if case.kv_dtype == FP8 and case.dtype == torch.float32 else case.dtype
    assert_near(out[real], inputs.expected[real], dtype=half, units=16 if case.dtype == torch.float32 else 4)


LENGTHS = {
    "one token": Case(contexts=(1,)),
    "one sequence": Case(contexts=(130,), programs=5),
    "block edges": Case(contexts=(15, 16, 17, 31, 32, 33)),
    "uneven": Case(contexts=(200, 1, 1, 37, 2, 64, 1), programs=7),
    "padding between": Case(contexts=(0, 40, 0, 0, 17, 0), programs=4),
    "only padding": Case(contexts=(0, 0)),
    "more programs than tiles": Case(contexts=(20, 1), programs=9),
    "one program": Case(contexts=(33, 0, 50), programs=1),
    "many sequences": Case(contexts=(3,) * 40, heads=2, kv_heads=1, programs=4),
}


@pytest.mark.parametrize("case", LENGTHS.values(), ids=LENGTHS)
def test_lengths(device: torch.device, case: Case) -> None:
    check(case, device)


SHAPES = {
    "dim 96": Case(contexts=(50, 7), dim=96),
    "dim 128": Case(contexts=(50, 7), dim=128, heads=8, kv_heads=1),
    "dim 256": Case(contexts=(30, 7), dim=256, heads=3, kv_heads=1),
    "group of 1": Case(contexts=(50, 7), heads=2, kv_heads=2),
    "group of 7": Case(contexts=(50, 7), heads=7, kv_heads=1),
    "blocks of 32": Case(contexts=(70, 33, 1), block_size=32),
    "blocks of 64, tiles of 64": Case(contexts=(130, 64, 65), block_size=64, tile=64),
    "blocks of 16, tiles of 32": Case(contexts=(70, 33, 32, 0, 1), tile=32),
    "blocks of 16, tiles of 64": Case(contexts=(130, 63, 0, 17), tile=64, programs=2),
    "blocks of 128, tiles of 64": Case(contexts=(140, 128), block_size=128, tile=64),
}


@pytest.mark.parametrize("case", SHAPES.values(), ids=SHAPES)
def test_shapes(device: torch.device, case: Case) -> None:
    check(case, device)


QUERIES = {
    "two tokens": Case(contexts=(50, 2), query_lens=(2, 2), max_query_len=2),
    "mixed": Case(contexts=(50, 33, 0, 8, 17), query_lens=(1, 3, 2, 0, 4), max_query_len=4, programs=4),
    "eight, all that there is": Case(contexts=(8, 40), query_lens=(8, 5), max_query_len=8),
    "several row tiles": Case(contexts=(35, 20), query_lens=(8, 7), max_query_len=9, heads=8, kv_heads=1),
    "windowed": Case(contexts=(60, 33), query_lens=(4, 3), max_query_len=4, window=18),
}


@pytest.mark.parametrize("case", QUERIES.values(), ids=QUERIES)
def test_several_query_tokens(device: torch.device, case: Case) -> None:
    check(case, device)


@pytest.mark.parametrize("tile", [16, 32])
@pytest.mark.parametrize("window", [1, 15, 16, 17, 33, 500])
def test_window(device: torch.device, window: int, tile: int) -> None:
    check(Case(contexts=(100, 16, 33, 0, 5), window=window, tile=tile, kv_heads=1), device)


TYPES = {
    "bf16": Case(contexts=(70, 16, 1), dtype=torch.bfloat16),
    "fp16": Case(contexts=(70, 16, 1), dtype=torch.float16),
    "fp8 under bf16": Case(contexts=(70, 16, 1), dtype=torch.bfloat16, kv_dtype=FP8),
    "fp8 under fp32": Case(contexts=(70, 16, 1), kv_dtype=FP8),
    "fp8, dim 96": Case(contexts=(40, 16), dim=96, dtype=torch.bfloat16, kv_dtype=FP8),
    "fp8, windowed, capped, 3 tokens": Case(
        contexts=(60, 20),
        query_lens=(3, 2),
        max_query_len=3,
        dtype=torch.bfloat16,
        kv_dtype=FP8,
        window=19,
        soft_cap=2.0,
        tile=32,
    ),
}


@pytest.mark.parametrize("case", TYPES.values(), ids=TYPES)
def test_types(device: torch.device, case: Case) -> None:
    check(case, device)


@pytest.mark.parametrize("soft_cap", [0.5, 30.0])
def test_soft_cap(device: torch.device, soft_cap: float) -> None:
    check(Case(contexts=(40, 3), soft_cap=soft_cap), device)
