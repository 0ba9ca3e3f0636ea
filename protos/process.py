"""What every process of biphase does the same way: announce its state, and keep one log file.

Under the process backend an announcement is a small JSON file, replaced whole at each change; under Ray the actor
hands out the same value. The controller reads either.
"""

import json
import logging
import os
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, NoReturn

ProcessState = Literal["starting", "loading", "ready", "draining", "stopped", "failed", "lost"]
"""``failed``: a set-up that cannot work, the same again would fail the same. ``lost``: another rank of its instance is gone,
so it ends."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Announcement:
    """A process's word on itself. ``progress`` is 0..1 within ``detail`` while loading."""

    name: str
    kind: str
    incarnation: int
    pid: int
    state: ProcessState = "starting"
    detail: str = ""
    progress: float = 0.0
    address: str = ""
    threads: int = 0
    kv_bytes: int = 0
    device: str = ""
    """Of an instance, with its dtypes."""
    log_file: str = ""
    rank: int = 0
    """Of an instance of several: each rank announces itself; the instance is what its rank 0 says."""
    rank_address: str = ""
    """Of rank 0 of several: where the other ranks join it."""
    node: str = ""
    """The host it runs on, as people name it: its address in the cluster, its host name where it is on loopback."""

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> "Announcement":
        """Raises ValueError or TypeError when the text is no announcement."""
        return Announcement(**json.loads(text))


Announce = Callable[[Announcement], None]


class Announcer:
    """Holds the newest announcement of this process and passes each change on."""

    def __init__(self, first: Announcement, publish: Announce) -> None:
        self.current = first
        self._publish = publish
        publish(first)

    def update(self, **changes: object) -> None:
        self.current = replace(self.current, **changes)  # type: ignore[arg-type]
        self._publish(self.current)


def announce_to_file(path: Path) -> Announce:
    """Publish by replacing ``path`` whole, so that a reader never sees half of one."""

    def publish(announcement: Announcement) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
        with os.fdopen(handle, "w") as file:
            file.write(announcement.to_json())
        os.replace(temporary, path)

    return publish


def leave(code: int) -> NoReturn:
    """End this process, in which everything has been closed: what was logged and printed is written, then it is gone.

    The interpreter's own way out takes torch and its libraries apart first, for half a second to three on a busy machine,
    which all ranks of an instance wait for. Nothing that was registered with atexit runs: own nothing by it.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):  # closed, or its reader is gone
            stream.flush()
    with suppress(Exception):
        logging.shutdown()
    os._exit(code)


def set_up_logging(log_file: Path | None, level: str = "INFO") -> None:
    """Log to ``log_file`` (one per process), or to stderr without one. Call once, at the start of a process."""
    handler: logging.Handler
    if log_file is None:
        handler = logging.StreamHandler()
    else:
        log_file.parent.mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(log_file)
    handler.setFormatter(
        logging.Formatter("%(asctime)s.%(msecs)03d %(levelname)s %(name)s %(message)s", "%Y-%m-%dT%H:%M:%S")
    )
    root = logging.getLogger("biphase")
    for former in root.handlers:
        former.close()
    root.handlers[:] = [handler]
    root.setLevel(level)
    root.propagate = False
