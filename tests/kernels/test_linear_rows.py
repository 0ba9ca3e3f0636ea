"""The token-major dense product equals its float64 reference, writes where it is told, and names bad arguments."""

import pytest
import torch

from biphase.kernels.linear.rows import accumulate_in_float32, linear_rows, linear_rows_reference


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1.6e-2)])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("rows", "out_features", "in_features"), [(1, 24, 64), (5, 72, 40), (0, 8, 16), (33, 8, 576)])
def test_equals_the_reference(
    dtype: torch.dtype, tolerance: float, with_bias: bool, rows: int, out_features: int, in_features: int
) -> None:
    torch.manual_seed(rows)
    x, weight = torch.randn(rows, in_features + 8).to(dtype)[:, :in_features], torch.randn(out_features, in_features)
    weight, bias = weight.to(dtype), torch.randn(out_features).to(dtype) if with_bias else None
    padded = torch.full((rows, out_features + 8), torch.nan, dtype=dtype)
    out, expected = padded[:, :out_features], torch.empty(rows, out_features, dtype=dtype)
    linear_rows(x, weight, out, bias)
    linear_rows_reference(x, weight, expected, bias)
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance * in_features**0.5)
    assert padded[:, out_features:].isnan().all()


def test_sums_are_float32_for_the_whole_process(monkeypatch: pytest.MonkeyPatch) -> None:
    matmul = torch.backends.cuda.matmul
    names = ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction", "allow_tf32")
    before = {name: getattr(matmul, name) for name in names}
    try:
        for name in names:
            setattr(matmul, name, True)
        accumulate_in_float32()
        assert not any(getattr(matmul, name) for name in names)
    finally:
        for name, value in before.items():
            setattr(matmul, name, value)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("x", {"x_NI": torch.zeros(2, 12)}),
        ("x", {"x_NI": torch.zeros(2, 8, dtype=torch.float16)}),
        ("x", {"x_NI": torch.zeros(2, 9)[:, :8]}),
        ("weight", {"weight_OI": torch.zeros(8, 4).t()}),
        ("weight", {"weight_OI": torch.zeros(4, 8, dtype=torch.int8)}),
        ("out", {"out_NO": torch.zeros(3, 4)}),
        ("out", {"out_NO": torch.zeros(2, 5)[:, :4]}),
        ("bias", {"bias_O": torch.zeros(5)}),
        ("bias", {"bias_O": torch.zeros(4, dtype=torch.bfloat16)}),
        ("bias", {"bias_O": torch.zeros(8)[::2]}),
        ("bias", {"bias_O": torch.zeros(5)[1:]}),
        ("tensors", {"bias_O": torch.zeros(4, device="meta")}),
    ],
)
def test_bad_arguments_are_named(name: str, change: dict[str, torch.Tensor]) -> None:
    arguments = {"x_NI": torch.zeros(2, 8), "weight_OI": torch.zeros(4, 8), "out_NO": torch.zeros(2, 4)} | change
    with pytest.raises(ValueError, match=f"^{name} "):
        linear_rows(**arguments)
