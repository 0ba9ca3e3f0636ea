"""When a pull gives up and when it rests: silence of its source, and the loop's time beside a decode."""

import asyncio
import time
from collections.abc import Callable

SILENCE_S = 2.5
"""A source not heard for so long is gone. Five beats."""

_TICK_S = 0.25
_REST_OF_WORK = 4.0
"""Seconds of rest per second of the loop's CPU time, for a pull beside a decode. The decode takes the GIL some hundred
times in a step and waits each time for whatever copy holds it, so the loop may hold it only a fifth of the time."""

_SHORTEST_REST_S = 0.002


class Pace:
    """Rests in proportion to the loop's CPU time while a decode runs: what a wire does for us there counts too. The
    streams of one pull share it."""

    def __init__(self, decoding: Callable[[], bool]) -> None:
        self._decoding = decoding
        self._worked_s = time.thread_time()
        self._owed_s = 0.0

    async def rest(self) -> None:
        worked_s = time.thread_time()
        self._owed_s += (worked_s - self._worked_s) * _REST_OF_WORK
        self._worked_s = worked_s
        if not self._decoding():
            self._owed_s = 0.0
        elif self._owed_s >= _SHORTEST_REST_S:
            owed_s, self._owed_s = self._owed_s, 0.0
            began_s = time.monotonic()
            await asyncio.sleep(owed_s)
            self._owed_s += max(0.0, owed_s - (time.monotonic() - began_s))


class Watch:
    """Breaks a stream off when its source falls silent or gets nowhere; ``fired`` says that it has, and why.

    Counts ticks, not seconds: while our own loop is held up no tick passes, so frames that wait to be read are never
    taken for silence.
    """

    def __init__(self, timeout_s: float, break_off: Callable[[str], None]) -> None:
        self.fired = ""
        self._loop = asyncio.get_running_loop()
        self._timeout_s = timeout_s
        self._break_off = break_off
        self._silent_ticks = 0
        self._idle_ticks = 0
        self._timer = self._loop.call_later(_TICK_S, self._tick)

    def heard(self) -> None:
        self._silent_ticks = 0

    def progressed(self) -> None:
        self._idle_ticks = 0

    def end(self) -> None:
        self._timer.cancel()

    def _tick(self) -> None:
        self._silent_ticks += 1
        self._idle_ticks += 1
        if self._silent_ticks * _TICK_S >= SILENCE_S:
            self._fire(f"nothing heard for {SILENCE_S} s")
        elif self._idle_ticks * _TICK_S >= self._timeout_s:
            self._fire(f"no progress for {self._timeout_s} s")
        else:
            self._timer = self._loop.call_later(_TICK_S, self._tick)

    def _fire(self, reason: str) -> None:
        self.fired = reason
        self._break_off(reason)
