"""Argument checks name the argument, what it is and what it should be; what is right passes."""

from collections.abc import Callable

import pytest
import torch

from biphase.kernels.gpu.check import (
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
