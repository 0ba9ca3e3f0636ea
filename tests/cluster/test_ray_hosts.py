"""An instance over several hosts: a stage stays on one, the next may lie on another. Two raylets of this machine play them."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.dummy_directory import write_dummy_directory
from support.served import BIPHASE, LIGHT, Served, is_ready

from biphase.cluster.run_dir import started_ticks
from biphase.protos import controller_pb2

pytestmark = [pytest.mark.ray, pytest.mark.model, pytest.mark.long]
TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64, "RAY_USAGE_STATS_ENABLED": "0"}
SECOND = "127.0.0.2"
TWO_HOSTS = f"""
import sys
from ray.cluster_utils import Cluster
hosts = Cluster(initialize_head=True, head_node_args={{"num_cpus": 2}})
hosts.add_node(num_cpus=2, node_ip_address={SECOND!r})
print(hosts.address, flush=True)
sys.stdin.read()
hosts.shutdown()
"""


@pytest.fixture
def address() -> Iterator[str]:
    """Of a cluster of two hosts with two CPUs each, ended with the test."""
    process = subprocess.Popen(
        [sys.executable, "-c", TWO_HOSTS],
        env={**os.environ, **TOKEN, "PYTHONPATH": str(LIGHT)},  # of the actors too
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    lines = iter(process.stdout.readline, "")
    yield next(line.strip() for line in lines if ":" in line and line[0].isdigit())
    process.communicate(timeout=60)


def _decode(status: controller_pb2.ClusterStatus) -> controller_pb2.ProcessStatus:
    return next(process for process in status.processes if process.name == "decode-0")


def test_stages_spread_over_hosts_and_places_stay_together(address: str, tmp_path: Path) -> None:
    environment = {
        **os.environ,
        **TOKEN,
        "RAY_ADDRESS": address,
        "BIPHASE_RUN_DIR": str(tmp_path),
        "PYTHONPATH": str(LIGHT),
    }
    command = [*BIPHASE, "serve", "--model", "smollm2", "--port", "0", "--prefill", "0", "--decode-tp", "3"]
    command += ["--decode-pp", "2", "--cpus", "0.6"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    served = Served(tmp_path, process)
    try:
        served.wait_ready(120.0)
        known = served.wait_for(lambda status: is_ready("decode-0", 1)(status) and len(_decode(status).rank_pids) == 6)
        decode = _decode(known)
        on_second = [_is_on_second(pid) for pid in decode.rank_pids]
        assert on_second in ([False] * 3 + [True] * 3, [True] * 3 + [False] * 3), "1.8 CPUs a stage: one on each host"
        host, _, _ = decode.address.rpartition(":")
        assert (host == SECOND) == on_second[0] and host != "127.0.0.1"
    finally:
        process.terminate()
        process.communicate(timeout=60)
    assert [pid for pid in decode.rank_pids if started_ticks(pid) is not None] == []


READ_LOGS = f"""
import asyncio, sys
import ray
from biphase.cluster.deployment import Deployment
from biphase.cluster.local_logs import LocalLogs
from biphase.cluster.ray_backend import RayBackend
from biphase.protos.errors import InvalidRequest

async def refusal(read):
    try:
        return await read()
    except InvalidRequest as error:
        return str(error)

async def main():
    backend = RayBackend(Deployment(name="logs", model="smollm2"), owner=False)
    await backend.open()
    there = backend.logs_of({SECOND!r})
    end, stat = await there.read("/proc/self/stat", 0)
    print("parent", stat.decode().rpartition(")")[2].split()[1])
    first = await there.read(sys.argv[1], 0, 3)
    print("tail", first[1].decode().split(), await there.read(sys.argv[1], first[0]))
    print("missing", await refusal(lambda: there.read("/nowhere", 0)))
    print("gone", await refusal(lambda: backend.logs_of("127.0.0.9").read("/nowhere", 0)))
    print("unplaced", await refusal(lambda: backend.logs_of("").read("/nowhere", 0)))
    print("here", type(backend.logs_of(ray.util.get_node_ip_address())).__name__)
    await backend.close()

ray.init(log_to_driver=False)
asyncio.run(main())
"""


def test_a_log_is_read_by_its_own_host(address: str, tmp_path: Path) -> None:
    log = tmp_path / "decode-0-1.log"
    log.write_text("one\ntwo\nthree\nfour\n")
    done = subprocess.run(
        [sys.executable, "-c", READ_LOGS, str(log)],
        env={**os.environ, **TOKEN, "RAY_ADDRESS": address},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    said = dict(line.split(" ", 1) for line in done.stdout.splitlines() if " " in line)
    assert done.returncode == 0, done.stderr
    assert SECOND in Path(f"/proc/{said['parent']}/cmdline").read_text(), (
        "the raylet of that host has started who reads"
    )
    assert said["tail"] == "['two', 'three', 'four'] (19, b'')"
    assert said["missing"] == f"/nowhere on {SECOND}: No such file or directory"
    assert said["gone"].startswith("it lies on 127.0.0.9, which is gone; there are ")
    assert (said["unplaced"], said["here"]) == ("it has no process yet", "LocalLogs")


def _is_on_second(pid: int) -> bool:
    """By the raylet that started it."""
    parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]
    return SECOND in Path(f"/proc/{parent}/cmdline").read_text()


def test_a_host_that_lacked_the_weights_is_used_once_it_has_them(address: str, tmp_path: Path) -> None:
    model = write_dummy_directory(tmp_path / "model")
    environment = {
        **os.environ,
        **TOKEN,
        "RAY_ADDRESS": address,
        "BIPHASE_RUN_DIR": str(tmp_path / "run"),
        "PYTHONPATH": str(LIGHT),
    }
    command = [*BIPHASE, "serve", "--model", str(model), "--port", "0", "--prefill", "0"]
    command += ["--decode", "2", "--cpus", "2"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    served = Served(tmp_path / "run", process)
    refused = f" has no weights: {model}: no weights there"
    try:
        while served.run_dir.record() is None or "controller" not in dict(served.record.stages):
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.1)
        served.wait_for(lambda status: any("waits for room" in one.detail for one in status.processes))
        served.wait_for(lambda status: any(refused in line for line in status.warnings))
        (model / "model.safetensors").write_bytes(b"x")
        served.wait_ready(60.0)
        # the controller looks at the nodes every few seconds: instances may be ready before it says so
        seen = served.wait_for(lambda status: status.state == "ready" and refused not in " ".join(status.warnings))
        assert sorted(one.incarnation for one in seen.processes if one.role) == [1, 1], "it is the same life"
        assert len({one.node for one in seen.processes if one.role}) == 2
    finally:
        process.terminate()
        process.communicate(timeout=60)
