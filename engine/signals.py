"""When an instance tells its controllers what it does: at once on a new link, then once a second while anything happens.

An idle instance says one last time that it is idle, and nothing more until that changes.
"""

import asyncio
from collections.abc import Callable

from biphase.engine.link import Link
from biphase.protos.values import WorkerSignals

EVERY_S = 1.0


class SignalReporter:
    """Owns the timer. ``signals``: what to tell; ``is_idle``: whether there is nothing that could change it."""

    def __init__(self, signals: Callable[[], WorkerSignals], is_idle: Callable[[], bool]) -> None:
        self._signals = signals
        self._is_idle = is_idle
        self._links: list[Link] = []
        self._timer: asyncio.TimerHandle | None = None

    def link_opened(self, link: Link) -> None:
        if link.peer_kind == "controller":
            self._links.append(link)
            link.signals(self._signals())
            self.something_happened()

    def link_closed(self, link: Link) -> None:
        if link in self._links:
            self._links.remove(link)
        if not self._links:
            self.stop()

    def something_happened(self) -> None:
        """Tell it within EVERY_S."""
        if self._links and self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(EVERY_S, self._tell)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _tell(self) -> None:
        self._timer = None
        signals = self._signals()
        for link in self._links:
            link.signals(signals)
        if not self._is_idle():
            self.something_happened()
