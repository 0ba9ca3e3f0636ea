"""Packed buffers of the pair groups, used again: fresh memory costs more page faults than the bytes cost copying."""

from collections.abc import Callable
from typing import Any

import torch

_LEAST_BYTES = 1 << 16


class Buffers:
    """Owns the buffers that nobody uses, at most ``keep_bytes`` of them."""

    def __init__(self, keep_bytes: int, make: Callable[[int], torch.Tensor]) -> None:
        """``make``: a new buffer of that many bytes."""
        self._make = make
        self._keep_bytes = keep_bytes
        self._free: dict[int, list[torch.Tensor]] = {}
        self._free_bytes = 0

    def get(self, num_bytes: int) -> torch.Tensor:
        """Of at least that size."""
        size = max(_LEAST_BYTES, 1 << (num_bytes - 1).bit_length()) if num_bytes else _LEAST_BYTES
        free = self._free.get(size)
        if free:
            self._free_bytes -= size
            return free.pop()
        return self._make(size)

    def put(self, buffer: torch.Tensor) -> None:
        """Nobody writes or reads it any more. One that may still be in use is dropped instead: it dies with its user."""
        size = buffer.numel()
        if self._free_bytes + size <= self._keep_bytes:
            self._free_bytes += size
            self._free.setdefault(size, []).append(buffer)


def view(buffer: torch.Tensor, num_bytes: int) -> Any:
    """Its first bytes as the wires know buffers: a memoryview, or a tensor on a GPU."""
    part = buffer[:num_bytes]
    return memoryview(part.numpy().data) if buffer.device.type == "cpu" else part
