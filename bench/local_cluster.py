"""A deployment under the `process` backend on loopback, for benches that need no hosts of its own but may set processes apart.

``netns_site`` is on its PYTHONPATH: with the environment of ``cpu_shares.cpu_shares`` each instance has its own share of the
processors.
"""

import asyncio
import contextlib
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import grpc.aio
import yaml

from biphase.cluster.run_dir import RunDir
from biphase.protos import controller_pb2, controller_pb2_grpc
from biphase.protos.grpc_setup import channel_options

SITE = Path(__file__).resolve().parent / "netns_site"
NAME = "bench"
START_S, STOP_S = 300.0, 60.0


class LocalCluster:
    """Owns one `biphase serve` in the foreground, which ends with this process."""

    def __init__(self, folder: Path, deploy: Mapping[str, Any], env: Mapping[str, str]) -> None:
        self.folder, self._deploy, self._env = folder, deploy, env
        self.run_dir = RunDir(folder / "run" / NAME)
        self._serve: subprocess.Popen[str] | None = None

    @property
    def address(self) -> str:
        record = self.run_dir.record()
        assert record is not None
        return record.router_address

    def start(self) -> None:
        """Return when ready; RuntimeError with the log when that is not so in time."""
        (self.folder / "deploy.yaml").write_text(yaml.safe_dump({"name": NAME, "port": 0, **self._deploy}))
        path = os.pathsep.join([str(SITE), *filter(None, [os.environ.get("PYTHONPATH")])])
        env = {**os.environ, **self._env, "PYTHONPATH": path, "BIPHASE_RUN_DIR": str(self.folder / "run")}
        command = [sys.executable, "-m", "biphase.cluster.cli", "serve", str(self.folder / "deploy.yaml")]
        with open(self.folder / "serve.err", "w") as errors:
            self._serve = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=errors, text=True)
        assert self._serve.stdout is not None
        readable, _, _ = select.select([self._serve.stdout], [], [], START_S)
        line = self._serve.stdout.readline() if readable else ""
        if not line.startswith("ready: "):
            self.stop()
            raise RuntimeError(f"the deployment did not start: {(self.folder / 'serve.err').read_text()[-3000:]}")

    def stop(self) -> None:
        if self._serve is None:
            return
        for _ in range(2):  # the second asks for an end at once
            self._serve.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._serve.wait(0.5)
        try:
            self._serve.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._serve.kill()
        self._serve.communicate()
        self._serve = None

    async def status(self, timeout_s: float = 2.0) -> controller_pb2.ClusterStatus | None:
        """The controller's; None when it does not answer."""
        record = self.run_dir.record()
        if record is None:
            return None
        async with grpc.aio.insecure_channel(record.controller_address, options=channel_options()) as channel:
            try:
                stub = controller_pb2_grpc.ControllerStub(channel)
                return await stub.GetStatus(controller_pb2.WatchStatusRequest(), timeout=timeout_s)  # type: ignore[no-any-return]
            except grpc.aio.AioRpcError:
                return None


@contextlib.asynccontextmanager
async def local_cluster(deploy: Mapping[str, Any], env: Mapping[str, str]) -> AsyncIterator[LocalCluster]:
    """A deployment for a while, in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        cluster = LocalCluster(Path(folder), deploy, env)
        try:
            await asyncio.to_thread(cluster.start)
            yield cluster
        finally:
            await asyncio.to_thread(cluster.stop)
