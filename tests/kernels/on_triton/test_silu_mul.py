"""``silu_mul`` against its reference: rows of any width, split over programs or not, nothing beside them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from biphase.kernels.silu_mul.reference import silu_mul_rows_reference
from biphase.kernels.silu_mul.triton_gpu import silu_mul

_TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}  # 2 units in the last place
_long = pytest.mark.long


def _check(device: torch.device, dtype: torch.dtype, rows: int, intermediate: int) -> None:
    generator = torch.Generator().manual_seed(rows + intermediate)
    aligned = -(-intermediate // 16) * 16
    gate_up = torch.full((rows, 2 * aligned + 16), 5.0, dtype=dtype, device=device)[:, : 2 * intermediate]
    gate_up.copy_(4 * torch.randn(rows, 2 * intermediate, generator=generator))
    padded = torch.full((rows, aligned + 16), torch.nan, dtype=dtype, device=device)
    out, expected = padded[:, :intermediate], torch.empty(rows, intermediate, dtype=dtype, device=device)
    silu_mul(gate_up, out)
    silu_mul_rows_reference(gate_up, expected)
    torch.testing.assert_close(out, expected, rtol=_TOLERANCE[dtype], atol=1e-6)
    assert padded[:, intermediate:].isnan().all()


@pytest.mark.parametrize(
    ("dtype", "rows", "intermediate"),
    [
        (torch.float32, 1, 1),
        (torch.bfloat16, 3, 1536),
        (torch.float16, 2, 1000),
        (torch.float32, 2, 2048),
        pytest.param(torch.bfloat16, 1, 14336, marks=_long),
        pytest.param(torch.bfloat16, 65, 1023, marks=_long),
        pytest.param(torch.float32, 300, 1025, marks=_long),
        pytest.param(torch.float16, 7, 12288, marks=_long),
    ],
)
def test_equals_the_reference(device: torch.device, dtype: torch.dtype, rows: int, intermediate: int) -> None:
    _check(device, dtype, rows, intermediate)


@settings(max_examples=8, deadline=None)
@given(dtype=st.sampled_from(sorted(_TOLERANCE, key=str)), rows=st.integers(0, 4), intermediate=st.integers(1, 2100))
def test_any_shape(device: torch.device, dtype: torch.dtype, rows: int, intermediate: int) -> None:
    _check(device, dtype, rows, intermediate)


def test_far_gates_neither_overflow_nor_vanish(device: torch.device) -> None:
    gate = torch.tensor([-1e30, -200.0, -20.0, 0.0, 20.0, 200.0, 1e30, 1.0], device=device)
    out, expected = (torch.full((1, 8), torch.nan, device=device) for _ in range(2))
    gate_up = torch.cat((gate, torch.full_like(gate, 2.0))).unsqueeze(0)
    silu_mul(gate_up, out)
    silu_mul_rows_reference(gate_up, expected)
    torch.testing.assert_close(out, expected, rtol=2e-6, atol=1e-30)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("gate_up", {"gate_up_NX": torch.zeros(2, 8)}),
        ("gate_up", {"gate_up_NX": torch.zeros(2, 16, dtype=torch.int64)}),
        ("gate_up", {"gate_up_NX": torch.zeros(2, 17)[:, :16]}),
        ("gate_up", {"gate_up_NX": torch.zeros(16)}),
        ("gate_up", {"gate_up_NX": torch.zeros(33)[1:].view(2, 16)}),
        ("gate_up", {"gate_up_NX": torch.zeros(2, 32)[:, ::2]}),
        ("tensors", {"gate_up_NX": torch.zeros(2, 16, device="meta")}),
        ("out", {"out_NI": torch.zeros(8)}),
        ("out", {"out_NI": torch.zeros(2, 9)[:, :8]}),
        ("out", {"out_NI": torch.zeros(17)[1:].view(2, 8)}),
        ("out", {"out_NI": torch.zeros(2, 16)[:, ::2]}),
        ("out", {"out_NI": torch.zeros(2, 8, dtype=torch.float64)}),
    ],
)
def test_bad_arguments_are_named(name: str, change: dict[str, torch.Tensor]) -> None:
    arguments = {"gate_up_NX": torch.zeros(2, 16), "out_NI": torch.zeros(2, 8)} | change
    with pytest.raises(ValueError, match=f"^{name} "):
        silu_mul(**arguments)
