"""The process backend: plain processes on this host, spawned (never forked), each in a session of its own.

A process announces itself in a file of the run directory; its end is seen by a pidfd, which works for adopted
processes (those of a controller that died) as well as for children.
"""

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from biphase.cluster.backend import Handle, Kind, ProcessSpec
from biphase.cluster.gpus import divide, host_gpus
from biphase.cluster.run_dir import RunDir, replace_file, started_ticks
from biphase.protos.errors import SetupError
from biphase.protos.process import Announcement

LOADING_POLL_S = 0.05
READY_POLL_S = 0.5


class ProcessHandle:
    """One process of this host. Knows its end as soon as the kernel does."""

    def __init__(self, *, name: str, kind: Kind, incarnation: int, pid: int, announce_file: Path) -> None:
        self.name, self.kind, self.incarnation, self.pid = name, kind, incarnation, pid
        self.announce_file = announce_file
        self.end: str | None = None
        self.child: subprocess.Popen[bytes] | None = None
        self._gone = asyncio.Event()
        self._pidfd = -1

    def follow(self) -> None:
        """Start to watch the living process."""
        try:
            self._pidfd = os.pidfd_open(self.pid)
        except ProcessLookupError:
            self.set_end("ended")
        else:
            asyncio.get_running_loop().add_reader(self._pidfd, self._on_end)

    def set_end(self, reason: str) -> None:
        self.end = reason
        self._gone.set()

    def _on_end(self) -> None:
        asyncio.get_running_loop().remove_reader(self._pidfd)
        os.close(self._pidfd)
        self._pidfd = -1
        code = self.child.wait() if self.child is not None else None
        if code is None:
            self.set_end("ended")
        elif code < 0:
            self.set_end(f"killed by {signal.Signals(-code).name}")
        else:
            self.set_end(f"ended with exit code {code}")

    async def ended(self) -> str:
        await self._gone.wait()
        assert self.end is not None
        return self.end

    def send(self, number: signal.Signals) -> None:
        if self._pidfd >= 0:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)

    def release(self) -> None:
        """Stop watching; the process goes on."""
        if self._pidfd >= 0:
            asyncio.get_running_loop().remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1

    def __repr__(self) -> str:
        return f"<ProcessHandle {self.name}#{self.incarnation} pid {self.pid} {self.end or 'runs'}>"


def _handle_of(record: dict[str, Any], announce_file: Path) -> ProcessHandle:
    handle = ProcessHandle(
        name=record["name"],
        kind=record["kind"],
        incarnation=record["incarnation"],
        pid=record["pid"],
        announce_file=announce_file,
    )
    if record["started_ticks"] is not None and started_ticks(handle.pid) == record["started_ticks"]:
        handle.follow()
    else:
        handle.set_end("ended")
    return handle


def _spawn(spec: ProcessSpec, spec_file: Path, announce_file: Path) -> "subprocess.Popen[bytes]":
    """A new process in a session of its own, its stdout and stderr (a crash of native code) in its log file."""
    try:
        with open(spec.log_file, "ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "biphase.cluster.process_main", str(spec_file), str(announce_file)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, **dict(spec.env)},
            )
    except OSError as error:
        raise SetupError(f"cannot start {spec.name}: {error.strerror}") from error


