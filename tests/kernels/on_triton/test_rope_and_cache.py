"""``rope_and_cache`` against its reference, and what it must leave alone: padding rows, free slots, k and v in place."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from biphase.kernels.gpu import table_check
from biphase.kernels.rope_and_cache.reference import rope_and_cache_paged_reference
from biphase.kernels.rope_and_cache.rotation_table import rotation_table
from biphase.kernels.rope_and_cache.triton_gpu import rope_and_cache

_F32, _F16, _BF16, _FP8 = torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn
_TOLERANCE = {_F32: 2e-6, _F16: 2e-3, _BF16: 1.6e-2, _FP8: 0.13}  # fp8: one code, where float noise meets a tie
_NOWHERE = 2**31 - 1
_long = pytest.mark.long


@dataclass(frozen=True, slots=True, kw_only=True)
class _Case:
    tokens: int = 5
    padding: int = 2
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    rotary_dim: int = 64
    block_size: int = 16
    qk_norm: bool = False
    dtype: torch.dtype = _F32
    pool_dtype: torch.dtype = _F32


def _arguments(case: _Case, device: torch.device) -> dict[str, Any]:
    """Padding rows among real ones, their contents and positions nonsense; each pool slot NaN."""
    generator = torch.Generator().manual_seed(case.tokens * 31 + case.head_dim + case.rotary_dim)
    rows, width = case.tokens + case.padding, (case.heads + 2 * case.kv_heads) * case.head_dim
    real = torch.zeros(rows, dtype=torch.bool)
    real[torch.randperm(rows, generator=generator)[: case.tokens]] = True
    blocks = -(-case.tokens // case.block_size) + 1
    slots = torch.full((rows,), -1)
    slots[real] = torch.randperm(blocks * case.block_size, generator=generator)[: case.tokens]
    positions = torch.full((rows,), _NOWHERE, dtype=torch.int32)
    positions[real] = torch.randint(0, 500, (case.tokens,), generator=generator, dtype=torch.int32)
    qkv = torch.full((rows, width + 16), torch.nan)
    qkv[:, :width] = 7.0
    qkv[real, :width] = torch.randn(case.tokens, width, generator=generator)
    frequencies = [10000.0 ** (-2 * i / case.rotary_dim) for i in range(case.rotary_dim // 2)]
    pool = torch.full((blocks, 2, case.kv_heads, case.block_size, case.head_dim), torch.nan).to(case.pool_dtype)
    q_norm, k_norm = (1 + torch.randn(2, case.head_dim, generator=generator) / 4).to(case.dtype).to(device).unbind(0)
    scale = (torch.rand(2, case.kv_heads, generator=generator) / 100 + 1e-3).to(device)
    return {
        "qkv_NX": qkv.to(case.dtype).to(device)[:, :width],
        "positions": positions.to(device),
        "slots": slots.to(device),
        "table": rotation_table(frequencies, 500, device),
        "pool_layer": pool.to(device),
        "num_heads": case.heads,
        "q_norm": q_norm if case.qk_norm else None,
        "k_norm": k_norm if case.qk_norm else None,
        "kv_scale": scale if case.pool_dtype == _FP8 else None,
    }


def _copy(arguments: dict[str, Any]) -> dict[str, Any]:
    """Another qkv of the same strides, another pool."""
    qkv = arguments["qkv_NX"]
    return arguments | {
        "qkv_NX": qkv._base.clone()[:, : qkv.shape[1]],
        "pool_layer": arguments["pool_layer"].clone(),
    }


def _check(case: _Case, device: torch.device) -> None:
    given = _arguments(case, device)
    got, expected = _copy(given), _copy(given)
    rope_and_cache(**got)
    rope_and_cache_paged_reference(**expected)
    for name, dtype in (("qkv_NX", case.dtype), ("pool_layer", case.pool_dtype)):
        torch.testing.assert_close(
            got[name].float(), expected[name].float(), rtol=_TOLERANCE[dtype], atol=_TOLERANCE[dtype], equal_nan=True
        )
    # v is moved, not computed; the gap behind each row is nobody's
    assert torch.equal(*(a["pool_layer"][:, 1].float().nan_to_num(-1000.0) for a in (got, expected)))
    assert got["qkv_NX"]._base[:, got["qkv_NX"].shape[1] :].isnan().all()
    untouched = case.heads * case.head_dim
    assert torch.equal(*(a["qkv_NX"][:, untouched:].nan_to_num(-1000.0) for a in (got, given)))


@pytest.mark.parametrize(
    "case",
    [
        _Case(),
        _Case(tokens=1, padding=0, heads=3, kv_heads=3, rotary_dim=16, dtype=_BF16, pool_dtype=_BF16),
        _Case(tokens=3, head_dim=96, rotary_dim=96, qk_norm=True, pool_dtype=_FP8),
        _Case(tokens=2, heads=8, kv_heads=1, head_dim=128, rotary_dim=64, block_size=64, qk_norm=True, dtype=_F16),
        _Case(tokens=0, padding=2),
        _Case(tokens=0, padding=0),
        pytest.param(_Case(tokens=300, heads=2, kv_heads=1, block_size=32), marks=_long),
        pytest.param(_Case(tokens=33, padding=15, heads=8, kv_heads=2, dtype=_BF16, pool_dtype=_FP8), marks=_long),
        pytest.param(_Case(tokens=16, heads=8, kv_heads=8, head_dim=128, rotary_dim=128, block_size=128), marks=_long),
        pytest.param(_Case(heads=7, kv_heads=1, head_dim=256, rotary_dim=256, dtype=_BF16, qk_norm=True), marks=_long),
        pytest.param(_Case(heads=9, kv_heads=3, pool_dtype=_BF16, qk_norm=True, rotary_dim=2), marks=_long),
        pytest.param(_Case(head_dim=96, rotary_dim=64, dtype=_F16, pool_dtype=_F16, block_size=64), marks=_long),
        pytest.param(_Case(head_dim=128, rotary_dim=20, dtype=_BF16, pool_dtype=_FP8, qk_norm=True), marks=_long),
        pytest.param(_Case(heads=32, kv_heads=8, head_dim=128, rotary_dim=128, dtype=_BF16), marks=_long),
    ],
    ids=str,
)
def test_equals_the_reference(device: torch.device, case: _Case) -> None:
    _check(case, device)


_CASES = st.builds(
    _Case,
    tokens=st.integers(0, 6),
    padding=st.integers(0, 3),
    heads=st.integers(1, 8),
    kv_heads=st.sampled_from([1, 2, 4]),
    head_dim=st.sampled_from([64, 96, 128]),
    rotary_dim=st.sampled_from([2, 24, 64]),
    block_size=st.sampled_from([16, 32, 64, 128]),
    qk_norm=st.booleans(),
    dtype=st.sampled_from([_F32, _F16, _BF16]),
    pool_dtype=st.sampled_from([_F32, _F16, _BF16, _FP8]),
)


@settings(max_examples=6, deadline=None)
@given(case=_CASES)
def test_any_case(device: torch.device, case: _Case) -> None:
    _check(case, device)


def test_the_table_is_hugging_faces(device: torch.device) -> None:
    """``inverse_frequencies`` as a Llama-3 scaling would have them, position 8191; angle in float32 before the cosine."""
    frequencies = [1.0, 0.1, 0.003, 3.7e-6]
    table = rotation_table(frequencies, 8192, device)
    angle = torch.tensor(8191.0) * torch.tensor(frequencies)
    assert table.shape == (8192, 2, 4)
    assert torch.equal(table[8191].cpu(), torch.stack((angle.cos(), angle.sin())))


def test_fp8_values_beyond_the_range_are_clamped(device: torch.device) -> None:
    arguments = _arguments(_Case(tokens=1, padding=0, pool_dtype=_FP8), device)
    arguments["qkv_NX"].fill_(1e6)
    arguments["positions"].fill_(0)
    rope_and_cache(**arguments)
    written = arguments["pool_layer"].float()
    assert written[~written.isnan()].unique().tolist() == [448.0]


@pytest.mark.long
def test_slots_whose_offsets_pass_two_to_the_31(device: torch.device) -> None:
    """The pool's memory is reserved, never touched but for the last block; 2^31 elements of fp8 are 2 GiB."""
    case = _Case(tokens=3, padding=1, pool_dtype=_FP8)
    small = _arguments(case, device)
    blocks, *rest = small["pool_layer"].shape
    distance = 2**31 // small["pool_layer"][0].numel() + 5
    shape = (distance + blocks, *rest)
    huge = _copy(small) | {"pool_layer": torch.empty(shape, dtype=torch.uint8, device=device).view(_FP8)}
    huge["pool_layer"][distance:] = small["pool_layer"]
    huge["slots"] = torch.where(small["slots"] < 0, -1, small["slots"] + distance * case.block_size)
    rope_and_cache(**small)
    rope_and_cache(**huge)
    got, expected = huge["pool_layer"][distance:], small["pool_layer"]
    assert torch.equal(got.view(torch.uint8), expected.view(torch.uint8))


