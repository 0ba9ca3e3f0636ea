"""Dummy weights: kernel, torch operations and Python integers give the same bits, in any dtype, slice and block."""

from typing import Any

import pytest
import torch

from biphase.kernels.dummy_weights import fill, torch_blocks, triton_gpu
from biphase.kernels.dummy_weights.reference import dummy_reference

KEYS = [0, 2**64 - 1, 0x9E3779B97F4A7C15, 0xD6E8FEB86659FD93]
SPREAD = 0.035


def filled(which: Any, shape: tuple[int, ...], key: int, device: torch.device, **options: Any) -> torch.Tensor:
    dtype = options.pop("dtype", torch.float32)
    out = torch.full(shape, torch.nan, dtype=dtype, device=device)
    which.fill(out, key, spread=SPREAD, **options)
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("key", KEYS)
def test_both_backends_equal_the_reference_bit_for_bit(device: torch.device, dtype: torch.dtype, key: int) -> None:
    first = 2**32 - 7  # across the end of the lower half of the index
    expected = torch.stack([dummy_reference(key, first + i, SPREAD, dtype) for i in range(20)])
    for which in (triton_gpu, torch_blocks):
        assert torch.equal(filled(which, (20,), key, device, first=first, dtype=dtype).cpu(), expected)


@pytest.mark.parametrize("which", [triton_gpu, torch_blocks])
def test_slices_equal_the_whole(device: torch.device, which: Any) -> None:
    whole = filled(which, (3, 40, 70), 99, device)
    assert torch.equal(filled(which, (2, 40, 70), 99, device, first=2800), whole[1:])
    columns = filled(which, (3, 40, 25), 99, device, first=30, pitch=70)
    assert torch.equal(columns, whole[..., 30:55])
    rows = torch.stack([filled(which, (7, 70), 99, device, first=2800 * e + 350) for e in range(3)])
    assert torch.equal(rows, whole[:, 5:12])


def test_blocks_leave_no_trace(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    many = filled(triton_gpu, (5000,), 7, device)
    monkeypatch.setattr(torch_blocks, "_BLOCK", 333)
    assert torch.equal(filled(torch_blocks, (5000,), 7, device), many)


def test_values_are_uniform_and_streams_unrelated() -> None:
    one, other = (filled(torch_blocks, (200_000,), key, torch.device("cpu")).double() for key in KEYS[2:])
    for values in (one, other):
        assert values.abs().max() <= SPREAD * (1 + 1e-6)
        assert abs(values.mean()) < 2e-4 and abs(values.std() - SPREAD / 3**0.5) < 2e-4
    for shift in (0, 1, 64, 4096):
        assert abs(torch.corrcoef(torch.stack([one[:190_000], other[shift : 190_000 + shift]]))[0, 1]) < 0.01
        if shift:
            assert abs(torch.corrcoef(torch.stack([one[:190_000], one[shift : 190_000 + shift]]))[0, 1]) < 0.01


def test_fill_picks_a_backend_by_device() -> None:
    out = torch.empty(50)
    fill(out, 3, spread=SPREAD)
    assert torch.equal(out, filled(torch_blocks, (50,), 3, out.device))


def test_nothing_to_fill(device: torch.device) -> None:
    for which in (triton_gpu, torch_blocks):
        which.fill(torch.empty(0, 5, device=device), 1, spread=SPREAD)


@pytest.mark.parametrize("which", [triton_gpu, torch_blocks])
@pytest.mark.parametrize(
    ("out", "options", "name"),
    [(torch.zeros(4, 6)[:, :3], {}, "out"), (torch.zeros(4, 6), {"pitch": 5}, "pitch")],
)
def test_bad_arguments_are_named(which: Any, out: torch.Tensor, options: dict[str, int], name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name} "):
        which.fill(out, 1, spread=SPREAD, **options)


def test_integers_and_what_is_not_aligned_cannot_be_filled(device: torch.device) -> None:
    with pytest.raises(ValueError, match="^out has dtype int32"):
        triton_gpu.fill(torch.zeros(4, dtype=torch.int32, device=device), 1, spread=SPREAD)
    with pytest.raises(ValueError, match="^out starts 4 bytes past"):
        triton_gpu.fill(torch.zeros(5, device=device)[1:], 1, spread=SPREAD)
