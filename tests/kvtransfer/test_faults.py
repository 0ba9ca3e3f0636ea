"""Faults strike as their plan says, the same ones for the same seed, and never the pool's own memory."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from biphase.kvtransfer.faults import KINDS, FaultInjector, FaultPlan, FaultySink
from biphase.kvtransfer.frames import HEADER_BYTES, FrameKind
from biphase.kvtransfer.wire import Room
from biphase.protos.errors import SetupError


@dataclass
class ListRoom:
    payload: memoryview


class ListSink:
    """Keeps what comes, and how many of its rooms are out."""

    gathers = True

    def piece_bytes(self, message_bytes: int) -> int:
        return message_bytes

    def __init__(self) -> None:
        self.frames: list[tuple[bytes, bytes]] = []
        self.rooms_out = 0
        self.closed = False
        self.aborted: list[tuple[int, float]] = []

    async def room(self, num_bytes: int) -> ListRoom:
        self.rooms_out += 1
        return ListRoom(memoryview(bytearray(num_bytes)))

    async def send(self, header: bytes, payload: Room | Sequence[memoryview] | bytes) -> None:
        if isinstance(payload, ListRoom):
            self.rooms_out -= 1
            payload = bytes(payload.payload)
        self.frames.append((header, payload if isinstance(payload, bytes) else b"".join(payload)))

    async def abort(self, header: bytes, payload: Room | Sequence[memoryview] | bytes, share: float) -> None:
        """Notes how many bytes of payload there were, and where it was to break."""
        num_bytes = len(payload.payload) if isinstance(payload, ListRoom) else len(b"".join(_views(payload)))
        self.rooms_out -= isinstance(payload, ListRoom)
        self.aborted.append((num_bytes, share))

    def close(self) -> None:
        self.closed = True


def _views(payload: Any) -> Any:
    return [payload] if isinstance(payload, bytes) else payload


def piece(number: int, size: int = 100) -> tuple[bytes, bytes]:
    return header(FrameKind.PIECE, number), bytes([number]) * size


def header(kind: FrameKind, number: int = 0) -> bytes:
    """As far as faults look at one."""
    return b"BKV1" + bytes([kind, 0, 0, 0, number]).ljust(HEADER_BYTES - 4, b"\0")


TRAILER = header(FrameKind.TRAILER), bytes(20)


async def through(sink: FaultySink, frames: list[tuple[bytes, bytes]], way: str = "room") -> None:
    for head, payload in frames:
        given: Any = payload
        if way == "room":
            given = await sink.room(len(payload))
            given.payload[:] = payload
        elif way == "parts":
            given = [memoryview(payload)[:10], memoryview(payload)[10:]]
        await sink.send(head, given)


FRAMES = [piece(number) for number in range(6)]


@pytest.mark.parametrize("way", ["room", "parts", "bytes"])
async def test_without_faults_all_passes(way: str) -> None:
    inner = ListSink()
    await through(FaultySink(inner, FaultPlan.parse("")), FRAMES, way)
    assert inner.frames == FRAMES
    assert inner.rooms_out == 0


@pytest.mark.parametrize("way", ["room", "parts", "bytes"])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("delay", "stall", "disconnect")])
async def test_each_kind_does_what_it_says(kind: str, way: str) -> None:
    inner = ListSink()
    sink = FaultySink(inner, FaultPlan.parse(f"{kind}=1"))
    await through(sink, FRAMES, way)
    got = inner.frames
    match kind:
        case "drop":
            assert got == []
        case "corrupt":
            assert len(got) == 6
            for (ours, payload), (theirs, their_payload) in zip(FRAMES, got, strict=True):
                pairs = zip(ours + payload, theirs + their_payload, strict=True)
                assert sum((one ^ other).bit_count() for one, other in pairs) == 1
        case "duplicate":
            assert got == [frame for frame in FRAMES for _ in range(2)]
        case "truncate":
            assert [each for each, _ in got] == [each for each, _ in FRAMES]
            for (_, payload), (_, theirs) in zip(FRAMES, got, strict=True):
                assert len(theirs) < len(payload) and payload.startswith(theirs)
        case "reorder":
            assert got == [FRAMES[at] for at in (1, 0, 3, 2, 5, 4)]
    assert sink.counts[kind] == (3 if kind == "reorder" else 6)
    assert sum(sink.counts.values()) == sink.counts[kind]
    assert inner.rooms_out == 0


async def test_delays_and_stalls_last_as_long_as_told() -> None:
    for spec, least_s in (("delay=1:30ms", 0.03), ("stall=1:0.05s", 0.05)):
        inner = ListSink()
        began_s = time.monotonic()
        await through(FaultySink(inner, FaultPlan.parse(spec)), FRAMES[:1])
        assert time.monotonic() - began_s >= least_s
        assert inner.frames == FRAMES[:1]


async def test_a_stalled_send_can_be_cancelled() -> None:
    inner = ListSink()
    sink = FaultySink(inner, FaultPlan.parse("stall=1:60s"))
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.02):
            await through(sink, FRAMES)
    assert inner.frames == []


async def test_after_a_disconnect_nothing_leaves() -> None:
    inner = ListSink()
    sink = FaultySink(inner, FaultPlan.parse("disconnect=1"))
    for _ in range(2):
        with pytest.raises(ConnectionError):
            await through(sink, FRAMES, "bytes")
    with pytest.raises(ConnectionError):
        await sink.room(1)
    assert inner.frames == []
    assert sink.counts["disconnect"] == 1


@pytest.mark.parametrize("way", ["room", "parts", "bytes"])
async def test_a_disconnect_breaks_the_wire_beneath_mostly_in_mid_frame(way: str) -> None:
    injector, inner = FaultInjector(FaultPlan.parse("disconnect=1")), ListSink()
    for _ in range(50):
        with pytest.raises(ConnectionError, match="on purpose"):
            await through(injector.wrap(inner), FRAMES, way)
    assert len(inner.aborted) == 50 and inner.frames == [] and inner.rooms_out == 0
    between = [num_bytes for num_bytes, share in inner.aborted if share == 0.0]
    shares = [share for num_bytes, share in inner.aborted if num_bytes == 100]
    assert 2 <= len(between) <= 20 and not any(between)
    assert len(between) + len(shares) == 50 and min(shares) < 0.2 and max(shares) > 0.8


async def test_the_pools_own_memory_is_never_touched() -> None:
    """Parts of a pool are copied before they are corrupted."""
    pool = bytearray(range(100))
    sink = FaultySink(ListSink(), FaultPlan.parse("corrupt=0.5,duplicate=0.5"))
    for number in range(20):
        await sink.send(piece(number)[0], [memoryview(pool)])
    assert pool == bytearray(range(100))


async def test_trailers_and_beats_are_struck_where_that_means_something() -> None:
    inner = ListSink()
    await through(FaultySink(inner, FaultPlan.parse("reorder=1")), [TRAILER], "bytes")
    assert inner.frames == [TRAILER]
    inner = ListSink()
    beat = header(FrameKind.BEAT), b""
    sink = FaultySink(inner, FaultPlan.parse("truncate=1"))
    await through(sink, [beat], "bytes")
    assert inner.frames == [beat]
    assert sink.counts["truncate"] == 0


async def test_beats_pass_and_count_for_nothing() -> None:
    """They come as time goes by: they must not move what strikes the pieces between them either."""
    beat = header(FrameKind.BEAT), b""
    for kind in KINDS:
        inner = ListSink()
        injector = FaultInjector(FaultPlan.parse(f"{kind}=1"))
        await through(injector.wrap(inner), [beat] * 3, "bytes")
        assert inner.frames == [beat] * 3 and not inner.aborted
        assert injector.num_frames == 0 and not any(injector.counts.values())
    found = []
    for num_beats in (0, 3):
        inner = ListSink()
        sink = FaultySink(inner, FaultPlan.parse("drop=0.3,reorder=0.4,seed=3"))
        for number in range(50):
            await through(sink, [beat] * num_beats, "bytes")
            await through(sink, [piece(number)])
        found.append([frame for frame in inner.frames if frame != beat])
    assert found[0] == found[1] and 20 <= len(found[0]) < 50


async def test_strikes_are_counted_by_kind_of_frame() -> None:
    injector = FaultInjector(FaultPlan.parse("drop=0.5,seed=2"))
    await through(injector.wrap(ListSink()), [*FRAMES * 5, *[TRAILER] * 10])
    pieces, trailers = (injector.by_frame[kind]["drop"] for kind in (FrameKind.PIECE, FrameKind.TRAILER))
    assert 8 <= pieces <= 22 and 2 <= trailers <= 8
    assert injector.counts["drop"] == pieces + trailers and injector.num_frames == 40


async def test_ranks_of_one_plan_are_not_struck_in_step() -> None:
    struck = []
    for rank in (0, 1, 1):
        inner = ListSink()
        injector = FaultInjector(FaultPlan.parse("drop=0.5,seed=7"), rank)
        for _ in range(3):
            await through(injector.wrap(inner), FRAMES)
        struck.append(inner.frames)
    assert struck[0] != struck[1] == struck[2]


async def test_what_is_held_back_at_the_end_is_lost_and_the_sink_closed() -> None:
    inner = ListSink()
    sink = FaultySink(inner, FaultPlan.parse("reorder=1"))
    await through(sink, FRAMES[:1])
    sink.close()
    assert inner.closed and inner.frames == []


async def test_the_same_seed_strikes_the_same_frames() -> None:
    async def run(seed: int) -> list[list[tuple[bytes, bytes]]]:
        injector = FaultInjector(FaultPlan.parse(f"drop=0.2,corrupt=0.2,duplicate=0.2,seed={seed}"))
        sinks = [ListSink() for _ in range(3)]
        for inner in sinks:
            await through(injector.wrap(inner), [piece(number) for number in range(50)])
        assert injector.num_frames == 150 and injector.num_pulls == 3
        assert all(10 <= injector.counts[kind] <= 50 for kind in ("drop", "corrupt", "duplicate"))
        assert injector.counters()["faults_drop"] == injector.counts["drop"]
        return [inner.frames for inner in sinks]

    first = await run(7)
    assert first == await run(7)
    assert first != await run(8)
    assert first[0] != first[1]


def test_specs_are_read_and_written() -> None:
    plan = FaultPlan.parse("drop=0.01, delay=0.02:50ms,stall=0.005:1.5s,seed=7")
    assert plan.rates == {"drop": 0.01, "delay": 0.02, "stall": 0.005}
    assert (plan.delay_s, plan.stall_s, plan.seed) == (0.05, 1.5, 7)
    assert FaultPlan.parse(plan.spec) == plan
    everything = FaultPlan.parse("all=0.1,stall=0")
    assert everything.rates == {kind: 0.1 for kind in KINDS if kind != "stall"}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("flood=0.1", "fault 'flood=0.1' is none of drop, delay"),
        ("drop", "fault 'drop' has no chance: drop=0.01"),
        ("seed", "fault 'seed' has no value: seed=7"),
        ("drop=0.1,drop=0.2", "fault drop is given twice"),
        ("drop=2", "fault 'drop=2' has chance '2', it must be from 0 to 1"),
        ("drop=nan", "has chance 'nan'"),
        ("drop=", "has chance ''"),
        ("drop=0.1:5ms", "has a time, only delay and stall take one"),
        ("delay=0.1:5", "has time '5', it must be like 50ms or 3s"),
        ("delay=0.1:-5ms", "has time '-5ms'"),
        ("stall=0.1:700s", "at most 600s"),
        ("seed=x", "the faults' seed is 'x', it must be a whole number"),
        ("all=0.2", "the faults' chances sum to 1.6, .* no more than 1"),
    ],
)
def test_bad_specs_are_one_line(spec: str, message: str) -> None:
    with pytest.raises(SetupError, match=message) as caught:
        FaultPlan.parse(spec)
    assert "\n" not in str(caught.value)
