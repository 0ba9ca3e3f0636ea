"""The head's GCS is lost without fault tolerance: streams go on until Ray ends the workers, then all begins anew."""

import asyncio
import contextlib
import itertools
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from support.dummy_directory import write_dummy_directory
from support.ray_head import GIVES_UP_S, LONG, RAY, head, stream
from support.served import BIPHASE, Served

from biphase.client import AsyncClient
from biphase.cluster.run_dir import started_ticks
from biphase.protos.errors import BiphaseError

pytestmark = [pytest.mark.ray, pytest.mark.long, pytest.mark.timeout(400)]


@contextlib.contextmanager
def serving(address: str, model: Path, run: Path) -> Iterator[Served]:
    environment = {**os.environ, **RAY, "RAY_ADDRESS": address, "BIPHASE_RUN_DIR": str(run)}
    command = [*BIPHASE, "serve", "--model", str(model), "--load-format", "dummy", "--port", "0", "--cpus", "0"]
    command += ["--threads", "1", "--kv-memory", "64MiB"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    served = Served(run, process)
    try:
        served.wait_ready(120.0)
        yield served
    finally:
        process.terminate()
        process.communicate(timeout=60)


async def test_streams_outlive_the_gcs_and_a_new_head_serves_again(tmp_path: Path) -> None:
    model = write_dummy_directory(tmp_path / "model", max_position_embeddings=8192)
    with head() as (address, process):
        with serving(address, model, tmp_path / "run") as served:
            status = served.wait_for(lambda status: status.state == "ready")
            pids = [one.pid for one in status.processes if one.role]
            assert pids
            async with AsyncClient(served.record.router_address) as client:
                alone = await stream(client, 200, [])
                got: list[tuple[float, int]] = []
                long = asyncio.create_task(stream(client, LONG, got))
                while len(got) < 100:
                    await asyncio.sleep(0.01)
                (gcs,) = [
                    one for one in psutil.Process(process.pid).children(recursive=True) if "gcs_server" in one.name()
                ]
                gcs.send_signal(signal.SIGKILL)
                lost_s = time.monotonic()
                assert await stream(client, 200, []) == alone, "a new request is served without it"
                with contextlib.suppress(BiphaseError):  # Ray was faster
                    await long
                at_s = [when for when, _ in got]
                assert [token for _, token in got[:200]] == alone
                assert sum(when > lost_s for when in at_s) > 500, "the stream went on"
                assert max(b - a for a, b in itertools.pairwise(at_s)) < GIVES_UP_S
            deadline = lost_s + 8 * GIVES_UP_S
            while any(started_ticks(pid) is not None for pid in pids):
                assert time.monotonic() < deadline, "Ray has not ended the workers"
                await asyncio.sleep(0.2)
    with head() as (address, _), serving(address, model, tmp_path / "run") as served:
        async with AsyncClient(served.record.router_address) as client:
            assert await stream(client, 200, []) == alone
