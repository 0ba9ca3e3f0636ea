"""``fill`` in torch's integer operations, a block of elements at a time: any device, and the kernel's reference.

An element's 64-bit index and the 64-bit key go through two rounds of a 32-bit mixer (xor-shift and multiply; constants
of Wellons' "lowbias32", 2018). Its upper 24 bits, as a signed integer, times a float32 constant are the value: one
exact conversion and one rounded product, hence the same bits everywhere.
"""

import torch

_BLOCK = 1 << 20
_MIX_A, _MIX_B = 0x7FEB352D, 0x846CA68B
_HALF = 1 << 23
"""Values are whole multiples, -_HALF to _HALF - 1, of spread / _HALF."""


def fill(out: torch.Tensor, key: int, *, spread: float, first: int = 0, pitch: int | None = None) -> None:
    """Fill the contiguous ``out``. ``key``: 64 bits of a hash, of the whole tensor; ``first``: index of ``out``'s first element in
    it; ``pitch``: elements of the whole tensor from the start of one of ``out``'s rows (its last dimension) to the next
    one's, None where ``out`` is without gaps. Raises ValueError naming the argument."""
    rows, width, pitch = row_shape(out, pitch)
    low, high = signed_halves(key)
    scale = step_of(spread)
    flat = out.view(rows, width)
    for row in range(rows):
        for start in range(0, width, _BLOCK):
            end = min(width, start + _BLOCK)
            at = first + row * pitch
            index = torch.arange(at + start, at + end, dtype=torch.int64, device=out.device)
            mixed = _mix(index.to(torch.int32) ^ low)
            mixed = _mix(mixed ^ ((index >> 32).to(torch.int32) + high))
            values = ((mixed >> 8) & 0xFFFFFF).sub_(_HALF).to(torch.float32).mul_(scale)
            flat[row, start:end] = values.to(out.dtype)


def row_shape(out: torch.Tensor, pitch: int | None) -> tuple[int, int, int]:
    """(rows, width, pitch) that ``fill`` goes by."""
    if not out.is_contiguous():
        raise ValueError(f"out with strides {list(out.stride())} is not contiguous")
    if pitch is None:
        return 1, out.numel(), out.numel()
    width = out.shape[-1]
    if pitch < width:
        raise ValueError(f"pitch is {pitch}, must be at least the {width} elements of a row")
    return out.numel() // max(width, 1), width, pitch


def signed_halves(key: int) -> tuple[int, int]:
    """The lower and the upper 32 bits as int32 holds them."""
    return _signed(key & 0xFFFFFFFF), _signed(key >> 32 & 0xFFFFFFFF)


def step_of(spread: float) -> float:
    """The float32 nearest to spread / _HALF."""
    return torch.tensor(spread / _HALF, dtype=torch.float32).item()


def _mix(x: torch.Tensor) -> torch.Tensor:
    """int32 in and out, products modulo 2^32, shifts without the sign."""
    x = (x ^ ((x >> 16) & 0xFFFF)) * _signed(_MIX_A)
    x = (x ^ ((x >> 15) & 0x1FFFF)) * _signed(_MIX_B)
    return x ^ ((x >> 16) & 0xFFFF)


def _signed(value: int) -> int:
    return value - (1 << 32) if value >> 31 else value
