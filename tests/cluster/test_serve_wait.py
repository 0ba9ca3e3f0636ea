"""`biphase serve --detach --wait`: up means that the controller is; the same again changes nothing, another is refused."""

import os
import signal
from pathlib import Path

import pytest
from support.served import Served, run_biphase

from biphase.cluster.run_dir import RunDir, started_ticks

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
        assert "is served already, as another deploy file describes it: `biphase update` changes it" in other.stderr
        assert len(other.stderr.strip().splitlines()) == 1
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
