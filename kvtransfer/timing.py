"""What a pull's frames tell about time: their source's clock on ours, and how fast its wire is. Pure: times come in as
seconds of a clock that only goes forward.

A frame says when it was sealed, on its source's clock. The frame that came the fastest gives the distance of both clocks,
too large by its own travel: what is told by the source's clock seems later here than it was by that, some 0.1 ms, and by
as long as our loop was held up where that was so for every frame.
"""

import math
from collections.abc import Hashable, Iterable
from dataclasses import dataclass

_UNITS_PER_S = 100_000
_SPAN = 1 << 32
"""Times of 12 hours apart look the same: a pull of 6 hours is the longest whose frames have an order."""


def stamp(now_s: float) -> int:
    """When a frame was sealed, as its header says it (u32); 0 is kept for sources that say nothing."""
    return int(now_s * _UNITS_PER_S) % _SPAN or 1


class SourceClock:
    """The clock of one rank of a source, as its frames show it here."""

    def __init__(self) -> None:
        self._first = 0
        self._first_s = math.inf

    def saw(self, sent: int, came_s: float) -> None:
        """A frame of that stamp came then."""
        if not sent:
            return
        self._first = self._first or sent
        self._first_s = min(self._first_s, came_s - self._since_first_s(sent))

    def here_s(self, sent: int) -> float:
        """A stamp on our clock; infinite where nothing is known."""
        return self._first_s + self._since_first_s(sent) if sent else math.inf

    def _since_first_s(self, sent: int) -> float:
        return ((sent - self._first + _SPAN // 2) % _SPAN - _SPAN // 2) / _UNITS_PER_S


@dataclass(frozen=True, slots=True, kw_only=True)
class TailSeen:
    """What was left to come when all was computed, and how long it took."""

    raw_bytes: int = 0
    wire_bytes: int = 0
    seconds: float = 0.0


class Tail:
    """The part of a rank's pull that waits for wires alone: from when the last of its streams knows everything computed.

    Rests are taken out: what buffers hold meanwhile makes a fast wire look faster, never a slow one.
    """

    def __init__(self, streams: Iterable[Hashable]) -> None:
        self.seen = TailSeen()
        self._computing = set(streams)
        self._began_s = -math.inf
        self._rested_until_s = -math.inf
        self._rested_s = 0.0

    def computed(self, stream: Hashable, *, sent_s: float, before_s: float, came_s: float) -> None:
        """A frame says so. It was on its way since it was sent, but not before the frame ahead of it had come."""
        if stream in self._computing:
            self._computing.discard(stream)
            self._began_s = max(self._began_s, min(came_s, max(sent_s, before_s)))

    def piece(self, raw_bytes: int, wire_bytes: int, now_s: float) -> None:
        if not self._computing:
            self.seen = TailSeen(
                raw_bytes=self.seen.raw_bytes + raw_bytes,
                wire_bytes=self.seen.wire_bytes + wire_bytes,
                seconds=now_s - self._began_s - self._rested_s,
            )

    def rested(self, began_s: float, ended_s: float) -> None:
        """One of the streams, beside the others."""
        if not self._computing:
            self._rested_s += max(0.0, ended_s - max(began_s, self._rested_until_s, self._began_s))
            self._rested_until_s = max(self._rested_until_s, ended_s)

    def broken(self) -> None:
        """A wire has failed, or something is asked for again: what comes now shows no wire's speed."""
        self.seen = TailSeen()
        self._computing = {None}
