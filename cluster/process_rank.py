"""One process of this host, as the process backend sees it: spawned or found again, followed by a pidfd.

A pidfd tells the end of adopted processes (those of a controller that died) as well as of children, and a signal sent
through it never reaches a process that was given the same pid later.
"""

import asyncio
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from biphase.cluster.backend import ProcessSpec
from biphase.cluster.run_dir import started_ticks
from biphase.protos.errors import SetupError
from biphase.protos.process import Announcement


class ProcessRank:
    """Knows its end as soon as the kernel does."""

    def __init__(self, *, pid: int, announce_file: Path) -> None:
        self.pid, self.announce_file = pid, announce_file
        self.end: str | None = None
        self._child: subprocess.Popen[bytes] | None = None
        self._gone = asyncio.Event()
        self._pidfd = -1
        self._word: Announcement | None = None
        self._word_stat: tuple[int, int] | None = None

    @staticmethod
    def spawn(spec: ProcessSpec, spec_file: Path, announce_file: Path) -> "ProcessRank":
        """A new process in a session of its own, its stdout and stderr (a crash of native code) in its log file."""
        try:
            with open(spec.log_file, "ab") as log:
                child = subprocess.Popen(
                    [sys.executable, "-m", "biphase.cluster.process_main", str(spec_file), str(announce_file)],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    env={**os.environ, **dict(spec.env)},
                )
        except OSError as error:
            raise SetupError(f"cannot start {spec.name}: {error.strerror}") from error
        rank = ProcessRank(pid=child.pid, announce_file=announce_file)
        rank._child = child
        rank._watch()
        return rank

    @staticmethod
    def adopt(record: dict[str, Any], announce_file: Path) -> "ProcessRank":
        """The process of a record, which may have ended since."""
        rank = ProcessRank(pid=record["pid"], announce_file=announce_file)
        if record["started_ticks"] is not None and started_ticks(rank.pid) == record["started_ticks"]:
            rank._watch()
        else:
            rank._set_end("ended")
        return rank

    def word(self) -> Announcement | None:
        with suppress(OSError, ValueError, TypeError):
            status = self.announce_file.stat()
            if (status.st_ino, status.st_mtime_ns) != self._word_stat:
                self._word = Announcement.from_json(self.announce_file.read_text())
                self._word_stat = status.st_ino, status.st_mtime_ns
        return self._word

    async def ended(self) -> str:
        await self._gone.wait()
        assert self.end is not None
        return self.end

    async def ask_to_stop(self) -> None:
        self._send(signal.SIGTERM)

    async def kill(self) -> None:
        self._send(signal.SIGKILL)

    def release(self) -> None:
        if self._pidfd >= 0:
            asyncio.get_running_loop().remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1

    def _send(self, number: signal.Signals) -> None:
        if self._pidfd >= 0:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)

    def _watch(self) -> None:
        try:
            self._pidfd = os.pidfd_open(self.pid)
        except ProcessLookupError:
            self._set_end("ended")
        else:
            asyncio.get_running_loop().add_reader(self._pidfd, self._on_end)

    def _on_end(self) -> None:
        self.release()
        code = self._child.wait() if self._child is not None else None
        if code is None:
            self._set_end("ended")
        elif code < 0:
            self._set_end(f"killed by {signal.Signals(-code).name}")
        else:
            self._set_end(f"ended with exit code {code}")

    def _set_end(self, reason: str) -> None:
        self.end = reason
        self._gone.set()

    def __repr__(self) -> str:
        return f"<ProcessRank pid {self.pid} {self.end or 'runs'}>"