def test_fp8_is_refused_below_capability_8_9() -> None:
    from biphase.kernels.gpu.target import AOT_TARGETS, compiling_for

    arguments = _arguments(_Case(pool_dtype=_FP8), torch.device("cpu"))
    on_meta = {name: v.to("meta") if isinstance(v, torch.Tensor) else v for name, v in arguments.items()}
    with compiling_for(AOT_TARGETS[80]), pytest.raises(ValueError, match=r"needs a GPU of capability 8\.9 .* has 8\.0"):
        rope_and_cache(**on_meta)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("qkv", {"qkv_NX": torch.zeros(7, 512, dtype=torch.int32)}),
        ("qkv", {"qkv_NX": torch.zeros(7, 500)}),
        ("qkv", {"qkv_NX": torch.zeros(7, 513)[:, :512]}),
        ("qkv", {"qkv_NX": torch.zeros(512)}),
        ("qkv", {"qkv_NX": torch.zeros(7 * 512 + 1)[1:].view(7, 512)}),
        ("qkv", {"qkv_NX": torch.zeros(7, 1024)[:, ::2]}),
        ("positions", {"positions": torch.zeros(7)}),
        ("positions", {"positions": torch.zeros(14, dtype=torch.int32)[::2]}),
        ("positions", {"positions": torch.zeros(8, dtype=torch.int32)}),
        ("slots", {"slots": torch.zeros(7, dtype=torch.int32)}),
        ("slots", {"slots": torch.zeros(8, dtype=torch.int64)}),
        ("slots", {"slots": torch.zeros(14, dtype=torch.int64)[::2]}),
        ("table", {"table": torch.zeros(9, 64)}),
        ("table", {"table": torch.zeros(9, 2, 0)}),
        ("table", {"table": torch.zeros(9, 2, 64)[..., ::2]}),
        ("table", {"table": torch.zeros(9 * 64 + 1)[1:].view(9, 2, 32)}),
        ("table", {"table": torch.zeros(9, 2, 33)}),
        ("table", {"table": torch.zeros(9, 2, 8, dtype=_F16)}),
        ("pool_layer", {"pool_layer": torch.zeros(2, 2, 2, 16, 128)[..., ::2]}),
        ("pool_layer", {"pool_layer": torch.zeros(2, 3, 2, 16, 64)}),
        ("pool_layer", {"pool_layer": torch.zeros(2, 2, 0, 16, 64), "qkv_NX": torch.zeros(7, 256)}),
        ("pool_layer", {"pool_layer": torch.zeros(2, 2, 2, 16, 64, dtype=torch.int8)}),
        ("pool_layer", {"pool_layer": torch.zeros(8193)[1:].view(2, 2, 2, 16, 64)}),
        ("num_heads", {"num_heads": 0, "qkv_NX": torch.zeros(7, 256)}),
        ("num_heads", {"num_heads": -1, "qkv_NX": torch.zeros(7, 192)}),
        ("q_norm", {"q_norm": torch.zeros(64, dtype=torch.int32), "k_norm": torch.zeros(64)}),
        ("k_norm", {"q_norm": torch.zeros(64), "k_norm": torch.zeros(65)[1:]}),
        ("k_norm", {"q_norm": torch.zeros(64), "k_norm": torch.zeros(128)[::2]}),
        ("tensors", {"slots": torch.zeros(7, dtype=torch.int64, device="meta")}),
        ("block_size", {"pool_layer": torch.zeros(2, 2, 2, 8, 64)}),
        ("head_dim", {"pool_layer": torch.zeros(2, 2, 2, 16, 80), "qkv_NX": torch.zeros(7, 640)}),
        ("q_norm and k_norm", {"q_norm": torch.zeros(64)}),
        ("k_norm", {"q_norm": torch.zeros(64), "k_norm": torch.zeros(32)}),
        ("kv_scale", {"kv_scale": torch.zeros(2, 2)}),
        ("kv_scale", {"pool_layer": torch.zeros(2, 2, 2, 16, 64).to(_FP8)}),
        ("kv_scale", {"pool_layer": torch.zeros(2, 2, 2, 16, 64).to(_FP8), "kv_scale": torch.zeros(2, 3)}),
    ],
)
def test_bad_arguments_are_named(name: str, change: dict[str, Any]) -> None:
    arguments = _arguments(replace(_Case()), torch.device("cpu")) | change
    with pytest.raises(ValueError, match=f"^{name} "):
        rope_and_cache(**arguments)


