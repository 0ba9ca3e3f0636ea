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
THREE = ("--decode-tp", "3", "--prefill", "0")


def gone(pids: list[int]) -> bool:
    return all(started_ticks(pid) is None for pid in pids)


@pytest.mark.parametrize("rank", [0, 2])
def test_a_killed_rank_takes_its_instance_along(serve: Serve, rank: int) -> None:
    served = serve("--decode-tp", "3", "--decode", "2", "--prefill", "0")
    assert "2 decode of tp 3 x pp 1" in served.wait_ready()
    doomed, others = rank_pids(served, "decode-0", 1), rank_pids(served, "decode-1", 1)
    assert (len(doomed), len(others)) == (3, 3)
    began_s = time.monotonic()
    os.kill(doomed[rank], signal.SIGKILL)
    while not gone(doomed):
        assert time.monotonic() - began_s < 1.0, "no rank is left within a second"
        time.sleep(0.005)  # looks at processes of others
    after = served.wait_for(is_ready("decode-0", 2))
    assert set(rank_pids(served, "decode-0", 2)).isdisjoint(doomed)
    assert pid_of(after, "decode-1") == others[0]
    assert not any(started_ticks(pid) is None for pid in others)
    assert [process.restarts for process in after.processes if process.kind == "decode"] == [1, 0]


def test_a_stopped_rank_does_not_outlive_the_others(serve: Serve) -> None:
    served = serve(*THREE)
    served.wait_ready()
    pids = rank_pids(served, "decode-0", 1)
    os.kill(pids[1], signal.SIGSTOP)
    os.kill(pids[2], signal.SIGKILL)
    served.wait_for(is_ready("decode-0", 2))
    assert gone(pids)
    assert "with rank 1 stopped" in (served.run_dir.logs / "controller-1.log").read_text()


def test_ranks_share_a_secret_that_nobody_else_can_read(serve: Serve) -> None:
    served = serve(*THREE)
    served.wait_ready()
    files = sorted(served.run_dir.processes.glob("decode-0-1*.spec.json"))
    assert [stat.S_IMODE(path.stat().st_mode) for path in files] == [0o600] * 3
    specs = sorted((json.loads(path.read_text()) for path in files), key=lambda spec: spec["rank"])
    assert [spec["rank"] for spec in specs] == [0, 1, 2]
    (key,) = {spec["rank_key"] for spec in specs}
    assert len(key) == 32
    for pid in rank_pids(served, "decode-0", 1):
        assert key not in Path(f"/proc/{pid}/cmdline").read_text() + Path(f"/proc/{pid}/environ").read_text()
    assert sorted(path.name for path in served.run_dir.logs.glob("decode-0*")) == [
        "decode-0-1.log",
        "decode-0-1.rank1.log",
        "decode-0-1.rank2.log",
    ]


def test_each_rank_has_its_gpu(serve: Serve) -> None:
    # names of GPUs that nobody computes on
    served = serve(*THREE, CUDA_VISIBLE_DEVICES="5,6,7")
    served.wait_ready()
    seen = []
    for pid in rank_pids(served, "decode-0", 1):
        pairs = (pair.partition("=") for pair in Path(f"/proc/{pid}/environ").read_text().split("\0"))
        seen.append({name: value for name, _, value in pairs}["CUDA_VISIBLE_DEVICES"])
    assert seen == ["5", "6", "7"]


def test_more_ranks_than_gpus_are_refused_with_both_numbers(environment: dict[str, str]) -> None:
    refused = run_biphase(
        environment | {"CUDA_VISIBLE_DEVICES": "0,1"},
        *("serve", "--model", "smollm2", "--backend", "process", "--port", "0", *THREE),
    )
    assert refused.returncode == 2
    assert "1 instance of 3 ranks asks for 3 GPUs, this host has 2: lower gpus" in refused.stderr.splitlines()[-1]


def test_a_restarted_controller_adopts_all_ranks(serve: Serve) -> None:
    served = serve(*THREE)
    served.wait_ready()
    before, pids = served.wait_for(is_ready("decode-0", 1)), rank_pids(served, "decode-0", 1)
    os.kill(pid_of(before, "controller"), signal.SIGKILL)
    after = served.wait_for(
        lambda status: status.state == "ready" and pid_of(status, "controller") != pid_of(before, "controller")
    )
    (decode,) = [process for process in after.processes if process.name == "decode-0"]
    assert (decode.incarnation, list(decode.rank_pids), decode.plan) == (1, pids, "tp 3 x pp 1")
    os.kill(pids[1], signal.SIGKILL)
    served.wait_for(is_ready("decode-0", 2))
    assert gone(pids)


def test_a_rank_whose_set_up_fails_ends_the_deployment_in_one_line(serve: Serve) -> None:
    served = serve(*THREE, LIGHT_FAIL="decode-0.1")
    _, err = served.process.communicate(timeout=30)
    assert served.process.returncode == 2
    assert err.splitlines()[-1] == "biphase: decode-0: rank 1: the model file is light on bytes"
    assert served.nobody_left()


def test_a_stop_ends_all_ranks_in_order(serve: Serve) -> None:
    served = serve(*THREE)
    served.wait_ready()
    pids = rank_pids(served, "decode-0", 1)
    served.process.send_signal(signal.SIGINT)
    assert served.process.wait(30) == 0, served.logs()
    assert gone(pids) and served.nobody_left()
    states = [
        json.loads(path.read_text())["state"] for path in served.run_dir.processes.glob("decode-0-1*.announce.json")
    ]
    assert states == ["stopped"] * 3
