"""Faults on the way of a pull's frames, on purpose: for tests, and for drills with ``biphase serve --inject-faults``.

A FaultPlan says how likely each kind is per piece or trailer, a FaultInjector wraps the sinks of the serving end and counts
what it did. Beats pass: one that is lost, late or there twice harms nobody. At most one fault strikes a frame:

    drop        it never leaves
    delay       it leaves later (20 ms unless told)
    corrupt     one bit of it is flipped, of header or payload
    duplicate   it comes twice
    truncate    its payload ends early
    reorder     it comes after the next one; one that is held back when the pull ends is lost
    stall       nothing leaves for long (5 s unless told, twice what a reader takes for a silent source)
    disconnect  the wire breaks, in mid-frame mostly, and the reader is told nothing

Which frames are struck follows from the seed, the rank, the number of the pull and the frames it sends, not from time.
"""

import asyncio
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from biphase.kvtransfer.frames import FrameKind
from biphase.kvtransfer.wire import FrameSink, Room
from biphase.protos.errors import SetupError

KINDS = ("drop", "delay", "corrupt", "duplicate", "truncate", "reorder", "stall", "disconnect")

_KIND_AT = 4  # of a frame's header
_UNITS_S = {"ms": 1e-3, "s": 1.0}
_LASTS = ("delay", "stall")
_LONGEST_S = 600.0
_HEADER_SHARE = 0.25  # of corrupted frames, those whose header is
_MID_FRAME_SHARE = 0.8  # of disconnects, those in mid-frame


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultPlan:
    """Chance of each kind per piece or trailer. ``spec`` and ``parse`` are each other's inverse."""

    rates: dict[str, float] = field(default_factory=dict)
    delay_s: float = 0.02
    stall_s: float = 5.0
    seed: int = 0

    @staticmethod
    def parse(spec: str) -> "FaultPlan":
        """Read ``drop=0.01,delay=0.02:50ms,stall=0.001:3s,seed=7``; ``all=0.01`` is every kind that has no rate of its
        own. Raises SetupError, one line."""
        rates: dict[str, float] = {}
        lasting = {"delay": 0.02, "stall": 5.0}
        seed, everything = 0, 0.0
        said: set[str] = set()
        for part in filter(None, (part.strip() for part in spec.split(","))):
            name, equals, value = part.partition("=")
            if name not in (*KINDS, "all", "seed"):
                raise SetupError(f"fault {part!r} is none of {', '.join(KINDS)}, all and seed")
            if not equals:
                raise SetupError(f"fault {name!r} has no value: {name}=7" if name == "seed" else _chance_missing(name))
            if name in said:
                raise SetupError(f"fault {name} is given twice in {spec!r}")
            said.add(name)
            if name == "seed":
                seed = _whole(value)
                continue
            rate, colon, time = value.partition(":")
            if colon:
                if name not in _LASTS:
                    raise SetupError(f"fault {part!r} has a time, only {' and '.join(_LASTS)} take one")
                lasting[name] = _seconds(time, part)
            if name == "all":
                everything = _rate(rate, part)
            else:
                rates[name] = _rate(rate, part)
        if everything:
            rates = {kind: rates.get(kind, everything) for kind in KINDS}
        total = sum(rates.values())
        if total > 1.0:
            raise SetupError(f"the faults' chances sum to {total:g}, at most one strikes a frame: no more than 1")
        ordered = {kind: rates[kind] for kind in KINDS if rates.get(kind)}
        return FaultPlan(rates=ordered, delay_s=lasting["delay"], stall_s=lasting["stall"], seed=seed)

    @property
    def ends(self) -> list[tuple[str, float]]:
        """Where each kind's part of [0, 1) ends."""
        return list(zip(self.rates, accumulate(self.rates.values()), strict=True))

    @property
    def spec(self) -> str:
        times = {"delay": f":{self.delay_s * 1e3:g}ms", "stall": f":{self.stall_s * 1e3:g}ms"}
        parts = [f"{kind}={rate:g}{times.get(kind, '')}" for kind, rate in self.rates.items()]
        return ",".join([*parts, f"seed={self.seed}"])


class FaultInjector:
    """Wraps the sinks of one serving process, of ``rank``: ranks of one plan are not struck in step.

    ``counts``: frames struck, by kind; ``by_frame``: the same for pieces and for trailers; ``num_frames``: all of those that
    came by.
    """

    def __init__(self, plan: FaultPlan, rank: int = 0) -> None:
        self.plan = plan
        self.rank = rank
        self.counts: Counter[str] = Counter(dict.fromkeys(KINDS, 0))
        self.by_frame = {kind: Counter(dict.fromkeys(KINDS, 0)) for kind in (FrameKind.PIECE, FrameKind.TRAILER)}
        self.num_pulls = 0
        self.num_frames = 0

    def wrap(self, sink: FrameSink) -> "FaultySink":
        self.num_pulls += 1
        return FaultySink(sink, self.plan, injector=self, number=self.num_pulls)

    def counters(self) -> dict[str, int]:
        """For an instance's counters."""
        return {f"faults_{kind}": count for kind, count in self.counts.items()}


