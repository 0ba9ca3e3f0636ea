"""The cache of converted weights: one file per model, dtype and format version, written once per host.

A file appears whole (temporary name, fsync, rename) and only under its lock. A process that finds the lock taken
waits and then maps what the other wrote. Temporaries of dead writers go when the next writer has the lock.
"""

import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from biphase.protos.errors import SetupError

_POLL_S = 0.1
_SLACK_BYTES = 16 << 20
"""Free space asked for beyond the file's own size."""

Progress = Callable[[str, float], None]


def default_directory() -> Path:
    """``BIPHASE_WEIGHTS_CACHE``, else ``~/.cache/biphase/weights`` (``XDG_CACHE_HOME`` respected)."""
    if named := os.environ.get("BIPHASE_WEIGHTS_CACHE"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "biphase" / "weights"


class CachedFile:
    """One file of the cache, by its final path; other processes may be writing it."""

    def __init__(self, directory: Path, stem: str) -> None:
        """Creates the directory. Raises SetupError when it cannot be made."""
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SetupError(f"{directory}: cannot be made for the weights cache ({error.strerror})") from error
        self.path = directory / f"{stem}.safetensors"
        self._lock = directory / f"{stem}.lock"
        self._temporaries = f"{stem}.*.tmp"

    @contextmanager
    def locked(self, num_bytes: int, progress: Progress) -> Iterator[None]:
        """Hold the lock; while another process holds it, report how far that one's temporary has grown."""
        try:
            lock = self._lock.open("ab")
        except OSError as error:
            raise SetupError(f"{self._lock}: cannot be opened ({error.strerror})") from error
        with lock:
            while not self._try(lock):
                progress("waiting for another process that converts the weights", self._grown(num_bytes))
                time.sleep(_POLL_S)
            yield

    def _try(self, lock: IO[bytes]) -> bool:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            raise SetupError(f"{self._lock}: cannot be locked ({error.strerror})") from error
        return True

    @contextmanager
    def replacing(self, num_bytes: int) -> Iterator[IO[bytes]]:
        """Under the lock: a file to write ``num_bytes`` to; it takes its name when the body ends without an error."""
        self._clean()
        free = shutil.disk_usage(self.path.parent).free
        if free < num_bytes + _SLACK_BYTES:
            raise SetupError(
                f"{self.path.parent}: {num_bytes + _SLACK_BYTES} bytes needed for converted weights, {free} free"
            )
        temporary = self.path.with_suffix(f".{os.getpid()}.tmp")
        try:
            with temporary.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self.path)
            folder = os.open(self.path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        except OSError as error:
            raise SetupError(f"{self.path}: cannot be written ({error.strerror})") from error
        finally:
            temporary.unlink(missing_ok=True)

    def _clean(self) -> None:
        """Remove what dead writers left; who holds the lock is the only living one."""
        for temporary in self.path.parent.glob(self._temporaries):
            temporary.unlink(missing_ok=True)

    def _grown(self, num_bytes: int) -> float:
        sizes = []
        for temporary in self.path.parent.glob(self._temporaries):
            try:
                sizes.append(temporary.stat().st_size)
            except FileNotFoundError:
                pass
        return min(1.0, max(sizes, default=0) / num_bytes)
