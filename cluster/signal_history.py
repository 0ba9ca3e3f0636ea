"""The history of signals that `biphase autoscale replay` reads: a file of bounded size, beside the newest one the one before.

Owned by whoever decides; a disk that is full costs the history, never the decision.
"""

import json
import logging
import math
import os
from collections.abc import Callable
from pathlib import Path

from biphase.planner.capacity import Setup
from biphase.planner.history import Moment, moment_line, setup_line
from biphase.protos.errors import one_line

_log = logging.getLogger(__name__)

MAX_BYTES = 32 * 2**20
TAIL_BYTES = 2**20
"""A line is shorter: so much of a former life's file is looked at."""


class SignalHistory:
    """Appends moments to ``path``; beyond ``max_bytes`` that becomes ``path``.1 and a new file begins, with the setup.

    A next life of the controller goes on with the file; ``anew``: the deployment itself has begun, and so does a new file.
    """

    def __init__(self, path: Path, *, anew: bool = False, max_bytes: int = MAX_BYTES) -> None:
        self.path, self.max_bytes = path, max_bytes
        self._setup: Setup | None = None
        """That of the file's last line of such; None: this life has written none."""
        self._failed = False
        if anew and path.exists():
            self._attempt(self._turn)

    @property
    def former(self) -> Path:
        return self.path.with_name(self.path.name + ".1")

    def add(self, moment: Moment, setup: Setup) -> None:
        self._attempt(lambda: self._append(moment, setup))

    def _append(self, moment: Moment, setup: Setup) -> None:
        taken_over = self._setup is None and self.path.exists()
        if taken_over and _last_moment_s(self.path) >= moment.unix_s:  # moments are in order of their times
            self._turn()
        line, head = moment_line(moment) + "\n", setup_line(setup) + "\n"
        if self.path.exists() and self.path.stat().st_size + len(head) + len(line) > self.max_bytes:
            self._turn()
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line if file.tell() and setup == self._setup else head + line)
        self._setup = setup

    def _turn(self) -> None:
        self.path.replace(self.former)

    def _attempt(self, what: Callable[[], None]) -> None:
        try:
            what()
        except OSError as error:
            if not self._failed:
                _log.warning("the history of signals %s cannot be written: %s", self.path, one_line(error))
            self._failed = True


def _last_moment_s(path: Path) -> float:
    """The time of a file's last moment, inf where it cannot be read. A line that a former life has not ended is cut off."""
    with path.open("r+b") as file:
        begin = max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES)
        file.seek(begin)
        tail = file.read()
        whole = tail[: tail.rfind(b"\n") + 1]
        if len(whole) < len(tail):
            file.truncate(begin + len(whole))
    for line in reversed(whole.splitlines()):
        try:
            values = json.loads(line)
            if "unix_s" in values:
                return float(values["unix_s"])
        except (ValueError, TypeError):
            return math.inf
    return math.inf if begin else -math.inf
