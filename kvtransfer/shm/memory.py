"""The memory behind shm: an anonymous file of the source's, which a reader maps for reading only.

    whole pages of generations (u64, one per slot), then the slots, each of whole pages, its payload 128 bytes in

It has no name: the reader opens it through /proc/PID/fd of the source, and it is gone with the last process that has it
mapped, however that ended. A generation is one aligned store; the copies before and after it release and take the
interpreter's lock, which orders them.
"""

import ctypes
import mmap
import os
from dataclasses import asdict, dataclass
from typing import Any

import msgpack

_PAGE = mmap.PAGESIZE
_WORD = 8

_SKEW_BYTES = 128
"""A payload at the start of a page is copied to a pool some bytes into one, at a quarter of the speed: a copy by ``rep
movsb`` whose target lies 1 to 31 bytes after its source, modulo a page, trips over itself on Zen 3 and 4. Pools lie 16
(numpy) or 64 (torch) bytes into a page."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryName:
    """Where a reader finds a source's memory."""

    pid: int
    fd: int
    inode: int
    num_slots: int
    slot_bytes: int

    @property
    def is_there(self) -> bool:
        """Whether its source still has it."""
        try:
            return os.stat(f"/proc/{self.pid}/fd/{self.fd}").st_ino == self.inode
        except OSError:
            return False

    def packed(self) -> bytes:
        return bytes(msgpack.packb(asdict(self)))

    @staticmethod
    def unpacked(data: bytes) -> "MemoryName":
        """Raises ConnectionError for what is none."""
        try:
            name = MemoryName(**msgpack.unpackb(data))
        except (ValueError, TypeError, msgpack.UnpackException) as error:
            raise ConnectionError(f"no name of a shared memory: {error}") from None
        values = (name.pid, name.fd, name.inode, name.num_slots, name.slot_bytes)
        if not all(type(value) is int and 0 <= value < 2**63 for value in values) or not name.num_slots:
            raise ConnectionError(f"no name of a shared memory: {name}")
        return name


class SharedSlots:
    """The source's side, a StagingMemory (staging.py)."""

    def __init__(self, num_slots: int, slot_bytes: int) -> None:
        """Raises OSError where the memory cannot be had."""
        self.num_slots = num_slots
        self.slot_bytes = slot_bytes
        self._at, self._stride, size = _places(num_slots, slot_bytes)
        self._fd = os.memfd_create("biphase-kv", os.MFD_CLOEXEC)
        try:
            os.ftruncate(self._fd, size)
            self._map = mmap.mmap(self._fd, size)
        except OSError:
            os.close(self._fd)
            raise
        self._generations = (ctypes.c_uint64 * num_slots).from_buffer(self._map)
        self.name = MemoryName(
            pid=os.getpid(),
            fd=self._fd,
            inode=os.fstat(self._fd).st_ino,
            num_slots=num_slots,
            slot_bytes=slot_bytes,
        )

    def view(self, index: int, num_bytes: int) -> tuple[memoryview, Any]:
        slot = (ctypes.c_char * num_bytes).from_buffer(self._map, self._at + index * self._stride)
        return memoryview(slot).cast("B"), slot

    def mark(self, index: int, generation: int) -> None:
        self._generations[index] = generation

    def close(self) -> None:
        """No reader can come any more; the memory goes when the last view of it does. Neither view nor mark after it."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            del self._map, self._generations


class MappedSlots:
    """A reader's side of one source's memory."""

    def __init__(self, name: MemoryName) -> None:
        """Raises ConnectionError where it cannot be mapped."""
        self.name = name
        self.num_users = 0
        self._at, self._stride, size = _places(name.num_slots, name.slot_bytes)
        try:
            fd = os.open(f"/proc/{name.pid}/fd/{name.fd}", os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise ConnectionError(f"the memory of process {name.pid} cannot be opened: {error.strerror}") from None
        try:
            found = os.fstat(fd)
            if (found.st_ino, found.st_size) != (name.inode, size):
                raise ConnectionError(f"process {name.pid} has another file in place of its shared memory")
            self._map = mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ)
        except (OSError, ValueError) as error:
            raise ConnectionError(f"the memory of process {name.pid} cannot be mapped: {error}") from None
        finally:
            os.close(fd)
        self._view = memoryview(self._map)
        self._generations = self._view[: name.num_slots * _WORD].cast("Q")

    def payload(self, index: int, num_bytes: int) -> memoryview:
        """Raises ConnectionError for more than a slot holds."""
        if num_bytes > self.name.slot_bytes:
            raise ConnectionError(f"a payload of {num_bytes} bytes in a slot of {self.name.slot_bytes}")
        start = self._at + index * self._stride
        return self._view[start : start + num_bytes]

    def generation(self, index: int) -> int:
        return self._generations[index]


def _places(num_slots: int, slot_bytes: int) -> tuple[int, int, int]:
    """Where the first payload lies, how far it is from one to the next, and the size of it all."""
    slots_at = _whole_pages(num_slots * _WORD)
    stride = _whole_pages(_SKEW_BYTES + slot_bytes)
    return slots_at + _SKEW_BYTES, stride, slots_at + num_slots * stride


def _whole_pages(num_bytes: int) -> int:
    return -(-num_bytes // _PAGE) * _PAGE
