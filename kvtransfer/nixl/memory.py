"""Host memory that NIXL may read or write: a source's staging slots, a reader's own slots."""

import mmap
import secrets
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import msgpack
import numpy as np
import numpy.typing as npt

from biphase.kvtransfer.nixl.library import bindings, errors

WORD_BYTES = 8

SKEW_BYTES = 128
"""Where in its first page a slot begins: copies between a page's very start and a pool, which lies some bytes into one,
are slow on some processors."""


def slot_stride(slot_bytes: int) -> int:
    """From one slot to the next: whole pages."""
    return -(-(SKEW_BYTES + slot_bytes) // mmap.PAGESIZE) * mmap.PAGESIZE


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotsAt:
    """Where a reader finds a source's slots: plain numbers, and the library's own description of how to connect."""

    name: str
    agent: bytes
    slots_at: int
    marks_at: int
    salt: int
    num_slots: int
    slot_bytes: int
    stride: int

    def packed(self) -> bytes:
        return bytes(msgpack.packb(asdict(self)))

    @staticmethod
    def unpacked(data: bytes) -> "SlotsAt":
        """Raises ConnectionError for what is none."""
        try:
            slots = SlotsAt(**msgpack.unpackb(data))
        except (ValueError, TypeError, msgpack.UnpackException) as error:
            raise ConnectionError(f"no description of a source's slots: {error}") from None
        numbers = (slots.slots_at, slots.marks_at, slots.salt, slots.num_slots, slots.slot_bytes, slots.stride)
        if (
            not isinstance(slots.agent, bytes)
            or not isinstance(slots.name, str)
            or not all(type(value) is int and 0 <= value < 2**64 for value in numbers)
        ):
            raise ConnectionError("no description of a source's slots: a field of another type")
        return slots


class RegisteredMemory:
    """Pages of ours that an agent may transfer from and to, until it is closed."""

    def __init__(self, agent: Any, backend: Any, num_bytes: int) -> None:
        """Raises ConnectionError."""
        library = bindings()
        self._map = mmap.mmap(-1, max(1, num_bytes))
        self.bytes: npt.NDArray[np.uint8] = np.frombuffer(self._map, np.uint8)
        self.address = int(self.bytes.ctypes.data)
        self._agent, self._backend = agent, backend
        self._described = library.nixlRegDList(library.DRAM_SEG, [(self.address, len(self.bytes), 0, "")])
        try:
            agent.registerMem(self._described, [backend])
        except errors() as error:
            raise ConnectionError(f"nixl cannot register {num_bytes} bytes: {error}") from None

    def close(self) -> None:
        """The pages go with the last view of them."""
        with suppress(*errors()):  # it goes with its agent at the latest
            self._agent.deregisterMem(self._described, [self._backend])


class StagingSlots:
    """A source's StagingMemory (staging.py): a word per slot, then the slots.

    The words are generations plus a number drawn once: the memory of another process, at the same address of a process id
    that was used again, is not taken for ours.
    """

    def __init__(self, agent: Any, backend: Any, num_slots: int, slot_bytes: int) -> None:
        self.num_slots = num_slots
        self.slot_bytes = slot_bytes
        self.salt = secrets.randbits(62)
        self._stride = slot_stride(slot_bytes)
        self._at = -(-num_slots * WORD_BYTES // mmap.PAGESIZE) * mmap.PAGESIZE + SKEW_BYTES
        self._memory = RegisteredMemory(agent, backend, self._at + num_slots * self._stride)
        self._marks = self._memory.bytes[: num_slots * WORD_BYTES].view(np.uint64)
        self._marks[:] = self.salt

    def description(self, name: str, agent: bytes) -> SlotsAt:
        return SlotsAt(
            name=name,
            agent=agent,
            slots_at=self._memory.address + self._at,
            marks_at=self._memory.address,
            salt=self.salt,
            num_slots=self.num_slots,
            slot_bytes=self.slot_bytes,
            stride=self._stride,
        )

    def view(self, index: int, num_bytes: int) -> tuple[memoryview, Any]:
        start = self._at + index * self._stride
        part = self._memory.bytes[start : start + num_bytes]
        return part.data, part

    def mark(self, index: int, generation: int) -> None:
        self._marks[index] = self.salt + generation

    def close(self) -> None:
        self._memory.close()
