"""When a pull gives up and when it rests: silence of its source, and the loop's time beside a decode."""

import asyncio
import time
from collections.abc import Callable, Coroutine, Generator, Iterator
from contextlib import contextmanager
from types import coroutine
from typing import Any

SILENCE_S = 2.5
"""A source not heard for so long is gone. Five beats."""

_TICK_S = 0.25
_REST_OF_WORK = 4.0
"""Seconds of rest per second of CPU time in the loop, for pulls beside a decode. The decode takes the GIL some hundred
times in a step and waits each time for whatever copy holds it, so pulls may hold it only a fifth of the time."""

_SHORTEST_REST_S = 0.002
_LONGEST_REST_S = 0.2
"""Whatever the work was: a source must not be kept waiting until one of the two takes the other for dead."""

_OF_WIRE = 2.0
"""A wire may do as much again for us in callbacks of the loop, as gRPC does, which cannot be told from what others do."""


class Pace:
    """Rests of one rank's pulls, all together, in proportion to the CPU time that they take of the loop while a decode
    runs. What others do in the loop is none of it, but for the wires' part."""

    def __init__(self) -> None:
        self._own_s = 0.0
        self._began_s = self._rested_s = time.thread_time()
        self._owed_s = 0.0
        self._until_s = 0.0

    @coroutine
    def counting(self, work: Coroutine[Any, Any, None]) -> Generator[Any, Any, None]:
        """Run ``work``, counting the time of its steps, not of what the loop does between them."""
        step: Callable[[Any], Any] = work.send
        value: Any = None
        while True:
            self._began_s = time.thread_time()
            try:
                waits_for = step(value)
            except StopIteration:
                return
            finally:
                self._count()
            try:
                value = yield waits_for
                step = work.send
            except BaseException as error:  # noqa: BLE001 -- cancelled, or closed: the work's to handle
                step, value = work.throw, error

    async def rest(self, decoding: bool) -> None:
        """Of work that is counted."""
        self._count()
        worked_s = max(self._own_s, min(self._began_s - self._rested_s, self._own_s * _OF_WIRE))
        self._own_s, self._rested_s = 0.0, self._began_s
        if not decoding:
            self._owed_s = self._until_s = 0.0
            return
        now_s = time.monotonic()
        self._owed_s += worked_s * _REST_OF_WORK
        if self._owed_s >= _SHORTEST_REST_S:
            self._until_s = min(max(self._until_s, now_s) + self._owed_s, now_s + _LONGEST_REST_S)
            self._owed_s = 0.0
        if self._until_s > now_s:
            await asyncio.sleep(self._until_s - now_s)

    def _count(self) -> None:
        """The step that runs, so far."""
        now_s = time.thread_time()
        self._own_s += now_s - self._began_s
        self._began_s = now_s


class Watch:
    """Breaks a stream off when its source falls silent or gets nowhere; ``fired`` says that it has, and why.

    Counts ticks, not seconds: while our own loop is held up no tick passes, so frames that wait to be read are never
    taken for silence; nor while the stream rests.
    """

    def __init__(self, timeout_s: float, break_off: Callable[[str], None]) -> None:
        self.fired = ""
        self._loop = asyncio.get_running_loop()
        self._timeout_s = timeout_s
        self._break_off = break_off
        self._silent_ticks = 0
        self._idle_ticks = 0
        self._resting = False
        self._timer = self._loop.call_later(_TICK_S, self._tick)

    def heard(self) -> None:
        self._silent_ticks = 0

    def progressed(self) -> None:
        self._idle_ticks = 0

    @contextmanager
    def resting(self) -> Iterator[None]:
        """Nobody reads the stream meanwhile."""
        self._resting = True
        try:
            yield
        finally:
            self._resting = False

    def end(self) -> None:
        self._timer.cancel()

    def _tick(self) -> None:
        if not self._resting:
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
