"""``rms_norm`` and ``add_rms_norm`` against their references: any width, strided rows, in place, nothing beside them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from biphase.kernels.rms_norm.reference import add_rms_norm_rows_reference, rms_norm_rows_reference
from biphase.kernels.rms_norm.triton_gpu import add_rms_norm, candidates, key_of, rms_norm

_EPS = 1e-5
_TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}  # 2 units in the last place
_GAP = 16
_long = pytest.mark.long


def _rows(device: torch.device, dtype: torch.dtype, rows: int, features: int, *, scale: float = 1.0) -> torch.Tensor:
    """Rows with NaN between them; the gap behind each keeps the next one aligned."""
    padded = torch.full((rows, -(-features // 16) * 16 + _GAP), torch.nan, dtype=dtype, device=device)
    values = padded[:, :features]
    values.copy_(scale * torch.randn(rows, features, generator=torch.Generator().manual_seed(7 * rows + features)))
    return values


def _gaps(view: torch.Tensor) -> torch.Tensor:
    base = view._base
    assert base is not None
    return base[:, view.shape[1] :]


def _check(device: torch.device, dtype: torch.dtype, rows: int, features: int, *, add: bool, scale: float) -> None:
    x, residual = _rows(device, dtype, rows, features, scale=scale), _rows(device, dtype, rows, features).flip(0)
    residual_out = _rows(device, dtype, rows, features)
    residual_out.copy_(residual)
    weight = torch.randn(features, generator=torch.Generator().manual_seed(features)).to(dtype).to(device)
    out, expected = _rows(device, dtype, rows, features).fill_(torch.nan), torch.empty_like(x)
    if add:
        add_rms_norm(x, residual_out, weight, _EPS, out)
        add_rms_norm_rows_reference(x, residual, weight, _EPS, expected)
        assert torch.equal(residual_out, residual)
        assert _gaps(residual_out).isnan().all()
    else:
        rms_norm(x, weight, _EPS, out)
        rms_norm_rows_reference(x, weight, _EPS, expected)
    torch.testing.assert_close(out, expected, rtol=_TOLERANCE[dtype], atol=0.1 * _TOLERANCE[dtype])
    assert _gaps(out).isnan().all()


@pytest.mark.parametrize(
    ("dtype", "rows", "features", "add", "scale"),
    [
        (torch.float32, 1, 1, False, 1.0),
        (torch.float32, 3, 576, True, 1.0),
        (torch.bfloat16, 2, 100, True, 1.0),
        (torch.float16, 5, 64, False, 30.0),
        pytest.param(torch.bfloat16, 1, 4096, True, 1.0, marks=_long),
        pytest.param(torch.bfloat16, 7, 4096, False, 1e-3, marks=_long),
        pytest.param(torch.float16, 2, 3072, True, 1.0, marks=_long),
        pytest.param(torch.float32, 300, 63, True, 1e3, marks=_long),
        pytest.param(torch.bfloat16, 129, 1000, False, 100.0, marks=_long),
        pytest.param(torch.float32, 2, 32768, False, 1.0, marks=_long),
        pytest.param(torch.float32, 3, 8200, True, 1e-4, marks=_long),
    ],
)
def test_equals_the_reference(
    device: torch.device, dtype: torch.dtype, rows: int, features: int, add: bool, scale: float
) -> None:
    _check(device, dtype, rows, features, add=add, scale=scale)


@settings(max_examples=8, deadline=None)
@given(
    dtype=st.sampled_from(sorted(_TOLERANCE, key=str)),
    rows=st.integers(1, 5),
    features=st.integers(1, 300),
    add=st.booleans(),
)
def test_any_shape(device: torch.device, dtype: torch.dtype, rows: int, features: int, add: bool) -> None:
    _check(device, dtype, rows, features, add=add, scale=1.0)


@pytest.mark.parametrize("add", [False, True])
def test_out_may_be_x(device: torch.device, add: bool) -> None:
    x, weight = torch.randn(3, 72, device=device), torch.randn(72, device=device)
    residual, expected = torch.randn(3, 72, device=device), torch.empty(3, 72, device=device)
    if add:
        add_rms_norm_rows_reference(x, residual.clone(), weight, _EPS, expected)
        add_rms_norm(x, residual, weight, _EPS, x)
    else:
        rms_norm_rows_reference(x, weight, _EPS, expected)
        rms_norm(x, weight, _EPS, x)
    torch.testing.assert_close(x, expected)


def test_a_bfloat16_sum_is_normed_as_it_was_rounded(device: torch.device) -> None:
    """256 + 1 is 256 in bfloat16: the next layer sees that, so this one must too."""
    x = torch.full((1, 8), 1.0, dtype=torch.bfloat16, device=device)
    residual = torch.full((1, 8), 256.0, dtype=torch.bfloat16, device=device)
    out = torch.empty(1, 8, dtype=torch.float32, device=device)
    add_rms_norm(x, residual, torch.full((8,), 256.0, device=device), 65536.0, out)
    assert residual.unique().tolist() == [256.0]
    torch.testing.assert_close(out, torch.full_like(out, 256.0 / 2**0.5), rtol=1e-6, atol=0)


def test_zeros_stay_zeros_and_no_rows_launch_nothing(device: torch.device) -> None:
    weight = torch.ones(16, device=device)
    out = torch.full((2, 16), torch.nan, device=device)
    rms_norm(torch.zeros(2, 16, device=device), weight, _EPS, out)
    assert not out.any()
    empty = torch.empty(0, 16, device=device)
    add_rms_norm(empty, torch.empty(0, 16, device=device), weight, _EPS, empty)


def test_candidates_cover_every_width() -> None:
    from biphase.kernels.gpu.target import INTERPRETER

    for features in (64, 576, 4096, 32768):
        assert candidates(INTERPRETER, key_of(features))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("x", {"x_NF": torch.zeros(2, 8, dtype=torch.int32)}),
        ("x", {"x_NF": torch.zeros(2, 16)[:, ::2]}),
        ("x", {"x_NF": torch.zeros(2, 9)[:, :8]}),
        ("x", {"x_NF": torch.zeros(17)[1:].view(2, 8)}),
        ("x", {"x_NF": torch.zeros(8)}),
        ("x", {"x_NF": torch.zeros(2, 0)}),
        ("x", {"x_NF": torch.zeros(2, 32769)}),
        ("out", {"out_NF": torch.zeros(2, 8, dtype=torch.float64)}),
        ("out", {"out_NF": torch.zeros(2, 16)[:, ::2]}),
        ("out", {"out_NF": torch.zeros(2, 9)[:, :8]}),
        ("out", {"out_NF": torch.zeros(17)[1:].view(2, 8)}),
        ("out", {"out_NF": torch.zeros(3, 8)}),
        ("weight", {"weight_F": torch.zeros(9)}),
        ("weight", {"weight_F": torch.zeros(8, dtype=torch.int8)}),
        ("weight", {"weight_F": torch.zeros(16)[::2]}),
        ("weight", {"weight_F": torch.zeros(9)[1:]}),
        ("tensors", {"weight_F": torch.zeros(8, device="meta")}),
        ("residual", {"residual_NF": torch.zeros(2, 16)}),
        ("residual", {"residual_NF": torch.zeros(2, 8, dtype=torch.int32)}),
        ("residual", {"residual_NF": torch.zeros(2, 9)[:, :8]}),
        ("out", {"out_NF": None}),
    ],
)
def test_bad_arguments_are_named(name: str, change: dict[str, torch.Tensor | None]) -> None:
    residual = torch.zeros(2, 8)
    arguments = {
        "x_NF": torch.zeros(2, 8),
        "residual_NF": residual,
        "weight_F": torch.zeros(8),
        "out_NF": residual.clone(),
    }
    arguments |= {key: residual if value is None else value for key, value in change.items()}
    with pytest.raises(ValueError, match=f"^{name} "):
        add_rms_norm(**arguments, eps=_EPS)
