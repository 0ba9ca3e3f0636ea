"""The slots of a staging memory: no slot is two pulls', no generation comes back, nothing is lost."""

import asyncio
import gc
from collections.abc import Hashable

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from biphase.kvtransfer.slots import Slot, Slots, Waiting, read_reference
from biphase.kvtransfer.staging import Staging

NUM_SLOTS, PER_PULL = 4, 2
PULLS = st.integers(0, 3)


class SlotsMachine(RuleBasedStateMachine):
    """Any order of asks, shows, takes and closes, against what readers can see."""

    def __init__(self) -> None:
        super().__init__()
        self.marks = [0] * NUM_SLOTS
        self.writing: list[tuple[Hashable, Slot]] = []
        self.shown: list[tuple[Hashable, Slot]] = []
        self.void: list[tuple[Hashable, Slot]] = []
        self.line: list[Waiting] = []
        self.slots = Slots(NUM_SLOTS, per_pull=PER_PULL, mark=self.mark, wake=self.woken)

    def mark(self, index: int, generation: int) -> None:
        assert generation == self.marks[index] + 1, "a generation came back"
        self.marks[index] = generation

    def woken(self, waiting: Waiting) -> None:
        self.line.remove(waiting)
        self.granted(waiting)

    def granted(self, waiting: Waiting) -> None:
        slot = waiting.granted
        assert slot is not None and self.marks[slot.index] == slot.generation
        assert all(slot.index != other.index for _, other in self.writing + self.shown + self.void)
        self.writing.append((waiting.pull, slot))

    @rule(pull=PULLS)
    def ask(self, pull: int) -> None:
        waiting = self.slots.ask(pull)
        if waiting.granted:
            self.granted(waiting)
        else:
            self.line.append(waiting)

    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        if self.line:
            self.slots.forget(self.line.pop(data.draw(st.integers(0, len(self.line) - 1))))

    @rule(data=st.data(), drop=st.booleans())
    def written(self, data: st.DataObject, drop: bool) -> None:
        both = self.writing + self.void
        if not both:
            return
        entry = data.draw(st.sampled_from(both))
        void = entry in self.void
        (self.void if void else self.writing).remove(entry)
        if drop:
            self.slots.let_go(entry[1])
        else:
            if not void:
                self.shown.append(entry)
            assert self.slots.show(entry[1]) is not void

    @rule(data=st.data(), stranger=st.booleans())
    def taken(self, data: st.DataObject, stranger: bool) -> None:
        if self.shown:
            entry = data.draw(st.sampled_from(self.shown))
            if stranger:
                assert not self.slots.taken(entry[1], "stranger")
                return
            self.shown.remove(entry)
            assert self.slots.taken(entry[1], entry[0])
            assert not self.slots.taken(entry[1], entry[0])

    @rule(pull=PULLS)
    def close(self, pull: int) -> None:
        self.line = [waiting for waiting in self.line if waiting.pull != pull]
        self.void += [entry for entry in self.writing if entry[0] == pull]
        self.writing = [entry for entry in self.writing if entry[0] != pull]
        over = [slot for owner, slot in self.shown if owner == pull]
        self.shown = [entry for entry in self.shown if entry[0] != pull]
        self.slots.close(pull)
        assert all(self.marks[slot.index] > slot.generation for slot in over), "a reader would not notice"

    @invariant()
    def nothing_is_lost(self) -> None:
        held = [owner for owner, _ in self.writing + self.shown + self.void]
        assert self.slots.num_free == NUM_SLOTS - len(held)
        assert self.slots.num_waiting == len(self.line)
        assert all(held.count(pull) <= PER_PULL for pull in range(4))
        if self.slots.num_free:
            assert all(held.count(waiting.pull) >= PER_PULL for waiting in self.line), "one waits beside a free slot"

    @invariant()
    def readers_see_what_they_were_shown(self) -> None:
        assert all(self.marks[slot.index] == slot.generation for _, slot in self.writing + self.shown)


SlotsMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
TestSlots = SlotsMachine.TestCase


def test_references() -> None:
    slot = Slot(3, 1 << 40)
    assert read_reference(slot.reference(), 4) == slot
    with pytest.raises(ValueError, match="a reference to staging slot 3 of 3"):
        read_reference(slot.reference(), 3)
    with pytest.raises(ValueError, match="of 5 bytes, not 12"):
        read_reference(b"short", 4)


class _Memory:
    num_slots, slot_bytes = 2, 64

    def __init__(self) -> None:
        self.bytes = np.zeros((2, 64), np.uint8)
        self.marks = [0, 0]
        self.closed = False

    def view(self, index: int, num_bytes: int) -> tuple[memoryview, np.ndarray]:
        part = self.bytes[index, :num_bytes]
        return memoryview(part), part

    def mark(self, index: int, generation: int) -> None:
        self.marks[index] = generation

    def close(self) -> None:
        self.closed = True


async def test_a_pull_waits_for_a_slot_and_no_longer_than_it_may() -> None:
    staging = Staging(_Memory(), per_pull=2, wait_s=0.05)
    first, second = staging.sender(b""), staging.sender(b"")
    references = [await first.send(await first.room(8)) for _ in range(2)]
    with pytest.raises(ConnectionError, match="none of 2 staging slots came free within 0.05 s"):
        await second.room(8)
    waiting = asyncio.ensure_future(second.room(8))
    await asyncio.sleep(0)
    first.taken(references[0])
    assert len((await waiting).payload) == 8
    with pytest.raises(ValueError, match="65 bytes into a staging slot of 64"):
        await second.room(65)
    with pytest.raises(ConnectionError, match="of 1 bytes, not 12"):
        second.taken(b"x")
    staging.close()


async def test_a_slot_is_free_only_when_its_last_writer_has_let_go() -> None:
    memory = _Memory()
    staging = Staging(memory, per_pull=2)
    sender = staging.sender(b"")
    room = await sender.room(8)
    before = memory.marks[room.slot.index]
    still_written = room.payload[2:4]
    sender.close()
    assert memory.marks[room.slot.index] == before + 1
    with pytest.raises(ConnectionError, match="the pull is closed"):
        await sender.send(room)
    del room
    gc.collect()
    await asyncio.sleep(0)
    assert staging.slots.num_free == 1
    still_written[0] = 1
    del still_written
    await asyncio.sleep(0)
    assert staging.slots.num_free == 2
    with pytest.raises(ConnectionError, match="the pull is closed"):
        await sender.room(8)


async def test_a_closed_pull_stops_waiting() -> None:
    staging = Staging(_Memory(), per_pull=1)
    sender = staging.sender(b"")
    room = await sender.room(8)
    waiting = asyncio.ensure_future(sender.room(8))
    await asyncio.sleep(0)
    sender.close()
    with pytest.raises(ConnectionError, match="the pull is closed"):
        await waiting
    del room
    staging.close()
