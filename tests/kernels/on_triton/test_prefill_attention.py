"""Prefill attention against its reference: packed sequences of every length, cached prefixes, windows, caps, fp8, poison.

Every slot that no token may read holds NaN, and so does the output before the call.
"""

import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.prefill_attention_case import Case, make_inputs

from biphase.kernels.gpu.target import AOT_TARGETS, target_of
from biphase.kernels.prefill_attention import settings as launch_settings
from biphase.kernels.prefill_attention.reference import prefill_attention_paged_reference, prefill_attention_reference
from biphase.kernels.prefill_attention.settings import BLOCK_SIZES, HEAD_DIMS, PrefillShape, candidates, default
from biphase.kernels.prefill_attention.tile_plan import tile_list
from biphase.kernels.prefill_attention.triton_gpu import prefill_attention

BF16, F16, F8 = torch.bfloat16, torch.float16, torch.float8_e4m3fn
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""Largest error over largest value: of the sums in float32, else of rounding weights and output."""


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
