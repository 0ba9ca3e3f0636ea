"""``decode_attention`` against its reference, over a cache that holds NaN wherever it may not read.

What matters is how the work is cut: every case says on how many programs per head it runs (``resident``), and tiles are
16 or 32 tokens, so that a few hundred tokens are many tiles.
"""

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.decode_attention_case import Case, Inputs, inputs_of, workspace_of
from support.paged_cache import assert_near

from biphase.kernels.decode_attention import triton_gpu
from biphase.kernels.decode_attention.triton_gpu import DecodeWorkspace, decode_attention, plan_decode

FP8 = torch.float8_e4m3fn


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
            scale=case.scale,
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


def _some_long(cases: dict[str, Case], short: tuple[str, ...]) -> list[Any]:
    """Those not in ``short`` run with --long only."""
    return [
        pytest.param(case, id=name, marks=() if name in short else pytest.mark.long) for name, case in cases.items()
    ]


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


@pytest.mark.parametrize("case", _some_long(LENGTHS, ("uneven", "padding between", "more programs than tiles")))
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


@pytest.mark.parametrize(
    "case", _some_long(SHAPES, ("dim 96", "blocks of 64, tiles of 64", "blocks of 16, tiles of 32"))
)
def test_shapes(device: torch.device, case: Case) -> None:
    check(case, device)


QUERIES = {
    "two tokens": Case(contexts=(50, 2), query_lens=(2, 2), max_query_len=2),
    "mixed": Case(contexts=(50, 33, 0, 8, 17), query_lens=(1, 3, 2, 0, 4), max_query_len=4, programs=4),
    "eight, all that there is": Case(contexts=(8, 40), query_lens=(8, 5), max_query_len=8),
    "several row tiles": Case(contexts=(35, 20), query_lens=(8, 7), max_query_len=9, heads=8, kv_heads=1),
    "windowed": Case(contexts=(60, 33), query_lens=(4, 3), max_query_len=4, window=18),
}


@pytest.mark.parametrize("case", _some_long(QUERIES, ("mixed",)))
def test_several_query_tokens(device: torch.device, case: Case) -> None:
    check(case, device)


WINDOWS = (1, 15, 16, 17, 33, 500)


@pytest.mark.parametrize(
    ("window", "tile"),
    [
        (w, t) if (w, t) in {(17, 16), (17, 32)} else pytest.param(w, t, marks=pytest.mark.long)
        for w in WINDOWS
        for t in (16, 32)
    ],
)
def test_window(device: torch.device, window: int, tile: int) -> None:
    check(Case(contexts=(100, 16, 33, 0, 5), window=window, tile=tile, kv_heads=1), device)


