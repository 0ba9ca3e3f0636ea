"""A deployment under Ray: one cluster for the whole module, real actors with instances that have no model."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.dummy_directory import write_dummy_directory
from support.served import BIPHASE, LIGHT, Served, is_ready, pid_of, run_biphase

from biphase.client import AsyncClient
from biphase.cluster.run_dir import started_ticks
from biphase.protos import controller_pb2
from biphase.protos.errors import Aborted

pytestmark = [pytest.mark.ray, pytest.mark.model]
PATIENCE_S = 90.0
"""Ray starts a Python of its own for every rank, which takes its time on a busy machine."""
LONG = 400
"""Tokens of a stream."""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    base = tmp_path_factory.mktemp("run")
    without = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return {**without, "BIPHASE_RUN_DIR": str(base), "PYTHONPATH": str(LIGHT)}


@pytest.fixture(scope="module")
def served(environment: dict[str, str]) -> Iterator[Served]:
    command = [*BIPHASE, "serve", "--model", "smollm2", "--backend", "ray", "--port", "0", "--cpus", "0"]
    command += ["--decode-tp", "3"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    served = Served(Path(environment["BIPHASE_RUN_DIR"]), process)
    try:
        served.wait_ready(120.0)
        yield served
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)


def _decode_pids(status: controller_pb2.ClusterStatus) -> list[int]:
    return [pid for process in status.processes if process.name == "decode-0" for pid in process.rank_pids]


def _is_all_known(status: controller_pb2.ClusterStatus) -> bool:
    """All is ready, and every rank of decode-0 has said its pid: rank 0 may call all ready before the words of the others have
    come. None may be 0: a signal to 0 is one to all that runs these tests."""
    pids = _decode_pids(status)
    return status.state == "ready" and len(set(pids)) == 3 and 0 not in pids


def test_status_names_every_process(served: Served, environment: dict[str, str]) -> None:
    table = run_biphase(environment, "status").stdout
    for word in ("prefill-0", "decode-0", "router-0", "controller", "ray"):
        assert word in table


def test_a_killed_instance_lives_again(served: Served) -> None:
    before = served.wait_for(is_ready("decode-0", 1))
    os.kill(pid_of(before, "decode-0"), signal.SIGKILL)
    after = served.wait_for(is_ready("decode-0", 2), PATIENCE_S)
    assert pid_of(after, "prefill-0") == pid_of(before, "prefill-0")


def test_a_killed_rank_takes_its_instance_along_stopped_ones_too(served: Served) -> None:
    status = served.wait_for(_is_all_known)
    (decode,) = [process for process in status.processes if process.name == "decode-0"]
    assert decode.plan == "tp 3 x pp 1"
    pids = _decode_pids(status)
    os.kill(pids[1], signal.SIGSTOP)
    os.kill(pids[2], signal.SIGKILL)
    after = served.wait_for(is_ready("decode-0", decode.incarnation + 1), PATIENCE_S)
    assert [pid for pid in pids if started_ticks(pid) is not None] == []
    assert pid_of(after, "prefill-0") == pid_of(status, "prefill-0")


def test_a_stopped_instance_is_replaced(served: Served) -> None:
    pid = pid_of(served.wait_for(is_ready("prefill-0", 1)), "prefill-0")
    os.kill(pid, signal.SIGSTOP)
    served.wait_for(is_ready("prefill-0", 2), PATIENCE_S)
    assert started_ticks(pid) is None


def test_the_controller_lives_again_and_adopts(served: Served) -> None:
    before = served.wait_for(_is_all_known)
    os.kill(pid_of(before, "controller"), signal.SIGKILL)
    after = served.wait_for(
        lambda status: _is_all_known(status) and pid_of(status, "controller") != pid_of(before, "controller")
    )
    for name in ("prefill-0", "decode-0", "router-0"):
        assert pid_of(after, name) == pid_of(before, name)
    lives = {process.name: process for process in after.processes}
    assert _decode_pids(after) == _decode_pids(before)
    groups = {f"biphase-biphase/{name}#{lives[name].incarnation}" for name in ("prefill-0", "decode-0")}
    assert _placement_groups(served) == groups, "those of former lives are given back"


def test_the_end_leaves_no_process(served: Served) -> None:
    status = served.wait_for(lambda status: status.state == "ready")
    pids = [served.record.pid, *(process.pid for process in status.processes)]
    ray_pids = _descendants(served.record.pid)
    assert len(ray_pids) > len(pids), "Ray's own processes are among them"
    served.process.send_signal(signal.SIGINT)
    assert served.process.wait(60) == 0, served.logs()
    left = [pid for pid in {*pids, *ray_pids} if started_ticks(pid) is not None]
    assert left == []


def test_what_does_not_fit_is_refused_with_both_numbers(environment: dict[str, str]) -> None:
    refused = run_biphase(
        environment, "serve", "--model", "smollm2", "--port", "0", "--name", "big", "--cpus", "1000", within_s=120.0
    )
    assert refused.returncode == 2
    line = refused.stderr.splitlines()[-1]
    assert "2000 CPUs" in line
    assert f"{os.cpu_count()} are free" in line


def test_gpus_that_do_not_fit_are_refused_with_both_numbers(environment: dict[str, str]) -> None:
    # Ray and biphase count what CUDA_VISIBLE_DEVICES names; nothing computes there
    refused = run_biphase(
        environment | {"CUDA_VISIBLE_DEVICES": "0"},
        *("serve", "--model", "smollm2", "--port", "0", "--name", "gpus", "--gpus", "0.6"),
        within_s=120.0,
    )
    assert refused.returncode == 2
    assert "2 instances ask for 1.2 GPUs, the Ray cluster has 1: lower gpus" in refused.stderr.splitlines()[-1]


def test_large_shares_of_gpus_find_room_beside_small_ones(environment: dict[str, str], tmp_path: Path) -> None:
    # Ray gives each the fullest GPU with room, as it comes: prefill's 0.4s first would share one, and a decode hangs
    roles = tmp_path / "roles.yaml"
    roles.write_text(
        "model: smollm2\nname: roles\nport: 0\n"
        "prefill: {replicas: 2, gpus: 0.4, cpus: 0}\ndecode: {replicas: 2, gpus: 0.6, cpus: 0}\n"
    )
    gpus = {"CUDA_VISIBLE_DEVICES": "0,1"}
    ready = run_biphase(environment | gpus, "serve", str(roles), "--detach", within_s=120.0)
    stopped = run_biphase(environment, "stop", "--name", "roles")
    assert ready.stdout.startswith("ready: "), ready.stderr
    assert stopped.returncode == 0


@pytest.mark.long
def test_an_update_renews_every_instance_under_running_streams(tmp_path: Path) -> None:
    # one of each, and their CPUs are all of the cluster's: each new life has the room of its old one alone
    model = write_dummy_directory(tmp_path / "model", max_position_embeddings=1024)
    each = {"replicas": 1, "cpus": (os.cpu_count() or 2) / 2, "block_size": 16, "threads": 1}
    roles = {"prefill": each, "decode": {**each, "max_num_seqs": 8}}
    said = {"model": str(model), "load_format": "dummy", "port": 0, "max_model_len": 1024, "kv_codec": "raw", **roles}
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment["BIPHASE_RUN_DIR"] = str(tmp_path / "run")

    def file(name: str, **changes: Any) -> str:
        (tmp_path / name).write_text(yaml.safe_dump(said | changes))
        return str(tmp_path / name)

    process = subprocess.Popen(
        [*BIPHASE, "serve", file("deploy.yaml")],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    served = Served(tmp_path / "run", process)
    try:
        served.wait_ready(120.0)
        before = served.wait_for(lambda status: status.state == "ready")

        refused = run_biphase(environment, "update", file("large.yaml", prefill={**each, "cpus": 1000}))
        assert refused.returncode == 2
        line = refused.stderr.splitlines()[-1]
        assert "prefill-0: 1 instance asks Ray for 1000 CPUs" in line and "are free: lower cpus" in line
        wider = file("wider.yaml", decode={**roles["decode"], "max_num_seqs": 9})
        dry = run_biphase(environment, "update", wider, "--dry-run")
        (new,) = {line.rpartition(" generation ")[2].split()[0] for line in dry.stdout.splitlines() if "anew" in line}
        assert [line.partition(" ")[0] for line in dry.stdout.splitlines()] == ["prefill-0", "prefill-0", "decode-0"]
        assert _lives(served.wait_for(lambda status: status.state == "ready")) == _lives(before), "nothing has changed"

        done, streams = asyncio.run(_under_streams(served, environment, "update", wider, "--grace", "2s"))
        assert done.returncode == 0, (done.stdout, done.stderr, served.logs())
        for results in streams:
            exact = {tokens for tokens, ended in results if ended}
            assert len(exact) == 1, "whichever generation it ran on"
            (tokens,) = exact
            assert len(tokens) == LONG
            assert all(tokens[: len(part)] == part for part, ended in results if not ended), "aborted, not contradicted"
        after = served.wait_for(lambda status: status.state == "ready")
        assert {process.generation for process in after.processes if process.generation} == {new}
        assert after.ratio == before.ratio == "1P:1D"
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)


async def _under_streams(served: Served, environment: dict[str, str], *command: str) -> tuple[Any, list[Any]]:
    """A command while three clients stream: how it ended, and what each client has got."""
    async with AsyncClient(served.record.router_address) as client:
        running = asyncio.create_task(asyncio.to_thread(run_biphase, environment, *command, within_s=300.0))
        streams = await asyncio.gather(*(_ask_until(client, running, seed) for seed in range(3)))
    return running.result(), streams


async def _ask_until(client: AsyncClient, done: "asyncio.Task[Any]", seed: int) -> list[tuple[tuple[int, ...], bool]]:
    """One request after the other until ``done``, and one more: the tokens that came, and whether those were all."""
    prompt = [3 + (seed * 37 + index * 11) % 250 for index in range(40)]
    results: list[tuple[tuple[int, ...], bool]] = []
    last = False
    while not last:
        last = done.done()
        stream = client.generate(token_ids=prompt, max_tokens=LONG, temperature=0.0, ignore_eos=True)
        tokens: list[int] = []
        try:
            async for delta in stream:
                tokens += delta.token_ids
            results.append((tuple(tokens), True))
        except Aborted:  # its weights were replaced
            results.append((tuple(tokens), False))
    return results


def _lives(status: controller_pb2.ClusterStatus) -> list[tuple[str, int, int, str]]:
    return [(it.name, it.incarnation, it.pid, it.generation) for it in status.processes]


def _placement_groups(served: Served) -> set[str]:
    """Of the deployment's cluster, asked by a driver of its own with the cluster's own token."""
    command = environment = ""  # of Ray's own processes
    for pid in _descendants(served.record.pid):
        words = Path(f"/proc/{pid}/cmdline").read_text()
        if "--gcs-address=" in words:
            command, environment = words, Path(f"/proc/{pid}/environ").read_text()
    address = command.replace("\0", " ").partition("--gcs-address=")[2].split()[0]
    token = environment.partition("RAY_AUTH_TOKEN=")[2].partition("\0")[0]
    code = (
        f"import ray; from ray.util import placement_group_table; ray.init({address!r}, log_to_driver=False)\n"
        "print(*(group['name'] for group in placement_group_table().values() if group['state'] != 'REMOVED'))"
    )
    own = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token, "RAY_USAGE_STATS_ENABLED": "0"}
    asked = subprocess.run(
        [sys.executable, "-c", code], env=own, capture_output=True, text=True, timeout=60, check=True
    )
    return set(asked.stdout.splitlines()[-1].split())


def _descendants(pid: int) -> set[int]:
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        children.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    found, frontier = set(), [pid]
    while frontier:
        for child in children.get(frontier.pop(), []):
            found.add(child)
            frontier.append(child)
    return found
