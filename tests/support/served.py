"""A deployment served by the real `biphase` command, with instances that have no model (see light/)."""

import json
import select
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import grpc

from biphase.cluster.run_dir import RunDir, ServeRecord, started_ticks
from biphase.protos import controller_pb2, controller_pb2_grpc

LIGHT = Path(__file__).parents[1] / "cluster" / "light"
BIPHASE = [sys.executable, "-m", "biphase.cluster.cli"]
READY_S = 60.0


class Served:
    """One `biphase serve` and what can be asked about it."""

    def __init__(self, run_base: Path, process: "subprocess.Popen[str]") -> None:
        self.run_dir, self.process = RunDir(run_base / "biphase"), process

    @property
    def record(self) -> ServeRecord:
        record = self.run_dir.record()
        assert record is not None
        return record

    def wait_ready(self, within_s: float = READY_S) -> str:
        """The ready line."""
        assert self.process.stdout is not None
        readable, _, _ = select.select([self.process.stdout], [], [], within_s)
        line = self.process.stdout.readline() if readable else ""
        assert line.startswith("ready: "), (line, self.logs())
        return line

    def wait_for(
        self, wanted: Callable[[controller_pb2.ClusterStatus], bool], within_s: float = 30.0
    ) -> controller_pb2.ClusterStatus:
        """Follow the controller's status until it is as ``wanted``."""
        deadline, seen = time.monotonic() + within_s, None
        while time.monotonic() < deadline:
            with grpc.insecure_channel(self.record.controller_address) as channel:
                stub = controller_pb2_grpc.ControllerStub(channel)
                left_s = deadline - time.monotonic()
                try:
                    watch = stub.WatchStatus(controller_pb2.WatchStatusRequest(), wait_for_ready=True, timeout=left_s)
                    for status in watch:
                        seen = status
                        if wanted(status):
                            return status
                except grpc.RpcError:
                    pass  # the controller itself may be the one that was killed
        raise AssertionError(f"not seen within {within_s} s; last: {seen}\n{self.logs()}")

    def logs(self) -> str:
        return "\n".join(f"== {path.name}\n{path.read_text()[-3000:]}" for path in sorted(self.run_dir.logs.glob("*")))

    def all_pids(self) -> list[int]:
        found = [json.loads(path.read_text()) for path in self.run_dir.processes.glob("*-*.json") if _is_record(path)]
        return [self.record.pid, *(record["pid"] for record in found)]

    def nobody_left(self) -> bool:
        return all(started_ticks(pid) is None for pid in self.all_pids())


def _is_record(path: Path) -> bool:
    return not path.name.endswith((".spec.json", ".announce.json"))


def rank_pids(served: "Served", name: str, incarnation: int) -> list[int]:
    """Of every rank of one life under the process backend, in their order."""
    found = [json.loads(path.read_text()) for path in served.run_dir.processes.glob(f"{name}-{incarnation}*.json")]
    records = sorted((record for record in found if "started_ticks" in record), key=lambda record: record["rank"])
    return [record["pid"] for record in records]


def pid_of(status: controller_pb2.ClusterStatus, name: str) -> int:
    return next(process.pid for process in status.processes if process.name == name)


def is_ready(name: str, incarnation: int) -> Callable[[controller_pb2.ClusterStatus], bool]:
    """All is ready, and ``name`` lives its ``incarnation``-th life."""

    def check(status: controller_pb2.ClusterStatus) -> bool:
        return status.state == "ready" and any(
            process.name == name and process.incarnation == incarnation for process in status.processes
        )

    return check


def run_biphase(
    environment: dict[str, str], *arguments: str, within_s: float = 60.0
) -> "subprocess.CompletedProcess[str]":
    """A `biphase` command to its end."""
    return subprocess.run(
        [*BIPHASE, *arguments], env=environment, capture_output=True, text=True, timeout=within_s, check=False
    )
