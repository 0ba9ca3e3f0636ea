"""Routing and the products by expert against their references: experts without tokens, one with all, padding, NaN."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from biphase.kernels.moe import triton_gpu
from biphase.kernels.moe.reference import (
    combine_reference,
    grouped_down_reference,
    grouped_gate_up_reference,
    route_rows_reference,
)
from biphase.kernels.moe.routing import Routing, RoutingWorkspace, token_block

TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def workspace(tokens: int, experts: int, taken: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Any:
    made = RoutingWorkspace(max_tokens=tokens, num_experts=experts, num_taken=taken, dtype=dtype, device=device)
    for name in ("_weights", "_expert_ids", "_sorted_pairs", "_tile_experts", "_tile_firsts", "ranks", "block_counts"):
        tensor = getattr(made, name)
        tensor.fill_(torch.nan if tensor.is_floating_point() else -(10**9))  # nothing of before may be relied on
    return made


def aligned(logits: torch.Tensor) -> torch.Tensor:
    """The same in rows of a multiple of 16 bytes, NaN behind each."""
    tokens, experts = logits.shape
    wide = logits.new_full((tokens, -(-experts // 8) * 8), torch.nan)
    wide[:, :experts] = logits
    return wide[:, :experts]


def routed(
    logits: torch.Tensor, taken: int, renormalize: bool = True, slots: torch.Tensor | None = None
) -> tuple[Routing, Routing]:
    """As the kernels route, and as the reference does."""
    tokens, experts = logits.shape
    logits = logits if logits.stride(0) * logits.element_size() % 16 == 0 else aligned(logits)
    found = triton_gpu.route(
        logits, workspace(tokens, experts, taken, logits.device), renormalize=renormalize, slots=slots
    )
    expected = route_rows_reference(
        logits,
        workspace(tokens, experts, taken, logits.device),
        renormalize=renormalize,
        slots=slots,
        tile_rows=found.tile_rows,
    )
    return found, expected


def assert_same_routing(found: Routing, expected: Routing) -> None:
    assert torch.equal(found.expert_ids, expected.expert_ids)
    torch.testing.assert_close(found.weights, expected.weights, rtol=2e-6, atol=1e-7, equal_nan=True)
    assert torch.equal(found.expert_starts, expected.expert_starts)
    assert torch.equal(found.num_tiles, expected.num_tiles)
    pairs, tiles = int(expected.expert_starts[-1]), int(expected.num_tiles)
    assert tiles <= found.max_tiles
    assert torch.equal(found.sorted_pairs[:pairs], expected.sorted_pairs[:pairs])
    assert torch.equal(found.tile_experts[:tiles], expected.tile_experts[:tiles])
    assert torch.equal(found.tile_firsts[:tiles], expected.tile_firsts[:tiles])


ROUTES = [
    pytest.param(1, 8, 2, id="one-token"),
    pytest.param(17, 128, 8, id="qwen3"),
    pytest.param(200, 6, 2, id="experts-no-power-of-two", marks=pytest.mark.long),
    pytest.param(70, 128, 8, id="two-blocks"),
    pytest.param(290, 60, 4, id="three-blocks", marks=pytest.mark.long),
    pytest.param(3, 1, 1, id="one-expert"),
    pytest.param(40, 5, 5, id="all-taken"),
    pytest.param(9, 300, 32, id="most-taken", marks=pytest.mark.long),
]


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize(("tokens", "experts", "taken"), ROUTES)
def test_routing(device: torch.device, tokens: int, experts: int, taken: int, renormalize: bool) -> None:
    generator = torch.Generator().manual_seed(tokens)
    logits = (3 * torch.randn(tokens, experts, generator=generator)).to(device)
    assert_same_routing(*routed(logits, taken, renormalize))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_routing_of_rows_within_wider_ones(device: torch.device, dtype: torch.dtype) -> None:
    wide = torch.randn(20, 48, generator=torch.Generator().manual_seed(1)).to(dtype).to(device)
    wide[:, 16:] = torch.nan
    assert_same_routing(*routed(wide[:, :16], 3))


@pytest.mark.parametrize("tokens", [5, 2 * token_block(64) - 3])
def test_equal_logits_go_to_the_lower_expert(device: torch.device, tokens: int) -> None:
    logits = torch.zeros(tokens, 64, device=device)
    logits[:, 1::2] = -0.0
    logits[1] = -torch.inf
    logits[2, 40:] = 7.0
    found, expected = routed(logits, 3, False)
    assert_same_routing(found, expected)
    assert found.expert_ids[[0, 1, 2]].tolist() == [[0, 1, 2], [0, 1, 2], [40, 41, 42]]


def test_padding_tokens_take_no_expert(device: torch.device) -> None:
    logits = torch.randn(150, 128, generator=torch.Generator().manual_seed(5)).to(device)
    slots = torch.arange(150, device=device)
    slots[[0, 3, 64, 149]] = -1
    logits[3], logits[149] = torch.nan, torch.inf
    for tokens in (10, 150):
        found, expected = routed(logits[:tokens], 8, True, slots[:tokens].contiguous())
        assert_same_routing(found, expected)
        assert found.expert_ids[3].tolist() == [-1] * 8 and not found.weights[3].any()


def test_broken_logits_break_that_token_only(device: torch.device) -> None:
    logits = torch.randn(4, 8, generator=torch.Generator().manual_seed(6)).to(device)
    logits[1, 2], logits[2] = torch.nan, torch.nan
    found, expected = routed(logits, 2)
    assert_same_routing(found, expected)
    assert found.weights.isnan().any(1).tolist() == [False, True, True, False]


def test_one_expert_with_all_tokens(device: torch.device) -> None:
    logits = torch.zeros(90, 128, device=device)
    logits[:, 77] = 5.0
    found, expected = routed(logits, 1)
    assert_same_routing(found, expected)
    assert set(found.tile_experts[: int(found.num_tiles)].tolist()) == {77}


def feed_forward(
    logits: torch.Tensor,
    taken: int,
    features: int,
    inter: int,
    dtype: torch.dtype,
    *,
    slots: torch.Tensor | None = None,
    seed: int = 0,
) -> None:
    """All products of one layer against their references, each on the same input; outputs and unread rows are NaN."""
    device, (tokens, experts) = logits.device, logits.shape
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (scale * torch.randn(shape, generator=generator)).to(dtype).to(device)

    def blank(*shape: int) -> torch.Tensor:
        return torch.full(shape, torch.nan, dtype=dtype, device=device)

    x = random(tokens, features + 16)[:, :features]  # rows of a wider tensor
    if slots is not None:
        x[slots < 0] = torch.nan

    def weights(*shape: int) -> torch.Tensor:
        """With NaN behind the last: rows of an odd length are read in tiles."""
        padded = blank(shape[0] + 1, *shape[1:])
        padded[:-1] = random(*shape, scale=shape[-1] ** -0.5)
        return padded[:-1]

    gate_up, down = weights(experts, 2 * inter, features), weights(experts, features, inter)
    memory = workspace(tokens, experts, taken, device, dtype)
    routing = triton_gpu.route(aligned(logits), memory, renormalize=True, slots=slots)
    pairs, tolerance = tokens * taken, TOLERANCE[dtype]
    hidden, hidden_expected = blank(pairs, inter), blank(pairs, inter)
    triton_gpu.grouped_gate_up(x, gate_up, routing, hidden)
    grouped_gate_up_reference(x, gate_up, routing, hidden_expected)
    torch.testing.assert_close(hidden, hidden_expected, rtol=tolerance, atol=tolerance, equal_nan=True)
    rows, rows_expected = blank(pairs, features), blank(pairs, features)
    triton_gpu.grouped_down(hidden, down, routing, rows)
    grouped_down_reference(hidden, down, routing, rows_expected)
    torch.testing.assert_close(rows, rows_expected, rtol=tolerance, atol=tolerance, equal_nan=True)
    out, out_expected = blank(tokens, features + 8)[:, :features], blank(tokens, features)
    triton_gpu.combine(rows, routing, out)
    combine_reference(rows, routing, out_expected)
    torch.testing.assert_close(out, out_expected, rtol=tolerance, atol=tolerance)
    assert not out.isnan().any()
    if slots is not None:
        assert not out[slots < 0].any()


CASES = [
    pytest.param(1, 8, 2, 48, 40, torch.float32, id="one-token"),
    pytest.param(37, 5, 2, 72, 56, torch.float32, id="ragged-sizes"),
    pytest.param(20, 4, 2, 64, 96, torch.bfloat16, id="bf16"),
    pytest.param(5, 16, 4, 256, 136, torch.float16, id="fp16-long-rows"),
    pytest.param(24, 128, 8, 40, 24, torch.float32, id="qwen3", marks=pytest.mark.long),
    pytest.param(80, 4, 2, 72, 80, torch.bfloat16, id="tiles-of-64", marks=pytest.mark.long),
    pytest.param(150, 2, 1, 80, 72, torch.bfloat16, id="tiles-of-128", marks=pytest.mark.long),
    pytest.param(260, 3, 2, 64, 136, torch.float16, id="several-tiles-of-128", marks=pytest.mark.long),
    pytest.param(150, 8, 2, 24, 264, torch.float32, id="many-columns", marks=pytest.mark.long),
]


@pytest.mark.parametrize(("tokens", "experts", "taken", "features", "inter", "dtype"), CASES)
def test_feed_forward(
    device: torch.device, tokens: int, experts: int, taken: int, features: int, inter: int, dtype: torch.dtype
) -> None:
    logits = torch.randn(tokens, experts, generator=torch.Generator().manual_seed(tokens)).to(device)
    feed_forward(logits, taken, features, inter, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.long)])
def test_feed_forward_with_idle_experts_and_padding(device: torch.device, dtype: torch.dtype) -> None:
    logits = torch.zeros(33, 8, device=device)
    logits[:, 3], logits[:, 6] = 9.0, 8.0
    slots = torch.arange(33, device=device)
    slots[::5] = -1
    feed_forward(logits, 2, 40, 48, dtype, slots=slots)


@pytest.mark.parametrize("tokens", [2, 40])
def test_a_step_of_padding_alone(device: torch.device, tokens: int) -> None:
    feed_forward(torch.zeros(tokens, 4, device=device), 2, 16, 16, torch.float32, slots=torch.full((tokens,), -1))


def test_no_tokens_launch_nothing(device: torch.device) -> None:
    routing = triton_gpu.route(torch.zeros(0, 4, device=device), workspace(4, 4, 2, device), renormalize=True)
    empty = torch.zeros(0, 16, device=device)
    triton_gpu.grouped_gate_up(empty, torch.zeros(4, 32, 16, device=device), routing, empty)
    triton_gpu.grouped_down(empty, torch.zeros(4, 16, 16, device=device), routing, empty)
    triton_gpu.combine(empty, routing, empty)


@pytest.mark.parametrize("experts", [4, pytest.param(128, marks=pytest.mark.long)])
@settings(max_examples=4, deadline=None)
@given(data=st.data())
def test_any_routing(device: torch.device, experts: int, data: st.DataObject) -> None:
    tokens = data.draw(st.integers(1, 2 * token_block(experts) if experts > 64 else 40))
    taken = data.draw(st.integers(1, 4))
    values = st.sampled_from([-1.0, 0.0, 0.5, 2.0, -torch.inf])  # many ties
    row = st.lists(values, min_size=experts, max_size=experts)
    rows = data.draw(st.lists(row, min_size=1, max_size=3))
    logits = torch.tensor([rows[i % len(rows)] for i in range(tokens)], device=device)
    slots = torch.tensor([i % data.draw(st.integers(2, 9)) - 1 for i in range(tokens)], device=device)
    assert_same_routing(*routed(logits, taken, data.draw(st.booleans()), slots))


def good(device: torch.device) -> dict[str, Any]:
    memory = RoutingWorkspace(max_tokens=8, num_experts=4, num_taken=2, dtype=torch.float32, device=device)
    return {
        "routing": triton_gpu.route(torch.zeros(4, 4, device=device), memory, renormalize=True),
        "x": torch.zeros(4, 16, device=device),
        "experts": torch.zeros(4, 32, 16, device=device),
        "out": torch.zeros(8, 16, device=device),
    }


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("x", {"x": torch.zeros(3, 16)}),
        ("x", {"x": torch.zeros(4, 32)[:, ::2]}),
        ("x", {"x": torch.zeros(4, 17)[:, :16]}),
        ("x", {"x": torch.zeros(4, 16, dtype=torch.float16)}),
        ("x", {"x": torch.zeros(65)[1:].view(4, 16)}),
        ("experts", {"experts": torch.zeros(32, 16)}),
        ("experts", {"experts": torch.zeros(4, 32, 15), "x": torch.zeros(4, 16)[:, :15]}),
        ("experts", {"experts": torch.zeros(3, 32, 16)}),
        ("experts", {"experts": torch.zeros(4, 31, 16)}),
        ("experts", {"experts": torch.zeros(4, 16, 32).transpose(1, 2)}),
        ("experts", {"experts": torch.zeros(4, 32, 16, dtype=torch.int32)}),
        ("out", {"out": torch.zeros(8, 24)}),
        ("out", {"out": torch.zeros(8, 16, dtype=torch.bfloat16)}),
        ("out", {"out": torch.zeros(8, 17)[:, :16]}),
    ],
)
def test_bad_arguments_of_products_are_named(device: torch.device, name: str, change: dict[str, torch.Tensor]) -> None:
    given = good(device) | {key: value.to(device) for key, value in change.items()}
    with pytest.raises(ValueError, match=f"^{name} "):
        triton_gpu.grouped_gate_up(given["x"], given["experts"], given["routing"], given["out"])


@pytest.mark.parametrize(
    ("name", "rows", "out"),
    [
        ("rows", torch.zeros(7, 16), torch.zeros(4, 16)),
        ("rows", torch.zeros(8), torch.zeros(4, 16)),
        ("rows", torch.zeros(8, 16, dtype=torch.int32), torch.zeros(4, 16)),
        ("rows", torch.zeros(8, 17)[:, :16], torch.zeros(4, 16)),
        ("out", torch.zeros(8, 16), torch.zeros(4, 8)),
        ("out", torch.zeros(8, 16), torch.zeros(4, 32)[:, ::2]),
        ("out", torch.zeros(8, 16), torch.zeros(65)[1:].view(4, 16)),
        ("tensors on several devices", torch.zeros(8, 16), torch.zeros(4, 16, device="meta")),
    ],
)
def test_bad_arguments_of_combine_are_named(
    device: torch.device, name: str, rows: torch.Tensor, out: torch.Tensor
) -> None:
    with pytest.raises(ValueError, match=f"^{name}"):
        triton_gpu.combine(rows.to(device), good(device)["routing"], out if out.is_meta else out.to(device))


@pytest.mark.parametrize(
    ("name", "logits", "slots"),
    [
        ("router_logits", torch.zeros(4, 5), None),
        ("router_logits", torch.zeros(9, 4), None),
        ("router_logits", torch.zeros(4, 4, dtype=torch.int32), None),
        ("router_logits", torch.zeros(4), None),
        ("router_logits", torch.zeros(4, 4).t(), None),
        ("router_logits", torch.zeros(4, 5)[:, :4], None),
        ("router_logits", torch.zeros(17)[1:].view(4, 4), None),
        ("slots", torch.zeros(4, 4), torch.zeros(8, dtype=torch.int64)[::2]),
        ("tensors on several devices", torch.zeros(4, 4), torch.zeros(4, dtype=torch.int64, device="meta")),
        ("slots", torch.zeros(4, 4), torch.zeros(3, dtype=torch.int64)),
        ("slots", torch.zeros(4, 4), torch.zeros(4, dtype=torch.int32)),
    ],
)
def test_bad_arguments_of_route_are_named(
    device: torch.device, name: str, logits: torch.Tensor, slots: torch.Tensor | None
) -> None:
    memory = RoutingWorkspace(max_tokens=8, num_experts=4, num_taken=2, dtype=torch.float32, device=device)
    with pytest.raises(ValueError, match=f"^{name}"):
        triton_gpu.route(
            logits.to(device),
            memory,
            renormalize=True,
            slots=slots if slots is None or slots.is_meta else slots.to(device),
        )


@pytest.mark.parametrize(
    ("experts", "taken", "message"),
    [(0, 1, "num_experts is 0"), (2000, 1, "num_experts is 2000"), (4, 5, "num_taken is 5"), (64, 33, "num_taken is")],
)
def test_bad_sizes_are_named(experts: int, taken: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        workspace(4, experts, taken, torch.device("cpu"))
