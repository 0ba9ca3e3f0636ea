"""A source's clock as its frames show it, and the exposed time that is told by it."""

import asyncio
import time
from collections.abc import Sequence
from typing import Any

import pytest
from support.kv import FIRST_TOKEN, NUM_TOKENS, decode_side, prefill_side, pull

from biphase.kvtransfer.frames import FrameKind, parse_header
from biphase.kvtransfer.timing import SourceClock, Tail, TailSeen, stamp
from biphase.kvtransfer.wire import FrameSink, Room


@pytest.mark.parametrize("apart_s", [0.0, 1e6, -500.0, 2**32 / 1e5 - 1000.5])  # the last: the stamp runs over
def test_the_fastest_frame_tells_the_distance_of_both_clocks(apart_s: float) -> None:
    clock = SourceClock()
    for sent_s, travel_s in [(1000.0, 0.05), (1000.2, 0.001), (1001.0, 0.3), (1002.0, 0.01)]:
        clock.saw(stamp(sent_s + apart_s), sent_s + travel_s)
    for sent_s in (999.0, 1000.2, 1001.7):
        assert clock.here_s(stamp(sent_s + apart_s)) == pytest.approx(sent_s + 0.001, abs=3e-5)


def test_a_source_that_says_nothing_leaves_its_clock_unknown() -> None:
    clock = SourceClock()
    clock.saw(0, 5.0)
    assert clock.here_s(0) == float("inf")


def test_the_tail_is_what_comes_when_all_streams_know_everything_computed_without_the_rests() -> None:
    tail = Tail(["a", "b"])
    tail.piece(100, 100, 0.5)
    tail.computed("a", sent_s=1.0, before_s=0.5, came_s=1.2)
    tail.piece(100, 100, 1.2)
    tail.rested(1.2, 1.9)
    assert tail.seen == TailSeen()
    tail.computed("b", sent_s=2.0, before_s=2.5, came_s=3.0)  # behind a frame that took until 2.5
    tail.piece(100, 50, 3.0)
    tail.rested(3.0, 4.0)
    tail.rested(3.5, 4.5)  # of the other stream: half a second of it is new
    tail.computed("b", sent_s=9.0, before_s=9.0, came_s=9.0)
    tail.piece(100, 50, 5.0)
    assert tail.seen == TailSeen(raw_bytes=200, wire_bytes=100, seconds=1.0)
    tail.broken()
    tail.piece(100, 50, 6.0)
    assert tail.seen == TailSeen()


class HeldBack:
    """A sink that keeps every frame but beats for a while, as the buffers of a busy wire do."""

    def __init__(self, sink: FrameSink) -> None:
        self._sink = sink

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sink, name)

    async def send(self, header: bytes, payload: Room | Sequence[memoryview] | bytes) -> None:
        if parse_header(header, int.from_bytes(header[36:40], "little")).kind is not FrameKind.BEAT:
            await asyncio.sleep(0.1)
        await self._sink.send(header, payload)


async def test_exposed_time_counts_what_a_trailer_spent_on_its_way() -> None:
    async with prefill_side() as prefill, decode_side() as decode:
        prefill.service._wrap_sink = HeldBack
        ticket = prefill.open(NUM_TOKENS, computed=1)
        pulling = asyncio.create_task(pull(decode, ticket))
        await decode.memory.wrote(1)
        prefill.exports.finish(ticket.id, FIRST_TOKEN, time.monotonic())
        sampled_s = time.monotonic()
        result = await pulling
        real_ms = (time.monotonic() - sampled_s) * 1e3
        assert real_ms > 200.0
        assert real_ms - 20.0 < result.exposed_ms <= real_ms + 1.0
