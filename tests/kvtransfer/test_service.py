"""What a service does to blocks around a sink that takes its time: held exactly while somebody reads them."""

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from support.kv import LAYOUT, CountingPool, make_signature, random_pool

from biphase.kernels.kv_layout import KvBox
from biphase.kernels.kv_pack import CpuKvMemory
from biphase.kvtransfer.exports import ExportEnded, ExportTable
from biphase.kvtransfer.frames import FrameKind
from biphase.kvtransfer.refusals import KvRefused
from biphase.kvtransfer.service import KvService
from biphase.kvtransfer.wire import PullOrder
from biphase.protos.ids import BlockId, TicketId

TICKET = TicketId(b"t" * 16)
BLOCKS = [BlockId(block) for block in (3, 1, 2)]


class Room:
    def __init__(self, num_bytes: int) -> None:
        self.payload = memoryview(bytearray(num_bytes))


class SlowSink:
    """Takes beats at once and each piece when told; when cancelled it lets go of the memory only when told."""

    def __init__(self, *, gathers: bool) -> None:
        self.gathers = gathers
        self.sending, self.take = asyncio.Event(), asyncio.Event()
        self.closed = False
        self.taken: list[bytes] = []

    def piece_bytes(self, message_bytes: int) -> int:
        return message_bytes

    async def room(self, num_bytes: int) -> Room:
        return Room(num_bytes)

    async def send(self, header: bytes, payload: Room | Sequence[memoryview] | bytes) -> None:
        if header[4] != FrameKind.PIECE:
            return
        self.sending.set()
        cancelled = False
        while not self.take.is_set():
            try:
                await self.take.wait()
            except asyncio.CancelledError:
                cancelled = True
        if cancelled:
            raise asyncio.CancelledError
        parts = [payload.payload] if isinstance(payload, Room) else payload
        self.taken.append(b"".join(bytes(part) for part in parts))  # type: ignore[union-attr]

    async def abort(self, header: bytes, payload: Room | Sequence[memoryview] | bytes, share: float) -> None:
        raise ConnectionError("broken on purpose")

    def close(self) -> None:
        self.closed = True


class Side:
    def __init__(self, memory: CpuKvMemory | None = None) -> None:
        self.pool = CountingPool()
        self.exports = ExportTable(self.pool, 60.0)
        self.ended: list[ExportEnded] = []
        self.memory = memory or CpuKvMemory(random_pool(), LAYOUT)
        self.service = KvService(
            exports=self.exports,
            memory=self.memory,
            signature=make_signature("prefill-0"),
            on_ended=self.ended.append,
        )
        self.service.start()
        self.exports.open(TICKET, BLOCKS, 40, time.monotonic())
        self.exports.finish(TICKET, 7, time.monotonic())

    def serve(self, sink: SlowSink) -> "asyncio.Task[None]":
        order = PullOrder(ticket=TICKET, epoch=1, incarnation=1, box=LAYOUT.box(40))
        return asyncio.create_task(self.service.serve(order, sink))


async def test_blocks_sent_in_place_are_held_until_the_sink_lets_go() -> None:
    side, sink = Side(), SlowSink(gathers=True)
    serving = side.serve(sink)
    await sink.sending.wait()
    side.exports.revoke(TICKET, time.monotonic())
    await asyncio.wait({serving}, timeout=0.02)
    assert set(side.pool.references) == set(BLOCKS) and not side.ended and not serving.done()
    sink.take.set()
    with pytest.raises(KvRefused, match="REVOKED"):
        await serving
    await asyncio.sleep(0)
    assert not side.pool.references and [end.outcome for end in side.ended] == ["revoked"] and sink.closed
    await side.service.stop()


async def test_a_packed_piece_holds_no_block_while_it_is_sent() -> None:
    side, sink = Side(), SlowSink(gathers=False)
    serving = side.serve(sink)
    await sink.sending.wait()
    side.exports.revoke(TICKET, time.monotonic())
    assert not side.pool.references
    sink.take.set()
    with pytest.raises(KvRefused, match="REVOKED"):
        await serving
    await side.service.stop()


async def test_what_is_sent_in_place_is_what_would_be_packed() -> None:
    side, sink = Side(), SlowSink(gathers=True)
    sink.take.set()
    await side.serve(sink)
    boxes = [LAYOUT.box(stop) for stop in (16, 32, 40)]
    for taken, start, box in zip(sink.taken, (0, 16, 32), boxes, strict=True):
        piece = KvBox(layer_start=0, layer_end=4, head_start=0, head_end=2, token_start=start, token_end=box.token_end)
        packed = bytearray(piece.num_bytes(LAYOUT))
        side.memory.pack(BLOCKS, piece, packed)
        assert taken == bytes(packed)
    await side.service.stop()


async def test_stopping_waits_for_a_sink_that_has_not_let_go() -> None:
    side, sink = Side(), SlowSink(gathers=True)
    serving = side.serve(sink)
    await sink.sending.wait()
    stopping = asyncio.create_task(side.service.stop())
    await asyncio.wait({stopping}, timeout=0.02)
    assert not stopping.done() and side.exports.counters()["running_sends"] == 1
    sink.take.set()
    await stopping
    assert serving.cancelled() and side.exports.counters()["running_sends"] == 0


class RevokingMemory(CpuKvMemory):
    revoke: Callable[[], None]

    def pack(self, blocks: Sequence[int], box: KvBox, out: Any, codec: str = "raw") -> None:
        self.revoke()
        super().pack(blocks, box, out, codec)


async def test_an_end_in_the_middle_of_a_pack_leaves_no_cancellation_behind() -> None:
    """The wire tells the reader why, in the same task: its own first wait must not be cancelled."""
    memory = RevokingMemory(np.zeros(LAYOUT.pool_shape(8), np.float32), LAYOUT)
    side, sink = Side(memory), SlowSink(gathers=False)
    memory.revoke = lambda: side.exports.revoke(TICKET, time.monotonic())
    sink.take.set()
    order = PullOrder(ticket=TICKET, epoch=1, incarnation=1, box=LAYOUT.box(40))

    async def wire() -> str:
        try:
            await side.service.serve(order, sink)
        except KvRefused as refused:
            await asyncio.sleep(0)
            return str(refused)
        return ""

    assert "REVOKED" in await asyncio.create_task(wire())
    assert not side.pool.references
    await side.service.stop()


class CountingSink(SlowSink):
    """Counts beats."""

    def __init__(self) -> None:
        super().__init__(gathers=False)
        self.num_beats = 0

    async def send(self, header: bytes, payload: Room | Sequence[memoryview] | bytes) -> None:
        self.num_beats += header[4] == FrameKind.BEAT


async def test_beats_come_however_often_layers_that_may_not_leave_yet_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("biphase.kvtransfer.reader.BEAT_S", 0.02)
    side, sink = Side(), CountingSink()
    ticket = TicketId(b"u" * 16)  # nothing of it is computed
    side.exports.open(ticket, BLOCKS, 40, time.monotonic())
    pull = asyncio.create_task(
        side.service.serve(PullOrder(ticket=ticket, epoch=1, incarnation=1, box=LAYOUT.box(40)), sink)
    )
    async with asyncio.timeout(10):
        while sink.num_beats < 4:
            side.service.wake(ticket)
            await asyncio.sleep(0)
    pull.cancel()
    await asyncio.wait([pull])
    await side.service.stop()
