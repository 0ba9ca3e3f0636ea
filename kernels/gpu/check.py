"""Argument checks of launchers: one line that names the argument, its value and what was expected."""

import torch

ALIGNMENT = 16


def check_dtype(name: str, tensor: torch.Tensor, *allowed: torch.dtype) -> None:
    if tensor.dtype not in allowed:
        raise ValueError(f"{name} has dtype {_short(tensor.dtype)}, expected {' or '.join(map(_short, allowed))}")


def check_shape(name: str, tensor: torch.Tensor, *shape: int | None) -> None:
    """None stands for any size."""
    if tensor.dim() != len(shape) or any(
        want is not None and have != want for have, want in zip(tensor.shape, shape, strict=True)
    ):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} has shape {list(tensor.shape)}, expected [{wanted}]")


def check_rows(name: str, tensor: torch.Tensor) -> None:
    """Last dimension contiguous; base and every other stride a multiple of 16 bytes (vector loads rely on it)."""
    if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        raise ValueError(f"{name} has stride {tensor.stride(-1)} in its last dimension, it must be contiguous")
    if tensor.data_ptr() % ALIGNMENT:
        raise ValueError(f"{name} starts {tensor.data_ptr() % ALIGNMENT} bytes past a multiple of {ALIGNMENT}")
    for axis, stride in enumerate(tensor.stride()[:-1]):
        if tensor.shape[axis] > 1 and stride * tensor.element_size() % ALIGNMENT:
            raise ValueError(
                f"{name} has a stride of {stride * tensor.element_size()} bytes in dimension {axis}, "
                f"it must be a multiple of {ALIGNMENT}"
            )


def check_contiguous(name: str, tensor: torch.Tensor) -> None:
    if not tensor.is_contiguous():
        raise ValueError(
            f"{name} with shape {list(tensor.shape)} and strides {list(tensor.stride())} is not contiguous"
        )


def check_same_device(**tensors: torch.Tensor | None) -> None:
    given = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    if len(set(given.values())) > 1:
        raise ValueError(f"tensors on several devices: {', '.join(f'{n} on {d}' for n, d in given.items())}")


def check_one_of(name: str, value: int, allowed: tuple[int, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value}, supported: {', '.join(map(str, allowed))}")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
