"""The serving half of every one-sided data plane: slots of a staging memory, granted to pulls and voided with them.

A plane brings the memory (``StagingMemory``); waiting, shares and generations are the same for all. Lives in one event
loop. Touches no socket and no block pool.
"""

import asyncio
import weakref
from collections.abc import Callable
from typing import Any, Protocol

from biphase.kvtransfer.frames import HEADER_BYTES
from biphase.kvtransfer.slots import Slot, Slots, Waiting, read_reference
from biphase.kvtransfer.wire import Room

WAIT_S = 5.0
"""How long a pull waits for a slot: as long as a reader may take nothing before it is cut."""

_LARGER = 4
"""Pieces of four messages: what a piece costs beside its copies is then a fifth of them."""


class StagingMemory(Protocol):
    """What readers can reach: ``num_slots`` slots of ``slot_bytes``, and a generation number for each."""

    num_slots: int
    slot_bytes: int

    def view(self, index: int, num_bytes: int) -> tuple[Any, Any]:
        """A writable buffer over the slot's first bytes, and an object that lives as long as any view of it does."""
        ...

    def mark(self, index: int, generation: int) -> None:
        """Readers see this generation from now on, before any later write to the slot."""
        ...

    def close(self) -> None: ...


class StagedRoom:
    """A slot to write, until it is sent or dropped."""

    __slots__ = ("dropped", "payload", "slot")

    def __init__(self, slot: Slot, payload: Any, dropped: "weakref.finalize[[Slot], Any]") -> None:
        self.slot = slot
        self.payload = payload
        self.dropped = dropped
        """What becomes of the slot with its last view, unless it is shown before."""


class Staging:
    """A staging memory and who holds which part of it."""

    def __init__(self, memory: StagingMemory, *, per_pull: int | None = None, wait_s: float = WAIT_S) -> None:
        self.memory = memory
        self._loop = asyncio.get_running_loop()
        self._wait_s = wait_s
        self._turns: dict[Waiting, asyncio.Future[None]] = {}
        share = per_pull or max(1, memory.num_slots // 2)
        self.slots = Slots(memory.num_slots, per_pull=share, mark=self._mark, wake=self._wake)
        self._closed = False

    def sender(self, answer: bytes, on_close: Callable[[], None] | None = None) -> "StagedSender":
        """For one pull."""
        if self._closed:
            raise ConnectionError("the staging memory is closed")
        return StagedSender(self, answer, on_close)

    async def room(self, pull: object, num_bytes: int) -> StagedRoom:
        if num_bytes > self.memory.slot_bytes:
            raise ValueError(f"a payload of {num_bytes} bytes into a staging slot of {self.memory.slot_bytes}")
        waiting = self.slots.ask(pull)
        if waiting.granted is None:
            turn = self._turns[waiting] = self._loop.create_future()
            try:
                async with asyncio.timeout(self._wait_s):
                    await turn
            except TimeoutError:
                self.slots.forget(waiting)
                total = self.memory.num_slots
                raise ConnectionError(f"none of {total} staging slots came free within {self._wait_s:g} s") from None
            except asyncio.CancelledError:
                self.slots.forget(waiting)
                raise
            finally:
                del self._turns[waiting]
        slot = waiting.granted
        if slot is None or self._closed:
            raise ConnectionError("the pull is closed")
        payload, alive = self.memory.view(slot.index, num_bytes)
        # whoever still writes (a pack in a thread outlives the pull that was cancelled) holds a view of it
        dropped = weakref.finalize(alive, self._let_go, slot)
        dropped.atexit = False
        return StagedRoom(slot, payload, dropped)

    def close_pull(self, pull: object) -> None:
        self.slots.close(pull)
        for waiting, turn in self._turns.items():
            if waiting.pull is pull and not turn.done():
                turn.set_result(None)

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            for turn in self._turns.values():
                if not turn.done():
                    turn.set_result(None)
            self.memory.close()

    def _mark(self, index: int, generation: int) -> None:
        if not self._closed:
            self.memory.mark(index, generation)

    def _wake(self, waiting: Waiting) -> None:
        turn = self._turns.get(waiting)
        if turn is not None and not turn.done():
            turn.set_result(None)

    def _let_go(self, slot: Slot) -> None:
        """The last view is gone, in whatever thread."""
        try:
            self._loop.call_soon_threadsafe(self.slots.let_go, slot)
        except RuntimeError:  # the loop is closed, and the slots with it
            pass


class StagedSender:
    """A PayloadSender (wire.py) over staging slots."""

    def __init__(self, staging: Staging, answer: bytes, on_close: Callable[[], None] | None) -> None:
        self.answer = answer
        self._staging = staging
        self._on_close = on_close
        self._closed = False

    def piece_bytes(self, message_bytes: int) -> int:
        larger = _LARGER * (message_bytes + HEADER_BYTES)  # the header is not in the slot
        return max(message_bytes, min(larger, self._staging.memory.slot_bytes))

    async def room(self, num_bytes: int) -> StagedRoom:
        if self._closed:
            raise ConnectionError("the pull is closed")
        return await self._staging.room(self, num_bytes)

    async def send(self, room: Room) -> bytes:
        assert isinstance(room, StagedRoom)
        if self._closed or not self._staging.slots.show(room.slot):
            raise ConnectionError("the pull is closed")
        room.dropped.detach()
        return room.slot.reference()

    def taken(self, reference: bytes) -> None:
        """Raises ConnectionError for a reference that is none of ours; a void one is of no consequence."""
        try:
            self._staging.slots.taken(read_reference(reference, self._staging.memory.num_slots), self)
        except ValueError as error:
            raise ConnectionError(str(error)) from None

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._staging.close_pull(self)
            if self._on_close is not None:
                self._on_close()
