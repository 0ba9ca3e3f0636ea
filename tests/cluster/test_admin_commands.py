"""What people ask of a running deployment, by the real command against real processes that have no model."""

import json
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from support.served import BIPHASE, Served, is_ready, pid_of, run_biphase

from biphase.protos import controller_pb2

pytestmark = pytest.mark.model
Serve = Callable[..., Served]
Status = controller_pb2.ClusterStatus


def roles(status: Status) -> dict[str, str]:
    return {it.name: it.kind for it in status.processes if it.kind in ("prefill", "decode") and it.state == "ready"}


def are(wanted: dict[str, str]) -> Callable[[Status], bool]:
    """All is ready, and the instances are these, in these roles."""
    return lambda status: status.state == "ready" and roles(status) == wanted


def state_of(name: str, state: str) -> Callable[[Status], bool]:
    return lambda status: any(it.name == name and it.state == state for it in status.processes)


def test_scale_flip_drain_cordon_and_what_is_refused(serve: Serve, environment: dict[str, str], tmp_path: Path) -> None:
    served = serve("--prefill", "1", "--decode", "2")
    served.wait_ready()
    decode_pid = pid_of(served.wait_for(is_ready("decode-1", 1)), "decode-1")

    def biphase(*words: str) -> str:
        done = run_biphase(environment, *words)
        assert done.returncode == 0, (words, done.stderr, served.logs())
        return done.stdout

    def refused(*words: str) -> str:
        done = run_biphase(environment, *words)
        assert done.returncode == 2, (words, done.stdout, done.stderr)
        return done.stderr.splitlines()[-1]

    # roles turn in place: the same process, another role and incarnation
    assert "decode-1 turns to prefill" in biphase("scale", "prefill=2", "decode=1")
    turned = served.wait_for(are({"prefill-0": "prefill", "decode-0": "decode", "decode-1": "prefill"}))
    assert pid_of(turned, "decode-1") == decode_pid
    assert next(it.incarnation for it in turned.processes if it.name == "decode-1") == 2
    assert turned.pinned.startswith("scaled by hand to prefill 2, decode 1, until")
    assert turned.ratio == "2P:1D"

    # what would leave nobody who serves, and what is not there
    assert refused("drain", "decode-0").startswith("biphase: a drain of decode-0 is refused: no decode instance")
    assert "a flip of decode-0 is refused" in refused("flip", "decode-0")
    assert "did you mean decode-0?" in refused("flip", "decod-0")
    assert "decode is 0: at least 1" in refused("scale", "decode=0")
    assert "unknown role prefil: did you mean prefill?" in refused("scale", "prefil=2")
    assert "no node is called nowhere" in refused("cordon", "nowhere")
    assert "one of both" in refused("drain")
    node = next(it.node for it in turned.processes if it.name == "decode-0")
    assert f"a drain of {node} is refused" in refused("drain", "--node", node)

    # more, and fewer again
    assert "a new decode instance starts" in biphase("scale", "decode=2", "--for", "10m")
    served.wait_for(are({"prefill-0": "prefill", "decode-0": "decode", "decode-1": "prefill", "decode-2": "decode"}))
    biphase("drain", "decode-2", "--wait")
    assert "already draining" in refused("drain", "decode-2")
    assert "already draining" in refused("flip", "decode-2")
    biphase("drain", "decode-2", "--undo")
    served.wait_for(are({"prefill-0": "prefill", "decode-0": "decode", "decode-1": "prefill", "decode-2": "decode"}))
    assert "drains and stops" in biphase("scale", "prefill=1", "decode=2")
    status = served.wait_for(lambda status: status.state == "ready" and len(roles(status)) == 3)
    assert sorted(roles(status).values()) == ["decode", "decode", "prefill"]

    # without a policy, auto is what the deployment says
    assert "the deployment's own counts" in biphase("scale", "auto")
    assert served.wait_for(lambda status: status.state == "ready").pinned == ""

    biphase("cordon", node)
    assert "cordoned already" in refused("cordon", node)
    biphase("cordon", node, "--undo")

    table = biphase("status")
    for word in ("role", "idle", "1P:2D", "last decisions:", "scaled by hand"):
        assert word in table
    document = json.loads(biphase("status", "--json"))
    assert {it["legs"] for it in document["processes"]} == {0}
    assert {it["role"] for it in document["processes"]} == {"prefill", "decode", ""}
    assert document["decisions"] and document["epoch"] == 1
    events = biphase("events")
    for word in ("scaled by hand to prefill 2, decode 1", "has turned from decode to prefill", "refused"):
        assert word in events
    assert len(biphase("logs", "controller", "--tail", "3").splitlines()) == 3
    assert "no process is called decod-0: did you mean decode-0?" in refused("logs", "decod-0")
    without_ray = run_biphase(environment, "scale", "auto", "--controller", served.record.controller_address)
    assert without_ray.returncode == 0, without_ray.stderr


def test_a_controller_killed_in_a_drain_and_in_a_scale_goes_on(
    serve: Serve, environment: dict[str, str], tmp_path: Path
) -> None:
    work = tmp_path / "work"
    work.mkdir()
    served = serve("--prefill", "1", "--decode", "3", LIGHT_WORK=str(work))
    served.wait_ready()
    for name in ("decode-0", "decode-1", "decode-2"):
        (work / name).touch()  # each has a request that runs
    waiting = subprocess.Popen(
        [*BIPHASE, "drain", "decode-0", "--grace", "300", "--wait"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    served.wait_for(state_of("decode-0", "draining"))
    assert run_biphase(environment, "scale", "prefill=1", "decode=2", "--for", "1h").returncode == 0
    before = served.wait_for(lambda status: state_of("decode-0", "draining")(status) and _num(status, "draining") == 2)
    leaving = [it.name for it in before.processes if it.state == "draining"]
    os.kill(pid_of(before, "controller"), signal.SIGKILL)
    after = served.wait_for(
        lambda status: status.epoch == 2 and status.state == "ready" and _num(status, "draining") == 2
    )
    assert [it.name for it in after.processes if it.state == "draining"] == leaving
    assert after.pinned.startswith("scaled by hand")
    for name in ("prefill-0", "decode-0", "decode-1", "decode-2"):
        assert pid_of(after, name) == pid_of(before, name), "nothing is reverted, nothing is started anew"
    assert waiting.poll() is None, "a request is aboard still"
    for name in leaving:
        (work / name).unlink()
    output, progress = waiting.communicate(timeout=30)
    assert waiting.returncode == 0 and "nothing runs on decode-0 any more" in output, progress
    assert "decode-0 has 1 request aboard; what is left in " in progress
    served.wait_for(
        lambda status: status.state == "ready" and "decode-2" not in roles(status) and _num(status, "draining") <= 1
    )
    kinds = [line.split()[3] for line in run_biphase(environment, "events").stdout.splitlines()]
    assert {"drain", "scale", "start"} <= set(kinds), "events outlive the controller"
    numbers = [int(line.split()[0]) for line in run_biphase(environment, "events").stdout.splitlines()]
    assert numbers == list(range(1, len(numbers) + 1))


def _num(status: Status, state: str) -> int:
    return sum(it.state == state for it in status.processes)
