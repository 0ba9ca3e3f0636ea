"""`biphase serve --detach --wait`: up means that the controller is; the same again changes nothing, another is refused."""

import os
import signal
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from support.served import Served, run_biphase

from biphase.cluster.deployment import Deployment
from biphase.cluster.run_dir import RunDir, ServeRecord, started_ticks
from biphase.cluster.served_already import leave_or_take
from biphase.protos.errors import SetupError

WAIT = ("serve", "--model", "smollm2", "--backend", "process", "--port", "0", "--detach", "--wait", "60")


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path / "run" / "biphase")


def end(run_dir: RunDir, environment: dict[str, str]) -> None:
    assert run_biphase(environment, "stop", "--now").returncode == 0
    record = run_dir.record()
    assert record is not None and started_ticks(record.pid) is None


@pytest.mark.model
def test_up_then_already_up_then_another_is_refused(environment: dict[str, str], run_dir: RunDir) -> None:
    first = run_biphase(environment, *WAIT)
    assert first.stdout.startswith("up: biphase, "), first.stderr
    record = run_dir.record()
    assert record is not None and record.controller_address in first.stdout
    try:
        again = run_biphase(environment, *WAIT)
        assert (again.returncode, again.stdout.partition(",")[0]) == (0, "already up: biphase")
        now = run_dir.record()
        assert now is not None and now.pid == record.pid
        other = run_biphase(environment, *WAIT, "--max-num-seqs", "3")
        assert other.returncode == 2
        assert (
            "is served already, as another deploy file describes it: `biphase update FILE` changes it" in other.stderr
        )
        assert len(other.stderr.strip().splitlines()) == 1
    finally:
        end(run_dir, environment)


@pytest.mark.model
def test_after_an_update_the_new_file_is_what_is_served(
    environment: dict[str, str], run_dir: RunDir, tmp_path: Path
) -> None:
    old, new = tmp_path / "old.yaml", tmp_path / "new.yaml"
    old.write_text("model: smollm2\nbackend: process\nport: 0\n")
    new.write_text("model: smollm2\nbackend: process\nport: 0\nstart_timeout_s: 77\n")
    assert run_biphase(environment, "serve", str(old), "--detach").stdout.startswith("ready: ")
    try:
        again = run_biphase(environment, "serve", str(old), "--detach")
        assert (again.returncode, again.stdout.partition(",")[0]) == (0, "already up: biphase")
        other = run_biphase(environment, "serve", str(new), "--detach")
        assert other.returncode == 2
        assert f"`biphase update {new}` changes it" in other.stderr
        assert len(other.stderr.strip().splitlines()) == 1
        updated = run_biphase(environment, "update", str(new))
        assert updated.returncode == 0, updated.stderr
        assert run_biphase(environment, "serve", str(new), "--detach").returncode == 0
        assert run_biphase(environment, "serve", str(old), "--detach").returncode == 2
    finally:
        end(run_dir, environment)


@pytest.mark.model
@pytest.mark.slow
def test_a_supervisor_without_a_controller_is_replaced(environment: dict[str, str], run_dir: RunDir) -> None:
    assert run_biphase(environment, *WAIT).returncode == 0
    record = run_dir.record()
    assert record is not None
    served = Served(run_dir.path.parent, None)  # type: ignore[arg-type]
    status = served.wait_for(lambda status: status.state == "ready")
    controller = next(process.pid for process in status.processes if process.kind == "controller")
    os.kill(record.pid, signal.SIGSTOP)  # it cannot start another controller, as one whose cluster is gone cannot
    os.kill(controller, signal.SIGKILL)
    again = run_biphase(environment, *WAIT, within_s=120.0)
    try:
        assert again.stdout.startswith("up: biphase, "), again.stderr
        now = run_dir.record()
        assert now is not None and now.pid != record.pid
        assert started_ticks(record.pid) is None
    finally:
        end(run_dir, environment)


def supervised(run_dir: RunDir, deployment: Deployment, cut: Path) -> "subprocess.Popen[bytes]":
    """Whoever holds the name's lock, with no controller. It writes ``cut`` when it is told to end everything."""
    lock = run_dir.lock()
    run_dir.prepare(deployment)
    command = f'trap "touch {cut}; exit" USR1; echo; while :; do sleep 0.05; done'
    process = subprocess.Popen(["bash", "-c", command], pass_fds=(lock,), stdout=subprocess.PIPE)
    os.close(lock)
    assert process.stdout is not None and process.stdout.readline() == b"\n"
    ticks = started_ticks(process.pid)
    assert ticks is not None
    record = ServeRecord(name=deployment.name, pid=process.pid, started_ticks=ticks, backend=deployment.backend)
    run_dir.write_record(record)
    return process


@pytest.mark.parametrize(("address", "cuts"), [("10.0.0.1:6379", False), ("", True)])
def test_a_supervisor_that_is_replaced_ends_nothing_that_outlives_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str, cuts: bool
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    deployment, cut = Deployment(model="/models/a", name="x", backend="ray"), tmp_path / "cut"
    with supervised(RunDir(tmp_path / "x"), deployment, cut) as process:
        found = leave_or_take(RunDir(tmp_path / "x"), deployment, 0.01)
        assert isinstance(found, int)
        os.close(found)
        process.wait(10)
    assert cut.exists() == cuts


def test_detach_compares_with_what_is_served_and_ends_nobody(tmp_path: Path) -> None:
    deployment = Deployment(model="/models/a", name="x", served_model_name="a")
    run_dir = RunDir(tmp_path / "x")
    with supervised(run_dir, deployment, tmp_path / "cut") as process:
        assert leave_or_take(run_dir, deployment, None) == run_dir.record()
        unnamed = replace(deployment, served_model_name="b")
        assert leave_or_take(run_dir, unnamed, None, named=False) == run_dir.record()
        for other in (unnamed, replace(deployment, drain_s=1.0)):
            with pytest.raises(SetupError, match="`biphase update /a/b.yaml` changes it"):
                leave_or_take(run_dir, other, None, file="/a/b.yaml")
        run_dir.note_deployment(unnamed)  # as the controller does when an update is taken over
        assert leave_or_take(run_dir, unnamed, None) == run_dir.record()
        record = run_dir.record()
        assert record is not None
        run_dir.write_record(replace(record, state="stopping"))
        with pytest.raises(SetupError, match="already served by pid"):
            leave_or_take(run_dir, unnamed, None)
        assert process.poll() is None
        process.kill()


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (("--wait", "5"), "--wait goes with --detach"),
        (("--detach", "--wait", "0"), "--wait is 0: above 0 and at most 86400 seconds"),
    ],
)
def test_a_wait_that_makes_no_sense_is_refused(environment: dict[str, str], flags: tuple[str, ...], line: str) -> None:
    refused = run_biphase(environment, "serve", "--model", "smollm2", *flags)
    assert refused.returncode == 2
    assert line in refused.stderr
