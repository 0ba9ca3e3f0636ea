"""Argument checks of launchers: one line that names the argument, its value and what was expected.

A prefill step makes thousands of them between launches that the GPU waits for, so what passes, passes in plain loops.
That is 17 us instead of 24 for the norm's launcher up to its launch (processor time, python 3.11, no GPU).
"""

import torch

ALIGNMENT = 16


def check_dtype(name: str, tensor: torch.Tensor, *allowed: torch.dtype) -> None:
    if tensor.dtype not in allowed:
        raise ValueError(f"{name} has dtype {_short(tensor.dtype)}, expected {' or '.join(map(_short, allowed))}")


def check_shape(name: str, tensor: torch.Tensor, *shape: int | None) -> None:
    """None stands for any size."""
    sizes = tensor.shape
    if len(sizes) == len(shape):
        for axis, wanted in enumerate(shape):
            if wanted is not None and wanted != sizes[axis]:
                break
        else:
            return
    expected = ", ".join("any" if size is None else str(size) for size in shape)
    raise ValueError(f"{name} has shape {list(sizes)}, expected [{expected}]")


def check_rows(name: str, tensor: torch.Tensor) -> None:
    """Last dimension contiguous; base and every other stride a multiple of 16 bytes (vector loads rely on it)."""
    *strides, last = tensor.stride()
    if last != 1 and tensor.shape[-1] > 1:
        raise ValueError(f"{name} has stride {last} in its last dimension, it must be contiguous")
    check_base(name, tensor)
    itemsize = tensor.element_size()
    for axis, stride in enumerate(strides):
        if stride * itemsize % ALIGNMENT and tensor.shape[axis] > 1:
            raise ValueError(
                f"{name} has a stride of {stride * itemsize} bytes in dimension {axis}, "
                f"it must be a multiple of {ALIGNMENT}"
            )


def check_base(name: str, tensor: torch.Tensor) -> None:
    """The first element at a multiple of 16 bytes."""
    if tensor.data_ptr() % ALIGNMENT:
        raise ValueError(f"{name} starts {tensor.data_ptr() % ALIGNMENT} bytes past a multiple of {ALIGNMENT}")


def check_contiguous(name: str, tensor: torch.Tensor) -> None:
    if not tensor.is_contiguous():
        raise ValueError(
            f"{name} with shape {list(tensor.shape)} and strides {list(tensor.stride())} is not contiguous"
        )


def check_same_device(**tensors: torch.Tensor | None) -> None:
    first = None
    for tensor in tensors.values():
        if tensor is not None:
            if first is None:
                first = tensor.device
            elif tensor.device != first:
                break
    else:
        return
    given = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    raise ValueError(f"tensors on several devices: {', '.join(f'{n} on {d}' for n, d in given.items())}")


def check_one_of(name: str, value: int, allowed: tuple[int, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value}, supported: {', '.join(map(str, allowed))}")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
