"""The ``nixl`` data plane: the reader reads staging slots of the source, and then their generation.

One agent per process, made at start. A reader copies into slots of its own, so that what it unpacks can change no more;
the generation is read after the payload and decides whether the payload is what was meant.
"""

import secrets
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from biphase.kvtransfer.nixl.landing import Landing
from biphase.kvtransfer.nixl.library import errors, new_agent, why_not
from biphase.kvtransfer.nixl.memory import WORD_BYTES, SlotsAt, StagingSlots
from biphase.kvtransfer.nixl.reader import Reader
from biphase.kvtransfer.slots import Slot, read_reference
from biphase.kvtransfer.staging import WAIT_S, StagedSender, Staging
from biphase.kvtransfer.until_closed import UntilClosed

SLOT_BYTES = 4 << 20
NUM_SLOTS = 16
_MOST_SOURCES = 64


def available() -> str | None:
    """Why this process cannot have the plane, None where it can."""
    return why_not()


@dataclass(slots=True)
class _Connected:
    """An agent of another process that we may read from."""

    name: str
    users: int = 0


class NixlPlane:
    """One per process and event loop. Raises ConnectionError where nixl is not installed."""

    name = "nixl"

    def __init__(
        self,
        host: str,
        *,
        num_slots: int = NUM_SLOTS,
        slot_bytes: int = SLOT_BYTES,
        per_pull: int | None = None,
        wait_s: float = WAIT_S,
    ) -> None:
        self._name = f"biphase-{secrets.token_hex(8)}"
        self._agent, self._backend = new_agent(self._name, host)
        self._num_slots, self._slot_bytes = num_slots, slot_bytes
        self._per_pull, self._wait_s = per_pull, wait_s
        self._staging: Staging | None = None
        self._answer = b""
        self.reader = Reader(self._agent, self._backend)
        self._landing: Landing | None = None
        self._sources: OrderedDict[str, _Connected] = OrderedDict()
        self._closed = False

    async def sender(self, hello: bytes, peer: str) -> StagedSender:
        self._check()
        if self._staging is None:
            memory = StagingSlots(self._agent, self._backend, self._num_slots, self._slot_bytes)
            self._staging = Staging(memory, per_pull=self._per_pull, wait_s=self._wait_s)
            self._answer = memory.description(self._name, self._agent.getLocalMD()).packed()
        return self._staging.sender(self._answer)

    async def receiver(self, peer: str) -> "NixlReceiver":
        self._check()
        if self.reader.num_lost >= self._num_slots:
            raise ConnectionError(f"nixl keeps all {self._num_slots} of our slots in reads that it never ended")
        return NixlReceiver(self, self._wait_s)

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        await self.reader.close()
        for source in self._sources.values():
            self._disconnect(source)
        if self._staging is not None:
            self._staging.close()
        if self._landing is not None:
            self._landing.close()
        self._agent = None

    def landing(self) -> "Landing":
        self._check()
        if self._landing is None:
            self._landing = Landing(self._agent, self._backend, self._num_slots, self._slot_bytes)
        return self._landing

    def connect(self, slots: SlotsAt) -> _Connected:
        """For one user more. Raises ConnectionError."""
        self._check()
        source = self._sources.pop(slots.name, None)
        if source is None:
            try:
                if slots.name != self._name:
                    self._agent.loadRemoteMD(slots.agent)
            except errors() as error:
                raise ConnectionError(f"nixl cannot connect to the source: {error}") from None
            source = _Connected(slots.name)
        self._sources[slots.name] = source
        source.users += 1
        for old, each in list(self._sources.items()):
            if len(self._sources) <= _MOST_SOURCES:
                break
            if not each.users:
                del self._sources[old]
                self._disconnect(each)
        return source

    def lost(self, source: _Connected) -> None:
        """A read failed: the next pull connects again."""
        if self._sources.get(source.name) is source:
            del self._sources[source.name]
            self._disconnect(source)

    def _disconnect(self, source: _Connected) -> None:
        if source.name == self._name:
            return
        with suppress(*errors()):
            self._agent.invalidateRemoteMD(source.name)

    def _check(self) -> None:
        if self._closed:
            raise ConnectionError("nixl is closed")


class NixlReceiver:
    """A PayloadReceiver (wire.py)."""

    hello = b""

    def __init__(self, plane: NixlPlane, wait_s: float) -> None:
        self._plane = plane
        self._wait_s = wait_s
        self._slots: SlotsAt | None = None
        self._source: _Connected | None = None
        self._intact: dict[bytes, bool] = {}
        self._until_closed = UntilClosed()

    async def start(self, answer: bytes) -> None:
        slots = SlotsAt.unpacked(answer)
        self._source = self._plane.connect(slots)
        self._slots = slots

    async def fetch(self, reference: bytes, num_bytes: int) -> memoryview:
        slots, source, landing = self._slots, self._source, self._plane.landing()
        if slots is None or source is None:
            raise ConnectionError("the pull is closed, or was not started")
        try:
            slot = read_reference(reference, slots.num_slots)
        except ValueError as error:
            raise ConnectionError(str(error)) from None
        if num_bytes > min(slots.slot_bytes, landing.slot_bytes):
            raise ConnectionError(f"a payload of {num_bytes} bytes in a slot of {slots.slot_bytes}")
        payload, intact = await self._until_closed.run(self._read(slots, source, landing, slot, num_bytes))
        self._intact[reference] = intact
        return payload

    async def _read(
        self, slots: SlotsAt, source: _Connected, landing: Landing, slot: Slot, num_bytes: int
    ) -> tuple[memoryview, bool]:
        """The payload, then the generation: whether that is still the one we were told."""
        index = await landing.lend(self._wait_s)
        given_up = partial(landing.give_back, index)
        read = partial(self._plane.reader.read, source.name, timeout_s=self._wait_s, given_up=given_up)
        try:
            if num_bytes:
                await read(slots.slots_at + slot.index * slots.stride, landing.payload_at(index), num_bytes)
            await read(slots.marks_at + slot.index * WORD_BYTES, landing.word_at(index), WORD_BYTES)
        except ConnectionError:
            self._plane.lost(source)
            raise
        intact = landing.word(index) == slots.salt + slot.generation
        return landing.payload(index, num_bytes), intact

    def intact(self, reference: bytes) -> bool:
        """As it was when the payload had been read; our copy has not changed since."""
        return self._intact.get(reference, False)

    def done(self, reference: bytes) -> None:
        """The slot comes back with the last view of it."""
        self._intact.pop(reference, None)

    def close(self) -> None:
        self._until_closed.close()
        self._intact.clear()
        if self._source is not None:
            self._source.users -= 1
            self._source = None