@pytest.mark.parametrize(
    ("slots", "positions", "message"),
    [
        ([0, -1, 32], [0, 0, 0], r"slots\[2\] is 32, the pool has slots 0 to 31"),
        ([0, -1, 1], [0, 0, 8], r"positions\[2\] is 8, table has positions 0 to 7"),
        ([0, -1, 1], [-1, 0, 0], r"positions\[0\] is -1"),
        ([31, -1, 0], [7, _NOWHERE, 0], None),
        ([0, -2, 1], [0, -5, 0], None),
    ],
)
def test_debug_mode_checks_slots_and_positions(
    monkeypatch: pytest.MonkeyPatch, slots: list[int], positions: list[int], message: str | None
) -> None:
    """Of rows that are no padding."""
    monkeypatch.setattr(table_check, "DEBUG", True)
    arguments = {
        "qkv_NX": torch.zeros(3, 256),
        "positions": torch.tensor(positions, dtype=torch.int32),
        "slots": torch.tensor(slots),
        "table": torch.zeros(8, 2, 32),
        "pool_layer": torch.zeros(2, 2, 1, 16, 64),
        "num_heads": 2,
    }
    if message is None:
        rope_and_cache(**arguments)
    else:
        with pytest.raises(ValueError, match=f"^{message}"):
            rope_and_cache(**arguments)
