"""What a pull's frames tell about time: their source's clock on ours. Pure: times come in as
seconds of a clock that only goes forward.

A frame says when it was sealed, on its source's clock. The frame that came the fastest gives the distance of both clocks,
too large by its own travel: what is told by the source's clock seems later here than it was by that, some 0.1 ms, and by
as long as our loop was held up where that was so for every frame.
"""

import math

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