class FaultySink:
    """The frames of one pull on their way through faults. Payloads lie in host memory.

    Rooms are memory of our own, and ``send`` asks the sink beneath for one only for what leaves: so a frame can be
    dropped or held back without holding a slot.
    """

    def __init__(
        self, sink: FrameSink, plan: FaultPlan, *, injector: FaultInjector | None = None, number: int = 1
    ) -> None:
        self._sink = sink
        self._plan = plan
        self._tally = injector or FaultInjector(plan)
        self._random = random.Random(f"{plan.seed}/{self._tally.rank}/{number}")
        self._held: tuple[bytes, bytes] | None = None
        self._disconnected = False

    @property
    def counts(self) -> Counter[str]:
        """Frames struck, by kind; of all sinks that share the injector."""
        return self._tally.counts

    @property
    def gathers(self) -> bool:
        return self._sink.gathers

    def piece_bytes(self, message_bytes: int) -> int:
        return self._sink.piece_bytes(message_bytes)

    async def room(self, num_bytes: int) -> Room:
        self._check()
        return _Scratch(memoryview(bytearray(num_bytes)))

    async def send(self, header: bytes, payload: Room | Sequence[memoryview] | bytes) -> None:
        self._check()
        if header[_KIND_AT] == FrameKind.BEAT:
            await self._sink.send(header, payload)
            return
        self._tally.num_frames += 1
        kind = self._draw(header, payload)
        if kind is not None:
            self._tally.counts[kind] += 1
            self._tally.by_frame[FrameKind(header[_KIND_AT])][kind] += 1
        held, self._held = self._held, None
        match kind:
            case "drop":
                pass
            case "reorder":
                self._held = header, _copy(payload)
            case "disconnect":
                await self._disconnect(header, _copy(payload))
            case "corrupt":
                await self._pass_on(*self._corrupted(header, _copy(payload)))
            case "truncate":
                data = _copy(payload)
                await self._pass_on(header, data[: self._random.randrange(len(data))])
            case "duplicate":
                data = _copy(payload)
                await self._pass_on(header, data)
                await self._pass_on(header, data)
            case "delay" | "stall":
                await asyncio.sleep(self._plan.delay_s if kind == "delay" else self._plan.stall_s)
                await self._pass_on(header, payload)
            case _:
                await self._pass_on(header, payload)
        if held is not None:
            await self._pass_on(*held)

    async def abort(self, header: bytes, payload: Room | Sequence[memoryview] | bytes, share: float) -> None:
        self._disconnected = True
        await self._sink.abort(header, await self._as_it_travels(header, payload) if share else b"", share)
        self._check()

    def close(self) -> None:
        self._held = None
        self._sink.close()

    def _check(self) -> None:
        if self._disconnected:
            raise ConnectionError("disconnected on purpose")

    def _draw(self, header: bytes, payload: Room | Sequence[memoryview] | bytes) -> str | None:
        """The kind that strikes this frame. What is empty cannot be cut short, and nothing comes after the trailer."""
        at = self._random.random()
        kind = next((kind for kind, end in self._plan.ends if at < end), None)
        if kind == "truncate" and _num_bytes(payload) == 0:
            return None
        if kind == "reorder" and (self._held is not None or header[_KIND_AT] == FrameKind.TRAILER):
            return None
        return kind

    def _corrupted(self, header: bytes, payload: bytes) -> tuple[bytes, bytes]:
        if not payload or self._random.random() < _HEADER_SHARE:
            return self._flipped(header), payload
        return header, self._flipped(payload)

    def _flipped(self, data: bytes) -> bytes:
        changed = bytearray(data)
        changed[self._random.randrange(len(changed))] ^= 1 << self._random.randrange(8)
        return bytes(changed)

    async def _disconnect(self, header: bytes, payload: bytes) -> None:
        share = self._random.random()
        await self.abort(header, payload, share if self._random.random() < _MID_FRAME_SHARE else 0.0)

    async def _pass_on(self, header: bytes, payload: Room | Sequence[memoryview] | bytes) -> None:
        await self._sink.send(header, await self._as_it_travels(header, payload))

    async def _as_it_travels(
        self, header: bytes, payload: Room | Sequence[memoryview] | bytes
    ) -> Room | Sequence[memoryview] | bytes:
        """As pieces travel on this wire, not in its way for short messages: in a room, or in parts."""
        if isinstance(payload, _Scratch):
            payload = _copy(payload)
        if not isinstance(payload, bytes) or not payload or header[_KIND_AT] == FrameKind.TRAILER:
            return payload
        room = await self._sink.room(len(payload))
        room.payload[:] = payload
        return room


@dataclass(slots=True)
class _Scratch:
    payload: Any


def _parts(payload: Room | Sequence[memoryview] | bytes) -> Sequence[memoryview]:
    if isinstance(payload, bytes):
        return [memoryview(payload)]
    if isinstance(payload, _Scratch):
        return [payload.payload]
    assert isinstance(payload, list | tuple)
    return payload


def _copy(payload: Room | Sequence[memoryview] | bytes) -> bytes:
    return b"".join(_parts(payload))


def _num_bytes(payload: Room | Sequence[memoryview] | bytes) -> int:
    return sum(part.nbytes for part in _parts(payload))


def _chance_missing(name: str) -> str:
    return f"fault {name!r} has no chance: {name}=0.01 strikes one frame in a hundred"


def _rate(text: str, part: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = -1.0
    if not 0.0 <= rate <= 1.0:
        raise SetupError(f"fault {part!r} has chance {text!r}, it must be from 0 to 1")
    return rate


def _seconds(text: str, part: str) -> float:
    unit = "ms" if text.endswith("ms") else "s"
    try:
        seconds = float(text.removesuffix(unit)) * _UNITS_S[unit] if text.endswith(unit) else -1.0
    except ValueError:
        seconds = -1.0
    if not 0.0 < seconds <= _LONGEST_S:
        raise SetupError(f"fault {part!r} has time {text!r}, it must be like 50ms or 3s, at most {_LONGEST_S:g}s")
    return seconds


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise SetupError(f"the faults' seed is {text!r}, it must be a whole number") from None
