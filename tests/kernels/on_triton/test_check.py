"""Argument checks name the argument, what it is and what it should be; what is right passes."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from biphase.kernels.gpu import table_check
from biphase.kernels.gpu.check import (
    check_base,
    check_contiguous,
    check_dtype,
    check_one_of,
    check_rows,
    check_same_device,
    check_shape,
)

_X = torch.zeros(2, 8)


@pytest.mark.parametrize(
    ("check", "message"),
    [
        (lambda: check_dtype("x", _X, torch.int8, torch.int32), "x has dtype float32, expected int8 or int32"),
        (lambda: check_shape("x", _X, 2, 9), "x has shape [2, 8], expected [2, 9]"),
        (lambda: check_shape("x", _X, None, 8, None), "x has shape [2, 8], expected [any, 8, any]"),
        (lambda: check_shape("x", _X, 2), "x has shape [2, 8], expected [2]"),
        (lambda: check_rows("x", _X.t()), "x has stride 8 in its last dimension, it must be contiguous"),
        (lambda: check_rows("x", torch.zeros(9)[1:]), "x starts 4 bytes past a multiple of 16"),
        (lambda: check_base("x", torch.zeros(9)[2:]), "x starts 8 bytes past a multiple of 16"),
        (
            lambda: check_rows("x", torch.zeros(3, 2, 9)[:, :, :8]),
            "x has a stride of 72 bytes in dimension 0, it must be a multiple of 16",
        ),
        (
            lambda: check_rows("x", torch.zeros(1, 2, 9)[:, :, :8]),
            "x has a stride of 36 bytes in dimension 1, it must be a multiple of 16",
        ),
        (
            lambda: check_contiguous("x", _X.t()),
            "x with shape [8, 2] and strides [1, 8] is not contiguous",
        ),
        (
            lambda: check_same_device(x=_X, none=None, y=_X.to("meta")),
            "tensors on several devices: x on cpu, y on meta",
        ),
        (lambda: check_one_of("head_dim", 80, (64, 96)), "head_dim is 80, supported: 64, 96"),
    ],
)
def test_what_is_wrong_is_named(check: Callable[[], None], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        check()
    assert str(caught.value) == message


def test_what_is_right_passes() -> None:
    check_dtype("x", _X, torch.int8, torch.float32)
    check_shape("x", _X, 2, None)
    check_shape("scalar", torch.tensor(1.0))
    check_rows("x", torch.zeros(1, 9)[:, :8])  # one row has no next one
    check_rows("x", torch.zeros(2, 12)[:, :7])
    check_rows("x", torch.zeros(0, 5))
    check_contiguous("x", _X)
    check_same_device(x=_X, none=None, y=_X)
    check_same_device(none=None)
    check_one_of("head_dim", 96, (64, 96))


@pytest.mark.parametrize(
    ("debug", "asked", "tensor", "capturing", "expected"),
    [
        (True, False, _X, True, True),  # on a CPU nothing is captured
        (False, False, _X, False, False),
        (False, True, _X, False, True),
        (True, True, _X.to("meta"), False, False),
        (True, False, SimpleNamespace(is_meta=False, is_cuda=True), False, True),
        (True, True, SimpleNamespace(is_meta=False, is_cuda=True), True, False),
    ],
)
def test_numbers_are_checked_in_debug_mode_and_outside_of_graphs(
    monkeypatch: pytest.MonkeyPatch, debug: bool, asked: bool, tensor: Any, capturing: bool, expected: bool
) -> None:
    monkeypatch.setattr(table_check, "DEBUG", debug)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    assert table_check.may_check(tensor, asked=asked) is expected


@pytest.mark.parametrize(("debug", "on_cuda"), [(False, True), (True, False)])
def test_nobody_asks_about_graphs_for_nothing(monkeypatch: pytest.MonkeyPatch, debug: bool, on_cuda: bool) -> None:
    """A CPU has no CUDA to ask, and every launch of a server that is not being debugged passes here."""
    monkeypatch.setattr(table_check, "DEBUG", debug)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: pytest.fail("was asked"))
    tensor: Any = SimpleNamespace(is_meta=False, is_cuda=on_cuda)
    assert table_check.may_check(tensor) is debug
