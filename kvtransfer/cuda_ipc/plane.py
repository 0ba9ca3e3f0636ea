"""The ``cuda_ipc`` data plane: staging slots in the source's GPU memory, which readers on the same host have open.

A reader copies a slot to memory of its own, waits until that copy is over, and then looks at the slot's generation,
which lies in host memory that both processes have (shm's, without payloads). The generation changes before anything is
launched that writes the slot again, so an unchanged one means that the whole copy was of what was meant. Packing returns
when it is over (GpuKvMemory): what a reference names is complete, and no event need cross processes.
"""

import asyncio
import os
import secrets
from collections import OrderedDict
from dataclasses import asdict, dataclass
from typing import Any

import msgpack
import torch

from biphase.kvtransfer.cuda_ipc.driver import CudaDriver, Driver
from biphase.kvtransfer.pair_groups.buffers import Buffers, view
from biphase.kvtransfer.shm.host import host_id
from biphase.kvtransfer.shm.memory import MappedSlots, MemoryName, SharedSlots
from biphase.kvtransfer.slots import Slot, read_reference
from biphase.kvtransfer.staging import WAIT_S, StagedSender, Staging
from biphase.kvtransfer.until_closed import UntilClosed

SLOT_BYTES = 4 << 20
NUM_SLOTS = 16
_KEEP_BYTES = 64 << 20
_MOST_OPEN = 16
_POLL_S = 0.0002
_TRIES_AT_ONCE = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shared:
    """What a reader must know of a source's slots."""

    key: bytes
    handle: bytes
    marks: bytes
    num_slots: int
    slot_bytes: int

    @staticmethod
    def unpacked(data: bytes) -> "_Shared":
        """Raises ConnectionError."""
        try:
            shared = _Shared(**msgpack.unpackb(data))
        except (ValueError, TypeError, msgpack.UnpackException) as error:
            raise ConnectionError(f"no description of slots on a GPU: {error}") from None
        texts, numbers = (shared.key, shared.handle, shared.marks), (shared.num_slots, shared.slot_bytes)
        if not all(isinstance(text, bytes) for text in texts) or not all(type(n) is int and n > 0 for n in numbers):
            raise ConnectionError("no description of slots on a GPU: a field of another type")
        return shared


class GpuSlots:
    """A source's StagingMemory (staging.py)."""

    def __init__(self, driver: Driver, num_slots: int, slot_bytes: int) -> None:
        """Raises ConnectionError or OSError."""
        self.num_slots = num_slots
        self.slot_bytes = slot_bytes
        self._driver = driver
        self._address = driver.allocate(num_slots * slot_bytes)
        self._marks = SharedSlots(num_slots, 0)
        self.described = msgpack.packb(
            asdict(
                _Shared(
                    key=secrets.token_bytes(8),
                    handle=driver.handle(self._address),
                    marks=self._marks.name.packed(),
                    num_slots=num_slots,
                    slot_bytes=slot_bytes,
                )
            )
        )

    def view(self, index: int, num_bytes: int) -> tuple[Any, Any]:
        slot = self._driver.tensor(self._address + index * self.slot_bytes, num_bytes)
        return slot, slot

    def mark(self, index: int, generation: int) -> None:
        self._marks.mark(index, generation)

    def close(self) -> None:
        self._marks.close()


class _Opened:
    """A source's slots in a reader."""

    def __init__(self, driver: Driver, shared: _Shared) -> None:
        """Raises ConnectionError."""
        name = MemoryName.unpacked(shared.marks)
        if name.num_slots != shared.num_slots:
            raise ConnectionError(f"{shared.num_slots} slots on a GPU with generations of {name.num_slots}")
        self.shared = shared
        self.users = 0
        self._driver = driver
        self._marks = MappedSlots(name)
        self._address = driver.open(shared.handle)

    def slot(self, index: int, num_bytes: int) -> torch.Tensor:
        return self._driver.tensor(self._address + index * self.shared.slot_bytes, num_bytes)

    def is_still(self, slot: Slot) -> bool:
        return self._marks.generation(slot.index) == slot.generation

    def close(self) -> None:
        self._driver.close(self._address)