TYPES = {
    "bf16": Case(contexts=(70, 16, 1), dtype=torch.bfloat16),
    "fp16": Case(contexts=(70, 16, 1), dtype=torch.float16),
    "fp8 under bf16": Case(contexts=(70, 16, 1), dtype=torch.bfloat16, kv_dtype=FP8),
    "fp8 under fp32": Case(contexts=(70, 16, 1), kv_dtype=FP8),
    "fp8 under large queries": Case(contexts=(40,), dtype=torch.bfloat16, kv_dtype=FP8, q_size=1e6),
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


@pytest.mark.parametrize("case", _some_long(TYPES, ("bf16", "fp8, windowed, capped, 3 tokens")))
def test_types(device: torch.device, case: Case) -> None:
    check(case, device)


@pytest.mark.parametrize("soft_cap", [0.5, pytest.param(30.0, marks=pytest.mark.long)])
def test_soft_cap(device: torch.device, soft_cap: float) -> None:
    check(Case(contexts=(40, 3), soft_cap=soft_cap), device)


def drawn_case(seed: int) -> Case:
    draw = random.Random(seed)
    group, kv_heads, longest = draw.randint(1, 5), draw.randint(1, 2), draw.choice([1, 1, 3])
    contexts = tuple(
        draw.choice([0, 1, 2, 16, draw.randint(3, 20), draw.randint(20, 120)]) for _ in range(draw.randint(1, 6))
    )
    return Case(
        contexts=contexts,
        query_lens=tuple(min(length, draw.randint(0, longest)) if length else 1 for length in contexts),
        max_query_len=longest,
        heads=group * kv_heads,
        kv_heads=kv_heads,
        block_size=draw.choice([16, 32, 64]),
        tile=draw.choice([16, 32]),
        programs=draw.randint(1, 8),
        dtype=draw.choice([torch.float32, torch.bfloat16]),
        kv_dtype=None,
        window=draw.choice([None, None, draw.randint(1, 60)]),
        soft_cap=draw.choice([None, 20.0]),
        seed=seed,
    )


@given(st.integers(0, 2**32))
@settings(max_examples=3, deadline=None, derandomize=True)
def test_any_shape(device: torch.device, seed: int) -> None:
    check(drawn_case(seed), device)


@pytest.mark.long
@given(st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_any_shape_more_often(device: torch.device, seed: int) -> None:
    check(drawn_case(seed), device)


def test_one_launch_serves_all_lengths(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a graph would replay it: only what device tensors hold may change, neither grids nor arguments do."""
    launches: list[tuple[Any, ...]] = []

    def recorded(kernel: Any, grid: tuple[int, ...], *args: Any, **named: Any) -> None:
        seen = [(a.data_ptr(), a.shape, a.stride()) if isinstance(a, torch.Tensor) else a for a in args]
        launches.append((kernel.fn.__name__, grid, seen, sorted(named.items())))
        launch(kernel, grid, *args, **named)

    launch = triton_gpu.launch
    monkeypatch.setattr(triton_gpu, "launch", recorded)
    base = Case(contexts=(1500, 1), heads=2, kv_heads=1, tile=128, block_size=64, programs=5)
    workspace, largest = workspace_of(base, device), inputs_of(base, device)
    out = torch.empty(largest.q.shape, device=device)
    q, cache = torch.empty_like(largest.q), replace(largest.cache, pool=torch.empty_like(largest.cache.pool))
    cache = replace(cache, block_tables=cache.block_tables.clone(), context_lens=cache.context_lens.clone())
    for contexts in [(1500, 1), (1, 0), (100, 64), (1, 1000)]:
        case = replace(base, contexts=contexts)
        given_here = inputs_of(case, device)
        size, width = len(given_here.cache.pool), given_here.cache.block_tables.shape[1]
        q.copy_(given_here.q)
        cache.pool.fill_(torch.nan)
        cache.pool[:size] = given_here.cache.pool
        cache.block_tables.fill_(len(cache.pool) - 1)
        cache.block_tables[:, :width] = given_here.cache.block_tables
        cache.context_lens.copy_(given_here.cache.context_lens)
        out.fill_(torch.nan)
        starts = largest.query_starts
        run(case, Inputs(q=q, cache=cache, query_starts=starts, expected=out), workspace, out)
        real = given_here.cache.context_lens > 0
        assert_near(out[real], given_here.expected[real], units=16)
    step = len(launches) // 4
    assert [name for name, *_ in launches[:step]] == ["plan_kernel", *["split_kernel", "join_kernel"] * 2]
    assert all(launches[i] == launches[i % step] for i in range(len(launches)))


@pytest.mark.parametrize("kv_dtype", [torch.bfloat16, pytest.param(FP8, marks=pytest.mark.long)])
def test_offsets_past_two_to_the_31(device: torch.device, kv_dtype: torch.dtype) -> None:
    """Of a pool of 2^31 elements and more only the touched pages take memory (on a CPU)."""
    case = Case(contexts=(33, 5), dtype=torch.bfloat16, kv_dtype=kv_dtype, heads=2, kv_heads=1)
    inputs = inputs_of(case, device)
    small = inputs.cache.pool
    first = 2**31 // small[0].numel() - len(small) // 2  # some blocks before that element, some past it
    pool = torch.empty(first + len(small), *small.shape[1:], dtype=kv_dtype, device=device)
    pool[first:].view(torch.uint8).copy_(small.view(torch.uint8))
    cache = replace(inputs.cache, pool=pool, block_tables=inputs.cache.block_tables + first)
    out = torch.full(inputs.q.shape, torch.nan, dtype=case.dtype, device=device)
    run(case, replace(inputs, cache=cache), workspace_of(case, device), out)
    assert_near(out, inputs.expected)


def test_two_windows_share_partial_results(device: torch.device) -> None:
    wide, narrow = Case(contexts=(90, 20)), Case(contexts=(90, 20), window=20)
    all_layers = workspace_of(wide, device)
    for case, workspace in [(wide, all_layers), (narrow, all_layers.with_window(20)), (wide, all_layers)]:
        inputs = inputs_of(case, device)
        out = torch.full(inputs.q.shape, torch.nan, device=device)
        run(case, inputs, workspace, out)
        assert_near(out, inputs.expected, units=16)
    assert all_layers.with_window(3).part_out is all_layers.part_out


PLANS = {
    "log-uniform 320 to 32,000": [round(320 * 100 ** random.Random(i).random()) for i in range(64)],
    "8 x 32k": [32768] * 8,
    "64 x 4k": [4096] * 64,
    "1 x 1k": [1024],
    "1 x 100k": [100_000],
    "300 short, padding between": [0 if i % 7 == 3 else 1 + i % 50 for i in range(300)],
    "nothing": [0, 0, 0],
}


@pytest.mark.parametrize("window", [None, 1000])
@pytest.mark.parametrize("lengths", PLANS.values(), ids=PLANS)
def test_plan_gives_every_tile_to_one_program_and_all_the_same(
    device: torch.device, lengths: list[int], window: int | None
) -> None:
    """With the numbers of an H100: 33 places per kv head, 66 programs."""
    case = Case(contexts=tuple(lengths), heads=1, kv_heads=1, tile=64, block_size=64, programs=66, window=window)
    workspace = workspace_of(case, device)
    context_lens = torch.tensor(lengths, dtype=torch.int32, device=device)
    plan_decode(context_lens, torch.arange(len(lengths) + 1, dtype=torch.int32, device=device), workspace)
    shifts = [max(0, n - window) // 64 if window else 0 for n in lengths]
    counts = [-(-n // 64) - shift for n, shift in zip(lengths, shifts, strict=True)]
    total = sum(counts)
    run_length = max(-(-total // 66), min(-(-total // 33), 4), 1)
    owned = []  # (sequence, tile, program)
    rows, next_tile = workspace.rows.tolist(), 0
    for p, (first, end, first_seq, end_seq) in enumerate(workspace.runs.tolist()):
        assert (first, end) == (min(p * run_length, total), min((p + 1) * run_length, total))
        for b in range(first_seq, end_seq):
            begins, ends, shift, *_ = rows[b]
            tiles = range(max(first, begins), min(end, ends))
            assert tiles or lengths[b] == 0, "a result over no tile is NaN, in place of another program's"
            owned += [(b, t - begins + shift, p) for t in tiles]
    assert [(b, tile) for b, tile, _ in owned] == [(b, s + i) for b, s in enumerate(shifts) for i in range(counts[b])]
    for b, length in enumerate(lengths):
        programs = [p for sequence, _, p in owned if sequence == b]
        assert rows[b][2:6] == [shifts[b], length, b, 1 if length else 0]
        assert rows[b][7] == len(set(programs))
        assert not programs or rows[b][6] == programs[0]
        next_tile += counts[b]
    assert next_tile == total


def test_an_empty_step_launches_nothing() -> None:
    case = Case(contexts=())
    workspace = workspace_of(case, torch.device("cpu"), max_seqs=1)
    empty = torch.zeros(0, dtype=torch.int32)
    plan_decode(empty, torch.zeros(1, dtype=torch.int32), workspace)
    q, out = torch.zeros(0, 4, 64), torch.zeros(0, 4, 64)
    pool, tables = torch.zeros(1, 2, 2, 16, 64), torch.zeros(0, 1, dtype=torch.int32)
    decode_attention(q, pool, tables, empty, torch.zeros(1, dtype=torch.int32), workspace, out, scale=1.0)
    assert int(workspace.rows.max()) < 0
