"""Operations of Triton's interpreter that are element by element in Python there, as whole-array ones."""

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

TensorHandle = interpreter.TensorHandle

BITWISE = frozenset({np.bitwise_and, np.bitwise_or, np.bitwise_xor, np.left_shift, np.right_shift})


def umulhi(self: Any, lhs: Any, rhs: Any) -> Any:
    """The high half of the product of unsigned integers, from four products of halves where 64 bits are wide."""
    signed_or_not = lhs.data.dtype
    bits = 8 * signed_or_not.itemsize
    unsigned = np.dtype(f"uint{bits}")
    a, b = lhs.data.astype(unsigned), rhs.data.astype(unsigned)
    if bits < 64:
        wide = np.dtype(f"uint{2 * bits}")
        high = (a.astype(wide) * b.astype(wide)) >> wide.type(bits)
    else:
        low, half = np.uint64(0xFFFFFFFF), np.uint64(32)
        a_low, a_high, b_low, b_high = a & low, a >> half, b & low, b >> half
        middle = a_high * b_low + ((a_low * b_low) >> half)
        other = a_low * b_high + (middle & low)
        high = a_high * b_high + (middle >> half) + (other >> half)
    return TensorHandle(high.astype(unsigned).view(signed_or_not), lhs.dtype.scalar)


def erf(self: Any, arg: Any) -> Any:
    import torch

    values = torch.special.erf(torch.from_numpy(np.array(arg.data)))
    return TensorHandle(values.numpy(), arg.dtype.scalar)


def all_ones(self: Any, type: Any) -> Any:
    dtype = interpreter._get_np_dtype(type)
    return TensorHandle(np.full(1, ~dtype.type(0), dtype=dtype), type.scalar)


def generic_reduce(self: Any, inputs: tuple[Any, ...]) -> list[Any]:
    """Combines halves of the axis until one element is left; the order among associative operands is not defined."""
    inputs = tuple(inputs)
    axis = self.axis
    arrays = [tensor.handle.data for tensor in inputs]
    rank = arrays[0].ndim
    if axis is None:
        arrays, axis = [array.reshape(-1) for array in arrays], 0
    dtypes = [tensor.dtype for tensor in inputs]
    while (size := arrays[0].shape[axis]) > 1:
        half = size // 2
        first = [_slice(array, axis, 0, half) for array in arrays]
        second = [_slice(array, axis, half, size) for array in arrays]
        arrays = _combine(self, dtypes, first, second)
    if self.axis is None:
        # scalar, or all axes kept
        shape = (1,) * rank if self.keep_dims else ()
        arrays = [array.reshape(shape) for array in arrays]
    elif not self.keep_dims:
        arrays = [array.squeeze(axis) for array in arrays]
    return [
        self.to_tensor(array if array.ndim else array[()], dtype) for array, dtype in zip(arrays, dtypes, strict=True)
    ]


def generic_scan(self: Any, inputs: tuple[Any, ...]) -> list[Any]:
    """Inclusive scan by doubling (Hillis and Steele, 1986)."""
    axis = self.axis
    arrays = [tensor.handle.data.copy() for tensor in inputs]
    dtypes = [tensor.dtype for tensor in inputs]
    size, reach = arrays[0].shape[axis], 1
    while reach < size:
        # of whole size, since a tensor's must be a power of two; what wraps around is thrown away
        combined = _combine(self, dtypes, [np.roll(array, reach, axis) for array in arrays], arrays)
        arrays = [
            np.concatenate([_slice(before, axis, 0, reach), _slice(after, axis, reach, size)], axis=axis)
            for before, after in zip(arrays, combined, strict=True)
        ]
        reach *= 2
    return [self.to_tensor(array, dtype) for array, dtype in zip(arrays, dtypes, strict=True)]


def _slice(array: np.ndarray, axis: int, start: int, end: int) -> np.ndarray:
    index = [slice(None)] * array.ndim
    index[axis] = slice(start, end)
    return array[tuple(index)]


def _combine(self: Any, dtypes: list[Any], first: list[np.ndarray], second: list[np.ndarray]) -> list[np.ndarray]:
    operands = [self.to_tensor(a, d) for half in (first, second) for a, d in zip(half, dtypes, strict=True)]
    result = self.combine_fn.fn(*operands)
    results = result if isinstance(result, tuple) else (result,)
    return [
        np.broadcast_to(_data(value), array.shape).astype(array.dtype)
        for value, array in zip(results, first, strict=True)
    ]


def _data(value: Any) -> Any:
    return value.handle.data if isinstance(value, tl.tensor) else value
