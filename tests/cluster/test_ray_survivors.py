"""A killed supervisor on a Ray cluster that outlives it: the next `biphase serve` goes on with what runs; an orderly end
leaves nothing to go on with."""

import asyncio
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from support.dummy_directory import write_dummy_directory
from support.ray_head import LONG, RAY, head, stream
from support.served import Served, run_biphase

from biphase.client import AsyncClient
from biphase.cluster.run_dir import started_ticks
from biphase.protos import controller_pb2

pytestmark = [pytest.mark.ray, pytest.mark.long, pytest.mark.timeout(400)]
READY_S = 150.0


def lives(status: controller_pb2.ClusterStatus) -> dict[str, tuple[int, int]]:
    """(pid, incarnation) of all but the controller, by name."""
    return {one.name: (one.pid, one.incarnation) for one in status.processes if one.kind != "controller"}


async def test_a_new_supervisor_goes_on_with_what_survived(tmp_path: Path, unused_port: Callable[[], int]) -> None:
    model = write_dummy_directory(tmp_path / "model", max_position_embeddings=8192)
    file = tmp_path / "deploy.yaml"
    file.write_text(
        f"model: {model}\nload_format: dummy\nport: {unused_port()}\n"
        "prefill: {replicas: 1, cpus: 0, threads: 1, kv_memory: 64MiB}\n"
        "decode: {replicas: 1, cpus: 0, threads: 1, kv_memory: 64MiB}\n"
    )
    with head() as (address, _):
        environment = {**os.environ, **RAY, "RAY_ADDRESS": address, "BIPHASE_RUN_DIR": str(tmp_path / "run")}

        async def biphase(*arguments: str) -> "subprocess.CompletedProcess[str]":
            return await asyncio.to_thread(run_biphase, environment, *arguments, within_s=READY_S)

        served = Served(tmp_path / "run", None)  # type: ignore[arg-type]
        try:
            first = await biphase("serve", str(file), "--detach")
            assert first.stdout.startswith("ready: "), (first.stderr, served.logs())
            assert (await biphase("scale", "prefill=1", "decode=1")).returncode == 0
            before = await asyncio.to_thread(served.wait_for, lambda status: status.state == "ready")
            assert before.pinned
            record = served.record
            async with AsyncClient(record.router_address) as client:
                alone = await stream(client, 200, [])
                got: list[tuple[float, int]] = []
                long = asyncio.create_task(stream(client, LONG, got))
                while len(got) < 100:
                    await asyncio.sleep(0.01)
                os.kill(record.pid, signal.SIGKILL)
                again = await biphase("serve", str(file), "--detach")
                assert again.stdout.startswith("ready: "), (again.stderr, served.logs())
                after = await asyncio.to_thread(
                    served.wait_for, lambda status: status.state == "ready" and status.epoch == before.epoch + 1
                )
                assert lives(after) == lives(before), served.logs()
                assert after.pinned == before.pinned
                (controller,) = [one for one in after.processes if one.kind == "controller"]
                assert controller.incarnation == 2
                assert served.record.controller_address == record.controller_address
                assert [token for _, token in got[:200]] == alone
                assert len(await long) == LONG, "the stream has gone on to its end"
                assert await stream(client, 200, []) == alone
            pids = [one.pid for one in after.processes]
            assert (await biphase("stop")).returncode == 0
            assert [pid for pid in pids if started_ticks(pid) is not None] == []
            anew = await biphase("serve", str(file), "--detach")
            assert anew.stdout.startswith("ready: "), (anew.stderr, served.logs())
            status = await asyncio.to_thread(served.wait_for, lambda status: status.state == "ready")
            assert (status.epoch, status.pinned) == (1, "")
            assert {incarnation for _, incarnation in lives(status).values()} == {1}
        finally:
            await biphase("stop", "--now")
