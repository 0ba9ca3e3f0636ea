"""Prefill attention against its reference: packed sequences of every length, cached prefixes, windows, caps, fp8, poison.

Every slot that no token may read holds NaN, and so does the output before the call.
"""

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.triton_interpreter import patch_interpreter

from biphase.kernels.gpu import table_check
from biphase.kernels.gpu.target import AOT_TARGETS, compiling_for, target_of
from biphase.kernels.prefill_attention import settings as launch_settings
from biphase.kernels.prefill_attention.reference import prefill_attention_paged_reference, prefill_attention_reference
from biphase.kernels.prefill_attention.settings import BLOCK_SIZES, HEAD_DIMS, PrefillShape, candidates, default
from biphase.kernels.prefill_attention.tile_plan import PrefillPlan, plan_prefill, tile_list
from biphase.kernels.prefill_attention.triton_gpu import prefill_attention

patch_interpreter()

F8 = torch.float8_e4m3fn
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""Largest error over largest value: of the sums in float32, else of rounding weights and output."""


@dataclass(frozen=True, kw_only=True)
class Case:
    query_lens: tuple[int, ...]
    context_lens: tuple[int, ...]
    heads: int = 4
    kv_heads: int = 2
    dim: int = 64
    block_size: int = 64
    dtype: torch.dtype = torch.float32
    kv_dtype: torch.dtype | None = None
    window: int | None = None
    soft_cap: float | None = None
    scale: float | None = None
    first_row: int = 0
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Inputs:
    q_NHD: torch.Tensor
    pool_layer: torch.Tensor
    block_tables: torch.Tensor
    out_NHD: torch.Tensor
    kv_scale: torch.Tensor | None

    def plan(self, case: Case) -> PrefillPlan:
        return plan_prefill(
            case.query_lens,
            case.context_lens,
            self.block_tables,
            self.pool_layer,
            num_heads=case.heads,
            first_row=case.first_row,
        )


def make_inputs(case: Case, device: torch.device) -> Inputs:
    generator = torch.Generator().manual_seed(case.seed)
    kv_dtype = case.kv_dtype or case.dtype
    needed = [-(-context // case.block_size) for context in case.context_lens]
    num_blocks = sum(needed) + 3
    free = list(range(num_blocks))
    random.Random(case.seed).shuffle(free)
    # past a sequence's blocks a table holds anything: here, blocks full of NaN
    tables = torch.full((len(needed), max(needed) + 1), free[-1], dtype=torch.int32)
    pool = torch.full((num_blocks, 2, case.kv_heads, case.block_size, case.dim), torch.nan)
    for sequence, context in enumerate(case.context_lens):
        blocks = [free.pop(0) for _ in range(needed[sequence])]
        tables[sequence, : len(blocks)] = torch.tensor(blocks, dtype=torch.int32)
        for index, block in enumerate(blocks):
            count = min(case.block_size, context - index * case.block_size)
            pool[block, :, :, :count] = torch.randn(2, case.kv_heads, count, case.dim, generator=generator)
    kv_scale = None
    if kv_dtype == F8:
        kv_scale = (0.01 + 0.02 * torch.rand(2, case.kv_heads, generator=generator)).to(device)
        pool = pool / kv_scale.cpu()[None, :, :, None, None]
    rows = case.first_row + sum(case.query_lens) + 2
    # strided as the fused product leaves it: q, then k and v, which are none of this kernel's business
    width = (case.heads + 2 * case.kv_heads) * case.dim
    qkv = torch.full((rows, width), torch.nan)
    used = slice(case.first_row, rows - 2)
    qkv[used, : case.heads * case.dim] = torch.randn(
        rows - 2 - case.first_row, case.heads * case.dim, generator=generator
    )
    qkv = qkv.to(case.dtype).to(device)
    return Inputs(
        q_NHD=qkv[:, : case.heads * case.dim].view(rows, case.heads, case.dim),
        pool_layer=pool.to(kv_dtype).to(device),
        block_tables=tables.to(device),
        out_NHD=torch.full((rows, case.heads, case.dim), torch.nan, dtype=case.dtype, device=device),
        kv_scale=kv_scale,
    )


def check(case: Case, device: torch.device) -> None:
    if case.kv_dtype == F8 and target_of(device).capability < 89:
        pytest.skip("no fp8 arithmetic on this GPU")
    inputs = make_inputs(case, device)
    plan = inputs.plan(case)
    expected = torch.full_like(inputs.out_NHD, torch.nan, dtype=torch.float32)
    for function, out in ((prefill_attention_paged_reference, expected), (prefill_attention, inputs.out_NHD)):
        function(
            inputs.q_NHD,
            inputs.pool_layer,
            plan,
            out,
            scale=case.scale or 1 / math.sqrt(case.dim),
            window=case.window,
            soft_cap=case.soft_cap,
            kv_scale=inputs.kv_scale,
        )
    used = slice(case.first_row, case.first_row + sum(case.query_lens))
    got, wanted = inputs.out_NHD[used].float(), expected[used]
    assert torch.isfinite(wanted).all()
    assert float((got - wanted).abs().max()) <= TOLERANCE[case.dtype] * float(wanted.abs().max())
    untouched = torch.ones(len(expected), dtype=torch.bool)
    untouched[used] = False
    assert inputs.out_NHD[untouched.to(device)].isnan().all(), "rows outside of the plan were written"


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    """Makes launch and plan take these settings instead of the default."""

    def take(**settings: int) -> None:
        monkeypatch.setattr(launch_settings, "tuned", lambda op, target, key: settings)

    yield take


BF16, F16 = torch.bfloat16, torch.float16

QUICK = {
    "one token": Case(query_lens=(1,), context_lens=(1,), heads=1, kv_heads=1),
    "bf16, uneven, prefixes": Case(query_lens=(40, 1, 17), context_lens=(40, 150, 97), heads=8, dtype=BF16, dim=128),
    "window within a tile": Case(query_lens=(40, 9), context_lens=(75, 100), window=17, dtype=BF16),
    "soft cap": Case(query_lens=(20,), context_lens=(90,), soft_cap=3.0),
    "scores far apart": Case(query_lens=(3,), context_lens=(200,), scale=8.0, dtype=BF16),
    "fp8": Case(query_lens=(20,), context_lens=(100,), kv_dtype=F8, dtype=BF16, dim=96),
    "blocks smaller than a tile": Case(query_lens=(50, 3), context_lens=(120, 35), block_size=16, dtype=BF16, heads=6),
}

LONG = {
    "empty among others": Case(query_lens=(0, 5, 0, 64), context_lens=(0, 5, 30, 64), heads=3, kv_heads=3),
    "block edges": Case(query_lens=(63, 64, 65, 1), context_lens=(63, 128, 129, 65), dtype=BF16, heads=8),
    "one query at each edge": Case(query_lens=(1,) * 6, context_lens=(63, 64, 65, 127, 128, 129), dtype=BF16),
    "very uneven": Case(query_lens=(1, 250, 2), context_lens=(300, 250, 2), dtype=F16, heads=2, kv_heads=1),
    "group of 1": Case(query_lens=(150,), context_lens=(200,), heads=2, kv_heads=2, dtype=BF16),
    "group of 3": Case(query_lens=(90, 14), context_lens=(90, 80), heads=6, dtype=BF16),
    "group of 5, 128-token blocks": Case(
        query_lens=(47,), context_lens=(190,), heads=5, kv_heads=1, block_size=128, dtype=BF16
    ),
    "group of 8, head_dim 256": Case(query_lens=(40,), context_lens=(100,), heads=8, kv_heads=1, dim=256, dtype=F16),
    "head_dim 256, float32": Case(query_lens=(40,), context_lens=(41,), heads=2, kv_heads=1, dim=256, block_size=32),
    "head_dim 96": Case(query_lens=(80,), context_lens=(150,), dim=96, dtype=BF16),
    "head_dim 96, float32": Case(query_lens=(33,), context_lens=(99,), dim=96, block_size=16),
    "head_dim 96, small blocks": Case(query_lens=(80,), context_lens=(150,), dim=96, dtype=F16, block_size=32),
    "window 1": Case(query_lens=(70,), context_lens=(70,), window=1, dtype=BF16),
    "window of a block": Case(query_lens=(70, 5), context_lens=(200, 64), window=64, dtype=BF16),
    "window of a block and one": Case(query_lens=(10,), context_lens=(250,), window=65, heads=8, dtype=BF16),
    "window over all": Case(query_lens=(70, 5), context_lens=(200, 64), window=500, dtype=BF16),
    "window, small blocks": Case(query_lens=(20, 5), context_lens=(200, 64), window=37, block_size=16, dtype=BF16),
    "window, float32": Case(query_lens=(60, 5), context_lens=(160, 64), window=50, block_size=64),
    "cap and window": Case(query_lens=(30,), context_lens=(150,), window=70, soft_cap=5.0, dtype=BF16),
    "cap, fp8": Case(query_lens=(30,), context_lens=(150,), soft_cap=2.0, dtype=BF16, kv_dtype=F8, dim=128),
    "fp8, float16 queries": Case(query_lens=(60, 8), context_lens=(130, 8), kv_dtype=F8, dtype=F16, dim=64),
    "fp8, small blocks": Case(query_lens=(30,), context_lens=(77,), kv_dtype=F8, dtype=BF16, block_size=32),
    "rows from the middle of a step": Case(query_lens=(30, 4), context_lens=(77, 4), first_row=9, dtype=BF16),
}


@pytest.mark.parametrize("name", QUICK)
def test_it_equals_the_reference(name: str, device: torch.device) -> None:
    check(QUICK[name], device)


@pytest.mark.long
@pytest.mark.parametrize("name", LONG)
def test_it_equals_the_reference_in_more_cases(name: str, device: torch.device) -> None:
    check(LONG[name], device)


LOADS = {
    "bulk copies, a block per tile": (64, {"BLOCK_N": 64, "EDGE_N": 64, "USE_TMA": 1, "OVERLAP": 1}),
    "bulk copies, half a block per tile": (128, {"BLOCK_N": 64, "EDGE_N": 32, "USE_TMA": 1, "OVERLAP": 0}),
    "bulk copies, small tiles": (64, {"BLOCK_N": 32, "EDGE_N": 16, "USE_TMA": 1, "OVERLAP": 1}),
    "pointers, a block per tile": (64, {"BLOCK_N": 64, "EDGE_N": 32, "USE_TMA": 0, "OVERLAP": 1}),
    "pointers, half a block per tile": (64, {"BLOCK_N": 32, "EDGE_N": 32, "USE_TMA": 0, "OVERLAP": 0}),
    "pointers, two blocks per tile": (32, {"BLOCK_N": 64, "EDGE_N": 64, "USE_TMA": 0, "OVERLAP": 1}),
    "pointers, two large blocks per tile": (64, {"BLOCK_N": 128, "EDGE_N": 64, "USE_TMA": 0, "OVERLAP": 0}),
    "pointers, four blocks per tile": (16, {"BLOCK_N": 64, "EDGE_N": 64, "USE_TMA": 0, "OVERLAP": 1}),
    "pointers, four blocks per tile, no overlap": (16, {"BLOCK_N": 64, "EDGE_N": 32, "USE_TMA": 0, "OVERLAP": 0}),
}
"""Block size and settings. In the cases below a tile of queries has two or more tiles of keys that all its rows see."""


@pytest.mark.parametrize("loads", LOADS)
@pytest.mark.parametrize("window", [None, 230], ids=["causal", "window"])
def test_every_way_to_load_gives_the_same(  # type: ignore[no-untyped-def]
    loads: str, window: int | None, device: torch.device, use
) -> None:
    block_size, chosen = LOADS[loads]
    use(BLOCK_M=64, num_warps=4, num_stages=2, **chosen)
    check(
        Case(query_lens=(40, 5), context_lens=(280, 129), block_size=block_size, dtype=BF16, window=window),
        device,
    )


@pytest.mark.parametrize("overlap", [1, 0])
@pytest.mark.parametrize("name", ["fp8", "soft cap", "head_dim 96, window"])
def test_overlap_changes_nothing(name: str, overlap: int, device: torch.device, use) -> None:  # type: ignore[no-untyped-def]
    cases = {
        "fp8": Case(query_lens=(9,), context_lens=(230,), kv_dtype=F8, dtype=BF16),
        "soft cap": Case(query_lens=(9,), context_lens=(230,), soft_cap=3.0, dtype=F16),
        "head_dim 96, window": Case(query_lens=(9,), context_lens=(260,), dim=96, window=220, dtype=BF16),
    }
    use(BLOCK_M=32, BLOCK_N=64, EDGE_N=64, USE_TMA=overlap, OVERLAP=overlap, num_warps=4, num_stages=2)
    check(cases[name], device)


def test_candidates_are_what_the_kernel_takes() -> None:
    for target in AOT_TARGETS.values():
        for dim in HEAD_DIMS:
            for block_size in BLOCK_SIZES:
                for dtype in (torch.float32, BF16, F8):
                    shape = PrefillShape(head_dim=dim, block_size=block_size, kv_dtype=dtype)
                    found = candidates(target, shape)
                    assert found[0] == default(target, shape)
                    assert all(found.count(candidate) == 1 for candidate in found)
                    for candidate in found:
                        assert candidate["BLOCK_N"] % candidate["EDGE_N"] == 0
                        assert not candidate["USE_TMA"] or block_size % candidate["BLOCK_N"] == 0
                        assert not candidate["OVERLAP"] or dtype != torch.float32, "weights cross as 16 bits"


@pytest.mark.long
@pytest.mark.parametrize("dtype", [torch.float32, BF16, F8], ids=str)
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("block_size", [32, 64])
def test_all_candidates_compute_the_same(  # type: ignore[no-untyped-def]
    dtype: torch.dtype, dim: int, block_size: int, device: torch.device, use
) -> None:
    shape = PrefillShape(head_dim=dim, block_size=block_size, kv_dtype=dtype)
    computed_in = BF16 if dtype == F8 else dtype
    case = Case(
        query_lens=(37,), context_lens=(240,), dtype=computed_in, kv_dtype=dtype, dim=dim, block_size=block_size
    )
    # the interpreter runs any GPU's; there warps and stages are nothing
    targets = AOT_TARGETS.values() if device.type == "cpu" else [target_of(device)]
    found = {
        tuple(s.values())[: None if device.type == "cuda" else -2]: s for t in targets for s in candidates(t, shape)
    }
    for candidate in found.values():
        use(**candidate)
        check(case, device)


@pytest.mark.long
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(data=st.data())
def test_any_lengths(data: st.DataObject, device: torch.device) -> None:
    group = data.draw(st.integers(1, 8))
    contexts = data.draw(st.lists(st.integers(1, 200), min_size=1, max_size=3))
    check(
        Case(
            query_lens=tuple(data.draw(st.integers(0, min(context, 90))) for context in contexts[:-1])
            + (data.draw(st.integers(1, min(contexts[-1], 90))),),
            context_lens=tuple(contexts),
            heads=group,
            kv_heads=1,
            block_size=data.draw(st.sampled_from([16, 32, 64, 128])),
            dtype=data.draw(st.sampled_from([torch.float32, BF16])),
            window=data.draw(st.none() | st.integers(1, 150)),
            seed=data.draw(st.integers(0, 99)),
        ),
        device,
    )


def test_blocks_behind_the_window_are_not_read(device: torch.device) -> None:
    """They may have been given back: their table entries mean nothing, their slots hold NaN."""
    for block_size in (64, 16):
        case = Case(query_lens=(20,), context_lens=(230,), window=40, block_size=block_size, dtype=BF16)
        inputs = make_inputs(case, device)
        arguments = (inputs.q_NHD, inputs.pool_layer, inputs.plan(case))
        expected = torch.full_like(inputs.out_NHD, torch.nan)
        prefill_attention_paged_reference(*arguments, expected, scale=0.125, window=40)
        last_unseen = (230 - 20 + 1 - 40) // block_size
        inputs.pool_layer[inputs.block_tables[0, :last_unseen].long()] = torch.nan
        inputs.block_tables[0, :last_unseen] = inputs.block_tables[0, -1]
        prefill_attention(*arguments, inputs.out_NHD, scale=0.125, window=40)
        torch.testing.assert_close(inputs.out_NHD[:20], expected[:20], rtol=0.02, atol=0.01)


def test_an_empty_step_launches_nothing(device: torch.device) -> None:
    case = Case(query_lens=(0, 0), context_lens=(5, 0))
    inputs = make_inputs(case, device)
    prefill_attention(inputs.q_NHD, inputs.pool_layer, inputs.plan(case), inputs.out_NHD, scale=1.0)
    assert inputs.out_NHD.isnan().all()


def test_a_cache_past_2_to_the_31_elements(device: torch.device) -> None:
    """Of 4 GiB on the CPU only the pages that are touched exist."""
    case = Case(query_lens=(5,), context_lens=(70,), heads=1, kv_heads=1, dtype=F16)
    small = make_inputs(case, device)
    per_block = small.pool_layer[0].numel()
    num_blocks = 2**31 // per_block + 2
    if device.type == "cuda" and torch.cuda.mem_get_info()[0] < 3 * num_blocks * per_block:
        pytest.skip("the GPU's memory is taken")
    pool = torch.empty((num_blocks, *small.pool_layer.shape[1:]), dtype=F16, device=device)
    moved = torch.tensor([[num_blocks - 1, num_blocks - 2, num_blocks - 2]], dtype=torch.int32, device=device)
    pool[moved[0, :2].long()] = small.pool_layer[small.block_tables[0, :2].long()]
    large = replace(small, pool_layer=pool, block_tables=moved, out_NHD=small.out_NHD.clone())
    for inputs in (small, large):
        prefill_attention(inputs.q_NHD, inputs.pool_layer, inputs.plan(case), inputs.out_NHD, scale=0.125)
    assert torch.equal(small.out_NHD[:5], large.out_NHD[:5])
    assert torch.isfinite(large.out_NHD[:5]).all()


def test_the_paged_reference_is_the_plain_one(device: torch.device) -> None:
    case = Case(query_lens=(9, 3), context_lens=(20, 30), block_size=16, window=11)
    inputs = make_inputs(case, device)
    out = torch.empty_like(inputs.out_NHD)
    prefill_attention_paged_reference(
        inputs.q_NHD, inputs.pool_layer, inputs.plan(case), out, scale=1 / math.sqrt(case.dim), window=11
    )
    for sequence, rows in enumerate((slice(0, 9), slice(9, 12))):
        start = case.context_lens[sequence] - case.query_lens[sequence]
        expected = prefill_attention_reference(
            inputs.q_NHD[rows], inputs.pool_layer, inputs.block_tables[sequence].tolist(), start, 11
        )
        torch.testing.assert_close(out[rows], expected)


def test_tiles_cover_every_row_once_heaviest_first() -> None:
    tiles = tile_list([100, 0, 33, 1], [100, 50, 500, 7], 4, 128, first_row=10)
    covered = sorted((row[0], row[1]) for row in tiles.tolist())
    assert covered == [(0, 0), (0, 128), (0, 256), (0, 384), (2, 0), (2, 128), (3, 0)]
    assert [row[:5] for row in tiles.tolist()[:3]] == [
        [2, 128, 110, 132, 467],
        [2, 0, 110, 132, 467],
        [0, 384, 10, 400, 0],
    ]
    assert tiles.tolist()[-1][:5] == [3, 0, 143, 4, 6]


def meta_inputs(**change: torch.Tensor) -> dict[str, torch.Tensor]:
    return {
        "q_NHD": torch.empty(8, 4, 64, dtype=BF16, device="meta"),
        "pool_layer": torch.empty(5, 2, 2, 64, 64, dtype=BF16, device="meta"),
        "out_NHD": torch.empty(8, 4, 64, dtype=BF16, device="meta"),
        **change,
    }


def launch_on_meta(tensors: dict[str, torch.Tensor], **options: object) -> None:
    pool = meta_inputs()["pool_layer"]
    plan = plan_prefill([8], [8], torch.empty(1, 4, dtype=torch.int32, device="meta"), pool, num_heads=4)
    arguments: dict[str, object] = {"scale": 1.0, **options}
    prefill_attention(tensors["q_NHD"], tensors["pool_layer"], plan, tensors["out_NHD"], **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("named", "change"),
    [
        ("q has dtype", {"q_NHD": torch.empty(8, 4, 64, dtype=torch.float64, device="meta")}),
        ("q has shape", {"q_NHD": torch.empty(8, 3, 64, dtype=BF16, device="meta")}),
        ("q has stride 2", {"q_NHD": torch.empty(8, 4, 128, dtype=BF16, device="meta")[..., ::2]}),
        ("q has a stride of 520", {"q_NHD": torch.empty(8, 260, dtype=BF16, device="meta")[:, :256].view(8, 4, 64)}),
        ("head_dim is 80", {"q_NHD": torch.empty(8, 4, 80, dtype=BF16, device="meta")}),
        ("out has dtype", {"out_NHD": torch.empty(8, 4, 64, device="meta")}),
        ("q has shape", {"q_NHD": torch.empty(8, 256, dtype=BF16, device="meta")}),
        ("q starts 2 bytes", {"q_NHD": torch.empty(2049, dtype=BF16)[1:].view(8, 4, 64)}),
        ("out has a stride", {"out_NHD": torch.empty(8, 260, dtype=BF16, device="meta")[:, :256].view(8, 4, 64)}),
        ("out has stride 2", {"out_NHD": torch.empty(8, 4, 128, dtype=BF16, device="meta")[..., ::2]}),
        ("out starts 2 bytes", {"out_NHD": torch.empty(2049, dtype=BF16)[1:].view(8, 4, 64)}),
        ("pool_layer starts 2 bytes", {"pool_layer": torch.empty(81921, dtype=BF16)[1:].view(5, 2, 2, 64, 64)}),
        ("pool_layer with shape", {"pool_layer": torch.empty(5, 2, 2, 64, 128, dtype=BF16, device="meta")[..., ::2]}),
        ("q has 4 heads", {"pool_layer": torch.empty(5, 2, 0, 64, 64, dtype=BF16, device="meta")}),
        ("tensors on several devices", {"pool_layer": torch.empty(5, 2, 2, 64, 64, dtype=BF16)}),
        ("out has shape", {"out_NHD": torch.empty(7, 4, 64, dtype=BF16, device="meta")}),
        ("pool_layer has dtype", {"pool_layer": torch.empty(5, 2, 2, 64, 64, device="meta")}),
        ("pool_layer has shape", {"pool_layer": torch.empty(5, 2, 64, 64, dtype=BF16, device="meta")}),
        ("block_size is 48", {"pool_layer": torch.empty(5, 2, 2, 48, 64, dtype=BF16, device="meta")}),
        ("q has 4 heads", {"pool_layer": torch.empty(5, 2, 3, 64, 64, dtype=BF16, device="meta")}),
        ("kv_scale is missing", {"pool_layer": torch.empty(5, 2, 2, 64, 64, dtype=F8, device="meta")}),
        ("q has 4 rows", {n: torch.empty(4, 4, 64, dtype=BF16, device="meta") for n in ("q_NHD", "out_NHD")}),
    ],
)
def test_bad_tensors_are_named(named: str, change: dict[str, torch.Tensor]) -> None:
    with compiling_for(AOT_TARGETS[90]), pytest.raises(ValueError, match=f"^{named}"):
        launch_on_meta(meta_inputs(**change))


@pytest.mark.parametrize(
    ("named", "options"),
    [
        ("scale is 0", {"scale": 0.0}),
        ("window is 0", {"window": 0}),
        ("soft_cap is -1", {"soft_cap": -1.0}),
        ("scale is nan", {"scale": float("nan")}),
        ("kv_scale was given", {"kv_scale": torch.empty(2, 2, device="meta")}),
    ],
)
def test_bad_options_are_named(named: str, options: dict[str, object]) -> None:
    with compiling_for(AOT_TARGETS[90]), pytest.raises(ValueError, match=f"^{named}"):
        launch_on_meta(meta_inputs(), **options)


@pytest.mark.parametrize(
    ("named", "query_lens", "context_lens"),
    [
        ("query_lens has 2 entries", [1, 1], [1]),
        (r"query_lens\[0\] is 5", [5], [4]),
        (r"context_lens\[0\] is 257", [1], [257]),
    ],
)
def test_bad_lengths_are_named(named: str, query_lens: list[int], context_lens: list[int]) -> None:
    tables = torch.zeros(1, 4, dtype=torch.int32)
    with pytest.raises(ValueError, match=f"^{named}"):
        plan_prefill(query_lens, context_lens, tables, torch.empty(5, 2, 2, 64, 64), num_heads=4)


@pytest.mark.parametrize(
    ("named", "change"),
    [
        ("block_tables is int64", {"block_tables": torch.zeros(1, 4, dtype=torch.int64)}),
        (r"block_tables is int32 \[4\]", {"block_tables": torch.zeros(4, dtype=torch.int32)}),
        ("block_tables is int32 .* with strides", {"block_tables": torch.zeros(1, 8, dtype=torch.int32)[:, ::2]}),
        ("block_tables starts 4 bytes", {"block_tables": torch.zeros(1, 5, dtype=torch.int32)[:, 1:]}),
        ("pool_layer has shape", {"pool_layer": torch.empty(5, 2, 2, 64)}),
        ("pool_layer has shape", {"pool_layer": torch.empty(5, 3, 2, 64, 64)}),
        ("head_dim is 80", {"pool_layer": torch.empty(5, 2, 2, 64, 80)}),
        ("block_size is 48", {"pool_layer": torch.empty(5, 2, 2, 48, 64)}),
        ("num_heads is 4, no multiple of the 0", {"pool_layer": torch.empty(5, 2, 0, 64, 64)}),
        ("num_heads is 5", {"num_heads": 5}),
        ("num_heads is 0", {"num_heads": 0}),
        ("first_row is -1", {"first_row": -1}),
    ],
)
def test_bad_arguments_of_the_plan_are_named(named: str, change: dict[str, Any]) -> None:
    arguments = {
        "query_lens": [3],
        "context_lens": [4],
        "block_tables": torch.zeros(1, 4, dtype=torch.int32),
        "pool_layer": torch.empty(5, 2, 2, 64, 64),
        "num_heads": 4,
    }
    with pytest.raises(ValueError, match=f"^{named}"):
        plan_prefill(**arguments | change)


@pytest.mark.parametrize(
    ("named", "kv_scale"),
    [
        ("kv_scale has dtype", torch.empty(2, 2, dtype=BF16, device="meta")),
        ("kv_scale has shape", torch.empty(2, 3, device="meta")),
        ("kv_scale with", torch.empty(2, 4, device="meta")[:, ::2]),
        ("tensors on several devices", torch.empty(2, 2)),
    ],
)
def test_bad_scales_are_named(named: str, kv_scale: torch.Tensor) -> None:
    change = {"pool_layer": torch.empty(5, 2, 2, 64, 64, dtype=F8, device="meta")}
    with compiling_for(AOT_TARGETS[90]), pytest.raises(ValueError, match=f"^{named}"):
        launch_on_meta(meta_inputs(**change), kv_scale=kv_scale)


@pytest.mark.parametrize("kv_dtype", [torch.float16, F8])
def test_a_query_that_is_not_a_number_is_seen(kv_dtype: torch.dtype, device: torch.device) -> None:
    """In its own head and token, not in others."""
    if kv_dtype == F8 and target_of(device).capability < 89:
        pytest.skip("no fp8 arithmetic on this GPU")
    case = Case(query_lens=(5,), context_lens=(70,), dtype=torch.float16, kv_dtype=kv_dtype)
    inputs = make_inputs(case, device)
    inputs.q_NHD[3, 2, 7] = torch.nan
    out = torch.zeros_like(inputs.out_NHD)
    prefill_attention(inputs.q_NHD, inputs.pool_layer, inputs.plan(case), out, scale=0.1, kv_scale=inputs.kv_scale)
    expected = torch.zeros(out.shape[:2], dtype=torch.bool)
    expected[3, 2] = True
    assert torch.equal(out.isnan().all(-1).cpu(), expected) and torch.equal(out.isnan().any(-1).cpu(), expected)


@pytest.mark.parametrize(
    ("window", "query", "entries", "message"),
    [
        (None, 5, (0, 3, 9), r"block_tables\[0, 1\] is 3, the pool has blocks 0 to 2"),
        (None, 5, (-1, 0, 9), r"block_tables\[0, 0\] is -1"),
        (33, 5, (-1, 0, 9), r"block_tables\[0, 0\] is -1"),
        (32, 5, (0, -1, 9), r"block_tables\[0, 1\] is -1"),
        (32, 5, (-1, 0, 9), None),
        (None, 0, (9, 9, 9), None),
    ],
)
def test_debug_mode_checks_block_tables(
    window: int | None, query: int, entries: tuple[int, ...], message: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of blocks that some query token sees. A sequence of 100 tokens is in two blocks of 64."""
    monkeypatch.setattr(table_check, "DEBUG", True)
    pool, q = torch.zeros(3, 2, 2, 64, 64), torch.zeros(5, 4, 64)
    tables = torch.tensor([entries], dtype=torch.int32)
    plan = plan_prefill([query], [100], tables, pool, num_heads=4)
    if message is None:
        prefill_attention(q, pool, plan, torch.empty_like(q), scale=1.0, window=window)
    else:
        with pytest.raises(ValueError, match=f"^{message}"):
            prefill_attention(q, pool, plan, torch.empty_like(q), scale=1.0, window=window)


def test_fp8_is_refused_where_there_is_none() -> None:
    change = {"pool_layer": torch.empty(5, 2, 2, 64, 64, dtype=F8, device="meta")}
    with compiling_for(AOT_TARGETS[80]), pytest.raises(ValueError, match="fp8 KV cache needs a GPU of capability 8.9"):
        launch_on_meta(meta_inputs(**change), kv_scale=torch.empty(2, 2, device="meta"))
