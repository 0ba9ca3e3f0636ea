"""What ``fill`` computes, at sight: Python integers, one element at a time."""

import torch


def dummy_reference(key: int, index: int, spread: float, dtype: torch.dtype) -> torch.Tensor:
    """The element ``index`` of the tensor of ``key``."""
    bits = _mix((index & 0xFFFFFFFF) ^ (key & 0xFFFFFFFF))
    bits = _mix(bits ^ (((index >> 32) + (key >> 32)) & 0xFFFFFFFF))
    number = torch.tensor(float((bits >> 8) - 2**23), dtype=torch.float32)
    return (number * torch.tensor(spread / 2**23, dtype=torch.float32)).to(dtype)


def _mix(x: int) -> int:
    x = (x ^ (x >> 16)) * 0x7FEB352D & 0xFFFFFFFF
    x = (x ^ (x >> 15)) * 0x846CA68B & 0xFFFFFFFF
    return x ^ (x >> 16)
