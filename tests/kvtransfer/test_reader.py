"""What a pull does between its pieces: nothing waits for a beat that could have left before."""

import asyncio
import time

import pytest
from support.kv import LAYOUT, CountingPool, make_signature, random_pool
from support.sinks import KindsSink

from biphase.kernels.kv_pack import CpuKvMemory
from biphase.kvtransfer import due
from biphase.kvtransfer.exports import ExportTable
from biphase.kvtransfer.frames import FrameKind
from biphase.kvtransfer.service import KvService
from biphase.kvtransfer.wire import PullOrder
from biphase.protos.ids import BlockId, TicketId

TICKET = TicketId(b"t" * 16)


async def test_the_trailer_follows_at_once_where_every_layer_had_left_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("biphase.kvtransfer.reader.BEAT_S", 600.0)
    monkeypatch.setattr(due, "LEAST_AHEAD_BYTES", 1)
    exports = ExportTable(CountingPool(), 60.0)
    service = KvService(
        exports=exports,
        memory=CpuKvMemory(random_pool(), LAYOUT),
        signature=make_signature("prefill-0"),
        on_ended=lambda ended: None,
    )
    service.start()
    exports.open(TICKET, [BlockId(block) for block in (3, 1, 2)], 40, time.monotonic())
    sink = KindsSink()
    pull = asyncio.create_task(
        service.serve(PullOrder(ticket=TICKET, epoch=1, incarnation=1, box=LAYOUT.box(40)), sink)
    )
    exports.advance_layers(TICKET, 40, LAYOUT.num_layers)
    async with asyncio.timeout(60):
        while sink.layers < LAYOUT.num_layers:
            await sink.sent.wait()
            sink.sent.clear()
        exports.finish(TICKET, 7, time.monotonic())  # the last step is over: all is computed, token 0 is there
        await pull
    assert sink.kinds[-1] is FrameKind.TRAILER
    await service.stop()
