"""Deployments under the process backend: real processes, real signals."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.served import Served, is_ready, pid_of, run_biphase

from biphase.cluster.run_dir import started_ticks

pytestmark = pytest.mark.model
Serve = Callable[..., Served]


def test_ready_then_drained(serve: Serve) -> None:
    served = serve("--prefill", "1", "--decode", "1")
    assert "(1 prefill, 1 decode, process, " in served.wait_ready()
    served.process.send_signal(signal.SIGINT)
    assert served.process.wait(30) == 0, served.logs()
    assert served.nobody_left()
    assert served.record.state == "stopped"


def test_each_instance_has_its_gpu_in_every_life(serve: Serve) -> None:
    # names of GPUs that nobody computes on: these instances have no model
    served = serve(CUDA_VISIBLE_DEVICES="4,7")
    served.wait_ready()
    prefill, decode = (pid_of(served.wait_for(is_ready(name, 1)), name) for name in ("prefill-0", "decode-0"))
    assert [_environment(pid)["CUDA_VISIBLE_DEVICES"] for pid in (prefill, decode)] == ["4", "7"]
    os.kill(decode, signal.SIGKILL)
    again = pid_of(served.wait_for(is_ready("decode-0", 2)), "decode-0")
    assert _environment(again)["CUDA_VISIBLE_DEVICES"] == "7"


def test_more_gpus_than_there_are_is_one_line(environment: dict[str, str]) -> None:
    refused = run_biphase(
        environment | {"CUDA_VISIBLE_DEVICES": "4"},
        *("serve", "--model", "smollm2", "--backend", "process", "--port", "0", "--gpus", "1"),
    )
    assert refused.returncode == 2
    assert "2 instances ask for 2 GPUs, this host has 1: lower gpus" in refused.stderr.splitlines()[-1]


def test_gpus_of_roles_that_differ_are_given_once(serve: Serve, tmp_path: Path) -> None:
    roles = tmp_path / "roles.yaml"
    roles.write_text("model: smollm2\nprefill: {replicas: 2, gpus: 0.5}\ndecode: {replicas: 1, gpus: 1}\n")
    served = serve(str(roles), CUDA_VISIBLE_DEVICES="4,7")
    served.wait_ready()
    status = served.wait_for(is_ready("decode-0", 1))
    names = ("prefill-0", "prefill-1", "decode-0")
    assert [_environment(pid_of(status, name))["CUDA_VISIBLE_DEVICES"] for name in names] == ["7", "7", "4"]


def test_gpus_that_leave_none_to_the_others_are_one_line(environment: dict[str, str], tmp_path: Path) -> None:
    roles = tmp_path / "roles.yaml"
    roles.write_text("model: smollm2\nbackend: process\nport: 0\nprefill: {gpus: 1}\n")
    refused = run_biphase(environment | {"CUDA_VISIBLE_DEVICES": "4"}, "serve", str(roles))
    assert refused.returncode == 2
    assert "this host has 1, which leaves none for the 1 without gpus: lower gpus" in refused.stderr.splitlines()[-1]


def _environment(pid: int) -> dict[str, str]:
    pairs = (pair.partition("=") for pair in Path(f"/proc/{pid}/environ").read_text().split("\0"))
    return {name: value for name, _, value in pairs}


@pytest.mark.parametrize("name", ["prefill-0", "decode-0", "router-0"])
def test_a_killed_process_lives_again(serve: Serve, name: str) -> None:
    served = serve()
    served.wait_ready()
    pid = pid_of(served.wait_for(is_ready(name, 1)), name)
    os.kill(pid, signal.SIGKILL)
    again = served.wait_for(is_ready(name, 2))
    assert pid_of(again, name) != pid
    assert [process.restarts for process in again.processes if process.name == name] == [1]


def test_a_stopped_instance_is_replaced(serve: Serve) -> None:
    served = serve()
    served.wait_ready()
    pid = pid_of(served.wait_for(is_ready("decode-0", 1)), "decode-0")
    began_s = time.monotonic()
    os.kill(pid, signal.SIGSTOP)
    served.wait_for(lambda status: status.state != "ready")
    assert time.monotonic() - began_s < 3.0
    served.wait_for(is_ready("decode-0", 2))
    assert started_ticks(pid) is None, "the old life must be gone before the new one starts"


def test_a_stopped_router_is_silent_and_then_replaced(
    serve: Serve, tmp_path: Path, unused_port: Callable[[], int]
) -> None:
    deploy = tmp_path / "deploy.yaml"
    deploy.write_text("model: smollm2\nreplace_after_s: 2\n")
    served = serve(str(deploy), "--port", str(unused_port()))
    served.wait_ready()
    before = served.wait_for(is_ready("router-0", 1))
    os.kill(pid_of(before, "router-0"), signal.SIGSTOP)
    silent = served.wait_for(lambda status: status.state == "degraded")
    assert [process.health for process in silent.processes if process.name == "router-0"] == ["silent"]
    assert not silent.router_addresses
    after = served.wait_for(is_ready("router-0", 2))
    assert after.router_addresses == before.router_addresses, "it is found where it was"


def test_the_controller_lives_again_and_adopts(serve: Serve) -> None:
    served = serve()
    served.wait_ready()
    before = served.wait_for(is_ready("decode-0", 1))
    os.kill(pid_of(before, "controller"), signal.SIGKILL)
    after = served.wait_for(
        lambda status: status.state == "ready" and pid_of(status, "controller") != pid_of(before, "controller")
    )
    for name in ("prefill-0", "decode-0", "router-0"):
        assert pid_of(after, name) == pid_of(before, name), "an adopted process goes on"
    os.kill(pid_of(after, "prefill-0"), signal.SIGKILL)
    served.wait_for(is_ready("prefill-0", 2))


@pytest.mark.parametrize("who", ["serve", "supervisor"])
def test_nothing_outlives_the_owner(serve: Serve, who: str) -> None:
    served = serve()
    served.wait_ready()
    descriptors = [os.pidfd_open(pid) for pid in served.all_pids()]
    os.kill(served.process.pid if who == "serve" else served.record.pid, signal.SIGKILL)
    try:
        for descriptor in descriptors:
            assert _ends_within(descriptor, 20.0), served.logs()
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def test_the_next_serve_ends_what_a_killed_supervisor_left(serve: Serve) -> None:
    served = serve("--detach")
    served.process.communicate(timeout=60)
    pids = served.all_pids()
    stopped = pid_of(served.wait_for(is_ready("decode-0", 1)), "decode-0")
    os.kill(stopped, signal.SIGSTOP)  # it does not see that its supervisor is gone
    os.kill(served.record.pid, signal.SIGKILL)
    again = serve("--detach")
    out, err = again.process.communicate(timeout=60)
    assert out.startswith("ready: "), err
    assert [pid for pid in pids if started_ticks(pid) is not None] == []
    status = again.wait_for(is_ready("decode-0", 1))
    assert pid_of(status, "decode-0") not in pids


def test_a_bad_set_up_ends_the_deployment_in_one_line(serve: Serve) -> None:
    served = serve(LIGHT_FAIL="decode-0")
    out, err = served.process.communicate(timeout=30)
    assert served.process.returncode == 2
    assert out == ""
    assert err.splitlines()[-1] == "biphase: decode-0: the model file is light on bytes"
    assert "Traceback" not in err
    assert served.nobody_left()


def test_a_crash_loop_at_the_start_ends_the_deployment(serve: Serve) -> None:
    served = serve(LIGHT_CRASH="prefill-0")
    _, err = served.process.communicate(timeout=60)
    assert served.process.returncode == 2
    assert err.splitlines()[-1].startswith("biphase: prefill-0: ended")
    assert served.nobody_left()


def test_ctrl_c_while_loading_leaves_nothing(serve: Serve) -> None:
    served = serve(LIGHT_SLOW="decode-0")
    _wait_until(lambda: served.run_dir.record() is not None and len(served.record.processes) > 0)
    served.process.send_signal(signal.SIGINT)
    served.process.communicate(timeout=30)
    assert served.nobody_left()


def test_detach_status_stop(serve: Serve, environment: dict[str, str]) -> None:
    served = serve("--detach")
    out, _ = served.process.communicate(timeout=60)
    assert served.process.returncode == 0
    assert out.startswith("ready: ")
    table = run_biphase(environment, "status")
    assert table.returncode == 0
    for word in ("prefill-0", "decode-0", "router-0", "controller", "ready"):
        assert word in table.stdout
    second = run_biphase(environment, "serve", "--model", "smollm2", "--backend", "process", "--port", "0")
    assert second.returncode == 2
    assert f"pid {served.record.pid}" in second.stderr
    stopped = run_biphase(environment, "stop")
    assert (stopped.returncode, stopped.stdout) == (0, "stopped biphase\n")
    assert served.nobody_left()
    assert run_biphase(environment, "status").returncode == 2


def _ends_within(descriptor: int, within_s: float) -> bool:
    import select

    return bool(select.select([descriptor], [], [], within_s)[0])


def _wait_until(condition: Callable[[], bool], within_s: float = 30.0) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)  # polls a file that another process writes