class CudaIpcPlane:
    """One per process and event loop. Raises ConnectionError where there is no GPU."""

    name = "cuda_ipc"

    def __init__(
        self,
        device: str,
        *,
        num_slots: int = NUM_SLOTS,
        slot_bytes: int = SLOT_BYTES,
        per_pull: int | None = None,
        wait_s: float = WAIT_S,
        driver: Driver | None = None,
    ) -> None:
        self.driver = driver or CudaDriver(device)
        self.buffers = Buffers(_KEEP_BYTES, self.driver.buffer)
        self._sizes = num_slots, slot_bytes
        self._per_pull, self._wait_s = per_pull, wait_s
        self._slots: GpuSlots | None = None
        self._staging: Staging | None = None
        self._opened: OrderedDict[bytes, _Opened] = OrderedDict()
        self._closed = False

    async def sender(self, hello: bytes, peer: str) -> StagedSender:
        self._check()
        try:
            theirs = str(msgpack.unpackb(hello)["host"])
        except (ValueError, TypeError, KeyError, msgpack.UnpackException) as error:
            raise ConnectionError(f"a request from {peer} that cuda_ipc cannot read: {error!r:.60}") from None
        if not host_id() or theirs != host_id():
            raise ConnectionError(f"{peer} is on host {theirs or 'unknown'}, we on {host_id() or 'unknown'}")
        if self._staging is None or self._slots is None:
            try:
                self._slots = GpuSlots(self.driver, *self._sizes)
            except OSError as error:
                raise ConnectionError(f"no staging slots on {self.driver.device}: {error}") from None
            self._staging = Staging(self._slots, per_pull=self._per_pull, wait_s=self._wait_s)
        return self._staging.sender(self._slots.described)

    async def receiver(self, peer: str) -> "CudaIpcReceiver":
        self._check()
        return CudaIpcReceiver(self, self._wait_s)

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        if self._staging is not None:
            self._staging.close()
        for opened in self._opened.values():
            if not opened.users:
                opened.close()
        self._opened.clear()

    def open(self, answer: bytes) -> _Opened:
        """A source's slots, opened once for all its pulls, for one user more. Raises ConnectionError."""
        self._check()
        shared = _Shared.unpacked(answer)
        opened = self._opened.pop(shared.key, None) or _Opened(self.driver, shared)
        self._opened[shared.key] = opened
        opened.users += 1
        for key, each in list(self._opened.items()):
            if len(self._opened) <= _MOST_OPEN:
                break
            if not each.users:
                del self._opened[key]
                each.close()
        return opened

    def _check(self) -> None:
        if self._closed:
            raise ConnectionError("cuda_ipc is closed")


class CudaIpcReceiver:
    """A PayloadReceiver (wire.py), of tensors on the reader's GPU."""

    def __init__(self, plane: CudaIpcPlane, wait_s: float) -> None:
        self.hello: bytes = msgpack.packb({"host": host_id(), "pid": os.getpid()})
        self._plane = plane
        self._wait_s = wait_s
        self._opened: _Opened | None = None
        self._fetched: dict[bytes, tuple[torch.Tensor, bool]] = {}
        self._until_closed = UntilClosed()

    async def start(self, answer: bytes) -> None:
        self._opened = self._plane.open(answer)

    async def fetch(self, reference: bytes, num_bytes: int) -> Any:
        opened = self._opened
        if opened is None:
            raise ConnectionError("the pull is closed, or was not started")
        try:
            slot = read_reference(reference, opened.shared.num_slots)
        except ValueError as error:
            raise ConnectionError(str(error)) from None
        if num_bytes > opened.shared.slot_bytes:
            raise ConnectionError(f"a payload of {num_bytes} bytes in a slot of {opened.shared.slot_bytes}")
        buffer = self._plane.buffers.get(num_bytes)
        await self._until_closed.run(self._copy(buffer[:num_bytes], opened.slot(slot.index, num_bytes)))
        self._fetched[reference] = buffer, opened.is_still(slot)
        return view(buffer, num_bytes)

    async def _copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Until it is over. A copy that is given up goes on: its target is dropped, and lives as long as the copy."""
        is_over = self._plane.driver.copy(target, source)
        try:
            async with asyncio.timeout(self._wait_s):
                tries = 0
                while not is_over():
                    tries += 1
                    await asyncio.sleep(0 if tries < _TRIES_AT_ONCE else _POLL_S)
        except TimeoutError:
            raise ConnectionError(f"a copy of {target.numel()} bytes took more than {self._wait_s:g} s") from None

    def intact(self, reference: bytes) -> bool:
        """As it was when the copy was over; our copy has not changed since."""
        fetched = self._fetched.get(reference)
        return fetched is not None and fetched[1]

    def done(self, reference: bytes) -> None:
        fetched = self._fetched.pop(reference, None)
        if fetched is not None:
            self._plane.buffers.put(fetched[0])

    def close(self) -> None:
        """What was fetched and not given back may still be read: it is dropped."""
        self._until_closed.close()
        self._fetched.clear()
        if self._opened is not None:
            self._opened.users -= 1
            self._opened = None
