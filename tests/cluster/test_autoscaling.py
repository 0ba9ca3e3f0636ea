"""The autoscaler's shell and updates, by the real command against real processes that have no model."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from support.served import Served, pid_of, run_biphase

from biphase.protos import controller_pb2

pytestmark = pytest.mark.model
Serve = Callable[..., Served]
POLICY = """
interval_s: 0.5
window_s: 5
gpu_budget: {min: 1, max: 4}
prefill: {min_replicas: 1, max_replicas: 2}
decode: {min_replicas: 1, max_replicas: 3}
scale_up: {stabilization_s: 0, cooldown_s: 0.5, max_step: 2}
scale_down: {stabilization_s: 0.5, cooldown_s: 0.5, max_step: 1}
"""
DEPLOY = "model: smollm2\nbackend: process\nport: 0\nprefill: {replicas: 1}\ndecode: {replicas: 2}\n"


def said(*words: str) -> Callable[[controller_pb2.ClusterStatus], bool]:
    """The last decisions say all of this."""
    return lambda status: all(any(word in event.text for event in status.decisions) for word in words)


def test_a_policy_is_obeyed_reloaded_refused_and_goes_on_in_the_next_life(
    serve: Serve, environment: dict[str, str], tmp_path: Path
) -> None:
    policy, deploy = tmp_path / "policy.yaml", tmp_path / "deploy.yaml"
    policy.write_text(POLICY + "dry_run: true\n")
    deploy.write_text(DEPLOY + "autoscale: policy.yaml\n")
    served = serve(str(deploy))
    served.wait_ready()
    tried = served.wait_for(said("dry run: ", "decode"))
    assert tried.ratio == "1P:2D", "a dry run changes nothing"
    policy.write_text(POLICY.replace("max: 4", "max: 0"))
    served.wait_for(said("policy refused, the old policy stays"))
    policy.write_text(POLICY)
    after = served.wait_for(lambda status: status.ratio == "1P:1D" and status.state == "ready")
    os.kill(pid_of(after, "controller"), signal.SIGKILL)
    again = served.wait_for(lambda status: status.epoch == 2 and status.state == "ready")
    assert again.ratio == "1P:1D", "nothing is reverted"
    assert run_biphase(environment, "scale", "decode=2", "--for", "1h").returncode == 0
    served.wait_for(lambda status: status.ratio == "1P:2D" and bool(status.pinned))


def test_a_contradictory_policy_is_refused_before_anything_starts(environment: dict[str, str], tmp_path: Path) -> None:
    deploy = tmp_path / "deploy.yaml"
    deploy.write_text(DEPLOY + "autoscale: {prefill: {min_replicas: 3, max_replicas: 2}}\n")
    refused = run_biphase(environment, "serve", str(deploy))
    assert refused.returncode == 2
    assert "prefill.min_replicas is 3, more than prefill.max_replicas 2" in refused.stderr.splitlines()[-1]


def test_an_update_goes_instance_by_instance_and_pauses_at_the_first_that_fails(
    serve: Serve, environment: dict[str, str], tmp_path: Path
) -> None:
    work = tmp_path / "work"
    work.mkdir()
    deploy = tmp_path / "deploy.yaml"
    deploy.write_text(DEPLOY)
    served = serve(str(deploy), LIGHT_WORK=str(work))
    served.wait_ready()
    deploy.write_text(DEPLOY.replace("replicas: 2", "replicas: 2, max_num_seqs: 32"))
    dry = run_biphase(environment, "update", str(deploy), "--dry-run")
    assert dry.returncode == 0 and len(dry.stdout.splitlines()) == 3, dry.stderr
    (work / "crash-decode-0").touch()  # the update begins with the decode instances, there are more of them
    paused = run_biphase(environment, "update", str(deploy))
    assert paused.returncode == 1
    assert paused.stdout.splitlines()[-1].startswith("update is paused: decode-0 does not come up in generation ")
    (work / "crash-decode-0").unlink()
    back = served.wait_for(lambda status: status.state == "ready")
    assert len({it.generation for it in back.processes if it.generation}) == 1
    done = run_biphase(environment, "update", str(deploy))
    assert done.returncode == 0, done.stdout
    assert done.stdout.splitlines()[-1].startswith("update is done")
    after = served.wait_for(lambda status: status.state == "ready")
    assert {it.generation for it in after.processes if it.generation} != {
        it.generation for it in back.processes if it.generation
    }
    for was, now, said in (
        ("port: 0", "port: 1", "port is 1, it was 0"),
        ("backend", "max_replays: 5\nbackend", "is 5"),
    ):
        deploy.write_text(DEPLOY.replace(was, now))
        refused = run_biphase(environment, "update", str(deploy))
        assert refused.returncode == 2 and f"{said}" in refused.stderr and "cannot change it" in refused.stderr


def test_an_update_takes_over_counts_unless_they_are_pinned(
    serve: Serve, environment: dict[str, str], tmp_path: Path
) -> None:
    deploy = tmp_path / "deploy.yaml"
    deploy.write_text(DEPLOY)
    served = serve(str(deploy))
    served.wait_ready()
    deploy.write_text(DEPLOY.replace("prefill: {replicas: 1}", "prefill: {replicas: 2}"))
    dry = run_biphase(environment, "update", str(deploy), "--dry-run")
    assert dry.stdout.splitlines() == [
        "no instance starts anew, the other settings are taken over",
        "then a new prefill instance starts",
    ]
    done = run_biphase(environment, "update", str(deploy))
    assert done.returncode == 0 and done.stdout.splitlines()[-1].endswith("; a new prefill instance starts"), (
        done.stdout
    )
    served.wait_for(lambda status: status.ratio == "2P:2D" and status.state == "ready")
    assert run_biphase(environment, "scale", "decode=1").returncode == 0
    served.wait_for(lambda status: status.ratio == "2P:1D" and status.state == "ready")
    deploy.write_text(DEPLOY)
    kept = run_biphase(environment, "update", str(deploy))
    assert "prefill=1 decode=2 is not taken over: counts are pinned" in kept.stdout, kept.stdout
    assert run_biphase(environment, "update", str(deploy)).stdout == "nothing changes\n"
    assert run_biphase(environment, "scale", "auto").returncode == 0
    served.wait_for(lambda status: status.ratio == "1P:2D" and status.state == "ready")
