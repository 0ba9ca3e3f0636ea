"""Which staging slots are whose. Pure: the table behind the one-sided data planes (shm, nixl, cuda_ipc).

A one-sided plane never shows a reader the block pool: pieces are packed into slots of a staging memory, and the reader
copies out of them whenever it gets to it, perhaps after a long stop. So every slot has a generation, which changes
*before* the slot may be written again: a reader that finds the generation of its reference unchanged after it has read
has read what the reference meant.

A slot goes free -> writing -> shown -> free. A pull that is closed voids its slots at once: those shown get a new
generation and are free; one that is still written (a pack in another thread, which no cancellation stops) is free when
its writer lets go. One pull holds at most ``per_pull`` slots, so a reader that takes nothing stops no other pull, and
who waits is served in the order of asking. Owner: staging.py, which waits and knows the memory.
"""

import struct
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from enum import Enum

_REFERENCE = struct.Struct("<IQ")
REFERENCE_BYTES = _REFERENCE.size


@dataclass(frozen=True, slots=True)
class Slot:
    """A slot as it was granted: of use while its generation is the slot's."""

    index: int
    generation: int

    def reference(self) -> bytes:
        """What a reader is told."""
        return _REFERENCE.pack(self.index, self.generation)


class Waiting:
    """One who asked while nothing was free; ``granted`` is set when it is its turn."""

    __slots__ = ("granted", "pull")

    def __init__(self, pull: Hashable) -> None:
        self.pull = pull
        self.granted: Slot | None = None


class _State(Enum):
    FREE = 0
    WRITING = 1
    SHOWN = 2
    CONDEMNED = 3
    """Void, but its writer has not let go."""


def read_reference(reference: bytes, num_slots: int) -> Slot:
    """Raises ValueError, one line, for bytes that name no slot of a memory of ``num_slots``."""
    if len(reference) != REFERENCE_BYTES:
        raise ValueError(f"a reference to a staging slot of {len(reference)} bytes, not {REFERENCE_BYTES}")
    index, generation = _REFERENCE.unpack(reference)
    if index >= num_slots:
        raise ValueError(f"a reference to staging slot {index} of {num_slots}")
    return Slot(index, generation)


class Slots:
    """The table. ``mark(index, generation)`` is called before anything else can happen to a slot whose generation
    changes: it tells readers. ``wake(waiting)`` is called for a waiting one whose ``granted`` has been set."""

    def __init__(
        self,
        num_slots: int,
        *,
        per_pull: int,
        mark: Callable[[int, int], None],
        wake: Callable[[Waiting], None],
    ) -> None:
        if num_slots < 1 or per_pull < 1:
            raise ValueError(f"{num_slots} staging slots with {per_pull} to a pull: at least 1 each")
        self.num_slots = num_slots
        self._per_pull = per_pull
        self._mark = mark
        self._wake = wake
        self._states = [_State.FREE] * num_slots
        self._generations = [0] * num_slots
        self._pulls: list[Hashable] = [None] * num_slots
        self._held: dict[Hashable, int] = {}
        self._free = list(range(num_slots))  # the last freed first: it is still in the cache
        self._line: deque[Waiting] = deque()

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_waiting(self) -> int:
        return len(self._line)

    def ask(self, pull: Hashable) -> Waiting:
        """A slot to write for ``pull``: granted already, or when its turn comes, unless ``forget`` comes first."""
        waiting = Waiting(pull)
        self._line.append(waiting)
        self._serve(asking=waiting)
        return waiting

    def forget(self, waiting: Waiting) -> None:
        """It waits no longer; what it was granted in the same moment goes back."""
        if waiting in self._line:
            self._line.remove(waiting)
        elif waiting.granted is not None:
            self.let_go(waiting.granted)

    def show(self, slot: Slot) -> bool:
        """It is written and the reader may have it: False where it has been voided meanwhile, and is free now."""
        if self._generations[slot.index] != slot.generation:
            self.let_go(slot)
            return False
        if self._states[slot.index] is not _State.WRITING:
            return False
        self._states[slot.index] = _State.SHOWN
        return True

    def let_go(self, slot: Slot) -> None:
        """Nobody writes into it any more; unless the reader has been shown it, it is free."""
        state, age = self._states[slot.index], self._generations[slot.index] - slot.generation
        if state is _State.CONDEMNED and age == 1:
            self._release(slot.index)
        elif state is _State.WRITING and age == 0:
            self._change_generation(slot.index)
            self._release(slot.index)

    def taken(self, slot: Slot, pull: Hashable) -> bool:
        """The reader of ``pull`` has done with it. False for a slot that it had not been shown, or that is void."""
        if self._generations[slot.index] != slot.generation or self._states[slot.index] is not _State.SHOWN:
            return False
        if self._pulls[slot.index] != pull:
            return False
        self._release(slot.index)
        return True

    def close(self, pull: Hashable) -> None:
        """The pull is over, however it ended: all its slots are void, and it waits for none."""
        self._line = deque(waiting for waiting in self._line if waiting.pull != pull)
        for index, owner in enumerate(self._pulls):
            if owner != pull or self._states[index] is _State.CONDEMNED:
                continue
            self._change_generation(index)
            if self._states[index] is _State.WRITING:
                self._states[index] = _State.CONDEMNED
            else:
                self._release(index, serve=False)
        self._serve()

    def _release(self, index: int, *, serve: bool = True) -> None:
        pull = self._pulls[index]
        self._states[index], self._pulls[index] = _State.FREE, None
        self._free.append(index)
        self._held[pull] -= 1
        if not self._held[pull]:
            del self._held[pull]
        if serve:
            self._serve()

    def _serve(self, asking: Waiting | None = None) -> None:
        """Grant what is free to the first in line that holds less than its share."""
        while self._free:
            turn = next((w for w in self._line if self._held.get(w.pull, 0) < self._per_pull), None)
            if turn is None:
                return
            self._line.remove(turn)
            index = self._free.pop()
            self._states[index], self._pulls[index] = _State.WRITING, turn.pull
            self._held[turn.pull] = self._held.get(turn.pull, 0) + 1
            self._change_generation(index)
            turn.granted = Slot(index, self._generations[index])
            if turn is not asking:
                self._wake(turn)

    def _change_generation(self, index: int) -> None:
        self._generations[index] += 1
        self._mark(index, self._generations[index])
