"""The history of signals that `biphase autoscale replay` reads: a file of bounded size, beside the newest one the one before.

Owned by whoever decides; a disk that is full costs the history, never the decision.
"""

import logging
from collections.abc import Callable
from pathlib import Path

from biphase.planner.capacity import Setup
from biphase.planner.history import Moment, moment_line, setup_line
from biphase.protos.errors import one_line

_log = logging.getLogger(__name__)

MAX_BYTES = 32 * 2**20


class SignalHistory:
    """Appends moments to ``path``; beyond ``max_bytes`` that becomes ``path``.1 and a new file begins, with the setup."""

    def __init__(self, path: Path, setup: Setup, *, max_bytes: int = MAX_BYTES) -> None:
        self.path, self.max_bytes = path, max_bytes
        self._head = setup_line(setup) + "\n"
        self._failed = False
        # another life's deployment may have been another
        if path.exists():
            self._attempt(self._turn)

    @property
    def former(self) -> Path:
        return self.path.with_name(self.path.name + ".1")

    def add(self, moment: Moment) -> None:
        self._attempt(lambda: self._append(moment_line(moment) + "\n"))

    def _append(self, line: str) -> None:
        if self.path.exists() and self.path.stat().st_size + len(line) > self.max_bytes:
            self._turn()
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line if file.tell() else self._head + line)

    def _turn(self) -> None:
        self.path.replace(self.former)

    def _attempt(self, what: Callable[[], None]) -> None:
        try:
            what()
        except OSError as error:
            if not self._failed:
                _log.warning("the history of signals %s cannot be written: %s", self.path, one_line(error))
            self._failed = True
