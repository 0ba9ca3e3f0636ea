"""Instances of several ranks under the process backend: real processes and signals, ranks that have no model."""

import json
import os
import signal
import stat
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.served import Served, is_ready, pid_of, rank_pids, run_biphase

from biphase.cluster.run_dir import started_ticks

pytestmark = pytest.mark.model
Serve = Callable[..., Served]
GONE_S = 5.0
"""Far above what bench/faults.py holds: other tests may keep this machine busy."""
THREE = ("--decode-tp", "3", "--prefill", "0")


def gone(pids: list[int]) -> bool:
    return all(started_ticks(pid) is None for pid in pids)


def wait_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + GONE_S
    while not gone(pids):
        assert time.monotonic() < deadline, "ranks are left"
        time.sleep(0.005)  # looks at processes of others


def test_a_lost_rank_takes_its_instance_along(serve: Serve) -> None:
    served = serve("--decode-tp", "3", "--decode", "2", "--prefill", "0")
    assert "2 decode of tp 3 x pp 1" in served.wait_ready()
    first, others = rank_pids(served, "decode-0", 1), rank_pids(served, "decode-1", 1)
    assert (len(first), len(others)) == (3, 3)
    os.kill(first[1], signal.SIGSTOP)  # obeys nothing but SIGKILL
    os.kill(first[2], signal.SIGKILL)
    wait_gone(first)
    before = served.wait_for(is_ready("decode-0", 2))
    second = rank_pids(served, "decode-0", 2)
    assert set(second).isdisjoint(first)

    os.kill(pid_of(before, "controller"), signal.SIGKILL)
    after = served.wait_for(
        lambda status: status.state == "ready" and pid_of(status, "controller") != pid_of(before, "controller")
    )
    lives = {process.name: process for process in after.processes}
    assert (lives["decode-0"].incarnation, lives["decode-0"].plan) == (2, "tp 3 x pp 1")
    assert [list(lives[name].rank_pids) for name in ("decode-0", "decode-1")] == [second, others]

    os.kill(second[0], signal.SIGKILL)
    wait_gone(second)
    last = served.wait_for(is_ready("decode-0", 3))
    assert list(next(process for process in last.processes if process.name == "decode-1").rank_pids) == others
    assert not any(gone([pid]) for pid in others)


def test_what_ranks_are_given_and_how_they_end(serve: Serve) -> None:
    # names of GPUs that nobody computes on
    served = serve(*THREE, CUDA_VISIBLE_DEVICES="5,6,7")
    served.wait_ready()
    files = sorted(served.run_dir.processes.glob("decode-0-1*.spec.json"))
    assert [stat.S_IMODE(path.stat().st_mode) for path in files] == [0o600] * 3
    specs = sorted((json.loads(path.read_text()) for path in files), key=lambda spec: spec["rank"])
    assert [spec["rank"] for spec in specs] == [0, 1, 2]
    (key,) = {spec["rank_key"] for spec in specs}
    assert len(key) == 32
    pids, devices = rank_pids(served, "decode-0", 1), []
    for pid in pids:
        environment = Path(f"/proc/{pid}/environ").read_text()
        assert key not in environment + Path(f"/proc/{pid}/cmdline").read_text(), "a secret is nobody else's to read"
        devices.append(environment.partition("CUDA_VISIBLE_DEVICES=")[2].partition("\0")[0])
    assert devices == ["5", "6", "7"]
    logs = sorted(path.name for path in served.run_dir.logs.glob("decode-0*"))
    assert logs == ["decode-0-1.log", "decode-0-1.rank1.log", "decode-0-1.rank2.log"]

    served.process.send_signal(signal.SIGINT)
    assert served.process.wait(30) == 0, served.logs()
    assert gone(pids) and served.nobody_left()
    words = [json.loads(path.read_text()) for path in served.run_dir.processes.glob("decode-0-1*.announce.json")]
    assert [word["state"] for word in words] == ["stopped"] * 3, "in order, none of them killed"


def test_more_ranks_than_gpus_are_refused_with_both_numbers(environment: dict[str, str]) -> None:
    refused = run_biphase(
        environment | {"CUDA_VISIBLE_DEVICES": "0,1"},
        *("serve", "--model", "smollm2", "--backend", "process", "--port", "0", *THREE),
    )
    assert refused.returncode == 2
    assert "1 instance of 3 ranks asks for 3 GPUs, this host has 2: lower gpus" in refused.stderr.splitlines()[-1]


def test_a_rank_whose_set_up_fails_ends_the_deployment_in_one_line(serve: Serve) -> None:
    served = serve(*THREE, LIGHT_FAIL="decode-0.1")
    _, err = served.process.communicate(timeout=30)
    assert served.process.returncode == 2
    assert err.splitlines()[-1] == "biphase: decode-0: rank 1: the model file is light on bytes"
    assert served.nobody_left()
