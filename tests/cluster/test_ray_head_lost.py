"""The head's GCS is lost without fault tolerance: streams go on until Ray ends the workers, then all begins anew."""

import asyncio
import contextlib
import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from support.dummy_directory import write_dummy_directory
from support.served import BIPHASE, Served

from biphase.client import AsyncClient
from biphase.cluster.run_dir import started_ticks
from biphase.protos.errors import BiphaseError

pytestmark = [pytest.mark.ray, pytest.mark.long, pytest.mark.timeout(400)]
GIVES_UP_S = 15
"""What Ray itself takes a minute for: a raylet without its GCS ends, and its workers with it."""
RAY = {
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": "0" * 64,
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_gcs_rpc_server_reconnect_timeout_s": str(GIVES_UP_S),
}
HEAD = """
import sys
from ray.cluster_utils import Cluster
print(Cluster(initialize_head=True, head_node_args={"num_cpus": 4}).address, flush=True)
sys.stdin.read()
"""
PROMPT = list(range(10, 40))
LONG = 7500


@contextlib.contextmanager
def head() -> Iterator[tuple[str, "subprocess.Popen[str]"]]:
    """A cluster of one host: its address, and the process that holds it."""
    process = subprocess.Popen(
        [sys.executable, "-c", HEAD],
        env={**os.environ, **RAY},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    family: list[psutil.Process] = []
    try:
        lines = iter(process.stdout.readline, "")
        address = next(line.strip() for line in lines if ":" in line and line[0].isdigit())
        family = psutil.Process(process.pid).children(recursive=True)
        yield address, process
    finally:
        process.kill()
        process.communicate(timeout=60)
        for one in family:  # Ray's own processes outlive whoever started them
            if one.is_running():
                one.kill()


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


async def stream(client: AsyncClient, max_tokens: int, got: list[tuple[float, int]]) -> list[int]:
    """``got`` gets each token with the time it came, also those before an error."""
    async for delta in client.generate(token_ids=PROMPT, max_tokens=max_tokens, temperature=0.0, ignore_eos=True):
        got += [(time.monotonic(), token) for token in delta.token_ids]
    return [token for _, token in got]


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
