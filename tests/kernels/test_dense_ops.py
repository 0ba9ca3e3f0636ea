"""Dense products, RMS norm and the gate equal their references at every token count that has a way of its own."""

import pytest
import torch
import torch.nn.functional as F

from biphase.kernels.linear import linear, linear_add, linear_logits, linear_reference, padded_tokens
from biphase.kernels.ops import choose_backend
from biphase.kernels.rms_norm import rms_norm, rms_norm_reference
from biphase.kernels.silu_mul import silu_mul


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("num_tokens", [1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 63, 112])
@pytest.mark.parametrize(("out_features", "in_features"), [(1, 7), (63, 111), (192, 64)])
def test_linear_equals_the_reference(num_tokens: int, out_features: int, in_features: int) -> None:
    torch.manual_seed(num_tokens)
    w, x = torch.randn(out_features, in_features), torch.randn(in_features, num_tokens)
    expected = linear_reference(w, x)
    out = torch.full((out_features, num_tokens), torch.nan)
    with torch.inference_mode():
        assert linear(w, x, out) is out
        assert relative_error(out, expected) < 1e-5
        residual = torch.randn(out_features, num_tokens)
        before = residual.clone()
        assert linear_add(w, x, residual) is residual
        assert relative_error(residual, before + expected) < 1e-5
        logits = linear_logits(w, x)
        assert logits.is_contiguous()
        assert relative_error(logits, expected.t()) < 1e-5


def test_padding_never_shrinks_and_is_a_fixed_point() -> None:
    for count in range(1, 700):
        padded = padded_tokens(count)
        assert count <= padded < max(2 * count, count + 16)
        assert padded_tokens(padded) == padded
    assert [padded_tokens(count) for count in (1, 2, 3, 5, 9, 17, 33)] == [1, 2, 4, 8, 16, 32, 48]


@pytest.mark.parametrize("shape", [(1, 1), (63, 5), (576, 16), (3, 64, 7)])
def test_rms_norm_equals_the_reference(shape: tuple[int, ...]) -> None:
    x, weight = torch.randn(shape), torch.randn(shape[-2], 1)
    mean = (x * x).mean(dim=-2, keepdim=True)
    expected = x / torch.sqrt(mean + 1e-5) * weight
    if x.dim() == 2:
        torch.testing.assert_close(rms_norm_reference(x, weight, 1e-5), expected)
    out = torch.full(shape, torch.nan)
    assert relative_error(rms_norm(x, weight, 1e-5, out), expected) < 1e-5
    assert relative_error(rms_norm(x, weight, 1e-5, x), expected) < 1e-5  # in place


def test_silu_mul_is_in_place() -> None:
    gate, up = torch.randn(63, 5), torch.randn(63, 5)
    expected = F.silu(gate) * up
    assert silu_mul(gate, up) is gate
    torch.testing.assert_close(gate, expected)


def test_backends_are_chosen_by_device_or_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BIPHASE_KERNELS", raising=False)
    on_cpu, on_gpu = choose_backend("cpu"), choose_backend("cuda:1")
    assert (on_cpu.name, on_cpu.token_major) == ("torch", False)
    assert (on_gpu.name, on_gpu.token_major) == ("triton", True)
    assert on_gpu.reason == "the default of device cuda:1"
    monkeypatch.setenv("BIPHASE_KERNELS", "torch")
    forced = choose_backend("cuda")
    assert (forced.name, forced.token_major, forced.reason) == ("torch", True, "BIPHASE_KERNELS=torch says")
    monkeypatch.setenv("BIPHASE_KERNELS", "punchcards")
    with pytest.raises(ValueError, match="BIPHASE_KERNELS='punchcards' has no kernels; backends: torch, triton"):
        choose_backend("cpu")
    monkeypatch.setenv("BIPHASE_KERNELS", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose_backend("cpu").token_major
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match="BIPHASE_KERNELS=triton runs on a GPU"):
        choose_backend("cpu")
