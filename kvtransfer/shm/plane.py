"""The data plane between two processes of one host: staging slots of the source, mapped by its readers.

The slots and their generations are staging.py's. A reader copies straight from a slot to its blocks and then looks
whether the slot still has the generation of the reference that it was given.
"""

from collections import OrderedDict

import msgpack

from biphase.kvtransfer.shm.host import host_id
from biphase.kvtransfer.shm.memory import MappedSlots, MemoryName, SharedSlots
from biphase.kvtransfer.slots import Slot, read_reference
from biphase.kvtransfer.staging import WAIT_S, StagedSender, Staging

SLOT_BYTES = 4 * 1024 * 1024
NUM_SLOTS = 8
"""Of one process; their pages are there once they have been used."""

PER_PULL = 2
"""One is written while the other is read; more of them go round through memory and not the cache. With 8 MiB in flight a
copy into a slot runs at 10 GB/s and a digest at 31, where they run at 8 and 17 with 16 MiB (one EPYC 7003 core)."""

MOST_MAPPED = 16
"""Memories of sources that a reader keeps mapped; those not in use and longest not used go first, and those whose source
has ended when another is mapped: a mapping keeps the memory of the dead."""


class ShmPlane:
    """One per process and event loop."""

    name = "shm"

    def __init__(
        self,
        *,
        num_slots: int = NUM_SLOTS,
        slot_bytes: int = SLOT_BYTES,
        per_pull: int = PER_PULL,
        wait_s: float = WAIT_S,
    ) -> None:
        self._num_slots = num_slots
        self._slot_bytes = slot_bytes
        self._per_pull = per_pull
        self._wait_s = wait_s
        self._staging: Staging | None = None
        self._memory: SharedSlots | None = None
        self._mapped: OrderedDict[tuple[int, int], MappedSlots] = OrderedDict()
        self._closed = False

    async def sender(self, hello: bytes, peer: str) -> StagedSender:
        theirs = _host_of(hello)
        if self._closed:
            raise ConnectionError("shm is closed")
        if not host_id() or theirs != host_id():
            raise ConnectionError(f"{peer} cannot share memory with us: host {theirs or 'unknown'} against {host_id()}")
        if self._staging is None:
            try:
                self._memory = SharedSlots(self._num_slots, self._slot_bytes)
            except OSError as error:
                raise ConnectionError(f"no shared memory: {error.strerror}") from None
            self._staging = Staging(self._memory, per_pull=self._per_pull, wait_s=self._wait_s)
        assert self._memory is not None
        return self._staging.sender(self._memory.name.packed())

    async def receiver(self, peer: str) -> "ShmReceiver":
        if self._closed:
            raise ConnectionError("shm is closed")
        return ShmReceiver(self)

    async def close(self) -> None:
        self._closed = True
        self._mapped.clear()
        if self._staging is not None:
            self._staging.close()

    def map(self, name: MemoryName) -> MappedSlots:
        """The memory of a source, mapped once for all its pulls. Raises ConnectionError."""
        key = (name.pid, name.inode)
        mapped = self._mapped.pop(key, None)
        if mapped is None or mapped.name != name:
            mapped = MappedSlots(name)
            for old, each in list(self._mapped.items()):
                if not each.num_users and not each.name.is_there:
                    del self._mapped[old]
        self._mapped[key] = mapped
        for old, each in list(self._mapped.items()):
            if len(self._mapped) <= MOST_MAPPED:
                break
            if not each.num_users:
                del self._mapped[old]  # unmapped with the last view of it
        return mapped


class ShmReceiver:
    """The reader's side of one pull."""

    def __init__(self, plane: ShmPlane) -> None:
        self.hello: bytes = msgpack.packb({"host": host_id()})
        self._plane = plane
        self._mapped: MappedSlots | None = None
        self._last: tuple[bytes, Slot] = (b"", Slot(0, 0))

    async def start(self, answer: bytes) -> None:
        self._mapped = self._plane.map(MemoryName.unpacked(answer))
        self._mapped.num_users += 1

    async def fetch(self, reference: bytes, num_bytes: int) -> memoryview:
        mapped = self._live()
        return mapped.payload(self._slot(mapped, reference).index, num_bytes)

    def intact(self, reference: bytes) -> bool:
        mapped = self._live()
        slot = self._slot(mapped, reference)
        return mapped.generation(slot.index) == slot.generation

    def done(self, reference: bytes) -> None:
        pass

    def close(self) -> None:
        mapped, self._mapped = self._mapped, None
        if mapped is not None:
            mapped.num_users -= 1

    def _slot(self, mapped: MappedSlots, reference: bytes) -> Slot:
        if reference != self._last[0]:
            try:
                self._last = reference, read_reference(reference, mapped.name.num_slots)
            except ValueError as error:
                raise ConnectionError(str(error)) from None
        return self._last[1]

    def _live(self) -> MappedSlots:
        if self._mapped is None:
            raise ConnectionError("the pull is closed")
        return self._mapped


def _host_of(hello: bytes) -> str:
    try:
        body = msgpack.unpackb(hello)
        return str(body["host"])
    except (ValueError, TypeError, KeyError, msgpack.UnpackException) as error:
        raise ConnectionError(f"a hello to shm that is none: {error!r:.60}") from None