class ProcessBackend:
    """Processes of one deployment on this host. ``owner`` ends what still runs when it closes (the supervisor does)."""

    def __init__(self, run_dir: RunDir, *, owner: bool = False) -> None:
        self._run_dir = run_dir
        self._owner = owner
        self._gpus = host_gpus()
        self._handles: dict[tuple[str, int], ProcessHandle] = {}

    async def open(self) -> None:
        self._run_dir.processes.mkdir(parents=True, exist_ok=True)

    async def check(self, specs: Sequence[ProcessSpec]) -> None:
        """One host takes what it is given (threads and memory are the instances' own defaults to bound), GPUs apart."""
        divide(specs[0].deployment, len(self._gpus))

    async def start(self, spec: ProcessSpec) -> ProcessHandle:
        spec = self._with_gpu(spec)
        stem = self._run_dir.processes / f"{spec.name}-{spec.incarnation}"
        spec_file, announce_file = (
            stem.with_name(f"{stem.name}.spec.json"),
            stem.with_name(f"{stem.name}.announce.json"),
        )
        replace_file(spec_file, spec.to_json())
        announce_file.unlink(missing_ok=True)
        spec.log_file.parent.mkdir(parents=True, exist_ok=True)
        child = _spawn(spec, spec_file, announce_file)
        record = {
            "name": spec.name,
            "kind": spec.kind,
            "incarnation": spec.incarnation,
            "pid": child.pid,
            "started_ticks": started_ticks(child.pid),
        }
        replace_file(stem.with_name(f"{stem.name}.json"), json.dumps(record))
        handle = ProcessHandle(
            name=spec.name, kind=spec.kind, incarnation=spec.incarnation, pid=child.pid, announce_file=announce_file
        )
        handle.child = child
        handle.follow()
        self._handles[spec.name, spec.incarnation] = handle
        return handle

    def _with_gpu(self, spec: ProcessSpec) -> ProcessSpec:
        """An instance, told its share of which GPU; the others need none."""
        if spec.kind != "prefill" and spec.kind != "decode":
            return spec
        part = divide(spec.deployment, len(self._gpus))[spec.name]
        if not part.gpus:
            return replace(spec, gpus=0.0)
        return replace(spec, gpus=part.share, env=(*spec.env, ("CUDA_VISIBLE_DEVICES", self._gpus[part.gpus[0]])))

    async def adopt(self) -> list[Handle]:
        """Every process with a record here. One that has ended already is there too, with its end and last word."""
        found: list[Handle] = []
        for path in sorted(self._run_dir.processes.glob("*.json")):
            if path.name.endswith((".spec.json", ".announce.json")):
                continue
            with suppress(OSError, ValueError, KeyError):
                record = json.loads(path.read_text())
                key = record["name"], record["incarnation"]
                if key not in self._handles:
                    self._handles[key] = _handle_of(record, path.with_name(f"{path.stem}.announce.json"))
                found.append(self._handles[key])
        return found

    async def watch(self, handle: Handle) -> AsyncIterator[Announcement]:
        assert isinstance(handle, ProcessHandle)
        seen: Announcement | None = None
        seen_stat: tuple[int, int] | None = None
        while True:
            ended = handle.end is not None  # looked at before the file, so that the last announcement is not missed
            with suppress(OSError, ValueError, TypeError):
                status = handle.announce_file.stat()
                if (status.st_ino, status.st_mtime_ns) != seen_stat:
                    newest = Announcement.from_json(handle.announce_file.read_text())
                    seen_stat = (status.st_ino, status.st_mtime_ns)
                    if newest != seen:
                        seen = newest
                        yield newest
            if ended:
                return
            poll_s = READY_POLL_S if seen is not None and seen.state == "ready" else LOADING_POLL_S
            with suppress(TimeoutError):
                await asyncio.wait_for(handle.ended(), poll_s)

    async def ask_to_stop(self, handle: Handle) -> None:
        assert isinstance(handle, ProcessHandle)
        handle.send(signal.SIGTERM)

    async def kill(self, handle: Handle) -> None:
        assert isinstance(handle, ProcessHandle)
        handle.send(signal.SIGKILL)

    async def save_state(self, text: str) -> None:
        replace_file(self._run_dir.state_file, text)

    async def load_state(self) -> str | None:
        try:
            return self._run_dir.state_file.read_text()
        except FileNotFoundError:
            return None

    async def close(self) -> None:
        if self._owner:
            for handle in await self.adopt():
                await self.kill(handle)
                await handle.ended()
        for process in self._handles.values():
            process.release()
        self._handles.clear()
