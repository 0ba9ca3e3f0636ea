"""Real instances and a real router as plain processes on loopback, without a cluster: what the end-to-end tests drive."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from biphase.protos.process import Announcement

READY_WITHIN_S = 120.0


@dataclass
class Running:
    """One process of the deployment and its newest announcement."""

    name: str
    process: subprocess.Popen[bytes]
    announce_file: Path
    log_file: Path

    def announcement(self) -> Announcement | None:
        try:
            return Announcement.from_json(self.announce_file.read_text())
        except FileNotFoundError:
            return None

    def wait_ready(self, within_s: float = READY_WITHIN_S) -> Announcement:
        """Wait for the file that the process writes when it is ready. Raises with its log when it ends instead."""
        deadline = time.monotonic() + within_s
        while time.monotonic() < deadline:
            found = self.announcement()
            if found is not None and found.state == "ready":
                return found
            if self.process.poll() is not None:
                raise AssertionError(f"{self.name} ended with {self.process.returncode}:\n{self._log()}")
            time.sleep(0.05)
        raise AssertionError(f"{self.name} was not ready within {within_s} s:\n{self._log()}")

    def _log(self) -> str:
        return self.log_file.read_text()[-4000:] if self.log_file.exists() else "(no log)"

    @property
    def address(self) -> str:
        found = self.announcement()
        assert found is not None
        return found.address

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.process.pid, number)

    def stop(self) -> None:
        """SIGTERM, then SIGKILL for one that does not end."""
        if self.process.poll() is None:
            self.signal(signal.SIGCONT)
            self.process.terminate()
            try:
                self.process.wait(15)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(15)


@dataclass
class Deployment:
    """P prefill and D decode instances behind one router."""

    directory: Path
    prefill: list[Running] = field(default_factory=list)
    decode: list[Running] = field(default_factory=list)
    router: Running | None = None

    @property
    def address(self) -> str:
        assert self.router is not None
        return self.router.address

    @property
    def all(self) -> list[Running]:
        return [*self.prefill, *self.decode, *([self.router] if self.router else [])]

    def spawn(self, name: str, command: Sequence[str], *, instance: str = "") -> Running:
        """``instance``: what it calls itself, where that is not its files' name, as with the ranks of one instance."""
        announce, log = self.directory / f"{name}.json", self.directory / f"{name}.log"
        announce.unlink(missing_ok=True)
        output = open(self.directory / f"{name}.out", "wb")  # noqa: SIM115
        with output:
            process = subprocess.Popen(
                [*command, "--name", instance or name, "--announce", str(announce), "--log-file", str(log)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return Running(name, process, announce, log)

    def stop(self) -> None:
        for running in reversed(self.all):
            running.stop()


@contextlib.contextmanager
def deployed(
    directory: Path,
    *,
    prefill: int = 1,
    decode: int = 1,
    mode: str = "auto",
    model: str = "smollm2",
    prefill_args: Sequence[str] = (),
    decode_args: Sequence[str] = (),
    router_args: Sequence[str] = (),
    prefill_command: Sequence[str] = (sys.executable, "-m", "biphase.prefill_worker"),
) -> Iterator[Deployment]:
    """Start a deployment, wait until all of it is ready, and end every process afterwards."""
    directory.mkdir(parents=True, exist_ok=True)
    deployment = Deployment(directory)
    common = ["--model", model, "--host", "127.0.0.1", "--port", "0", "--threads", "1"]
    try:
        for index in range(prefill):
            command = [*prefill_command, *common, *prefill_args]
            deployment.prefill.append(deployment.spawn(f"prefill-{index}", command))
        for index in range(decode):
            command = [sys.executable, "-m", "biphase.decode_worker", *common, *decode_args]
            deployment.decode.append(deployment.spawn(f"decode-{index}", command))
        members = []
        for kind, group in (("--prefill", deployment.prefill), ("--decode", deployment.decode)):
            for running in group:
                members += [kind, running.wait_ready().address]
        command = [sys.executable, "-m", "biphase.router", "--model", model, "--host", "127.0.0.1", "--port", "0"]
        deployment.router = deployment.spawn("router", [*command, *members, "--mode", mode, *router_args])
        deployment.router.wait_ready()
        yield deployment
    finally:
        deployment.stop()
