"""A deployment served by the real `biphase` command, with instances that have no model (see light/)."""

import os
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.served import BIPHASE, LIGHT, Served

from biphase.cluster.run_dir import started_ticks


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """For `biphase` as a subprocess: a run directory of its own, instances without a model."""
    return {**os.environ, "BIPHASE_RUN_DIR": str(tmp_path / "run"), "PYTHONPATH": str(LIGHT)}


@pytest.fixture
def serve(environment: dict[str, str], tmp_path: Path) -> Iterator[Callable[..., Served]]:
    """Starts `biphase serve` under the process backend; everything it started is ended with the test."""
    started: list[Served] = []

    def start(*flags: str, **env: str) -> Served:
        command = [*BIPHASE, "serve", "--model", "smollm2", "--backend", "process", "--port", "0", *flags]
        process = subprocess.Popen(
            command, env={**environment, **env}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        started.append(Served(tmp_path / "run", process))
        return started[-1]

    yield start
    for served in started:
        if served.process.poll() is None:
            served.process.send_signal(signal.SIGTERM)
            served.process.send_signal(signal.SIGTERM)
        record = served.run_dir.record()
        if record is not None and started_ticks(record.pid) == record.started_ticks:
            os.kill(record.pid, signal.SIGTERM)
            os.kill(record.pid, signal.SIGTERM)
        served.process.communicate(timeout=30)


@pytest.fixture
def unused_port() -> Callable[[], int]:
    def find() -> int:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            return int(probe.getsockname()[1])

    return find
