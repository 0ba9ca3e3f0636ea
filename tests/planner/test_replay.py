"""Histories and their replay: what a policy would have done, by the function and by the command."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from support.queueing import QueueingModel, Traffic
from support.scaling import DECODE_STEP, POLICY, PREFILL_STEP
from support.sources import ROOT

from biphase.cluster.cli import main
from biphase.planner.autoscaler_state import FlipInstance, StartInstance
from biphase.planner.history import Moment, moment_line, read_history, setup_line
from biphase.planner.policy import GpuBudget
from biphase.planner.ratio import Ratio
from biphase.planner.replay import Replay
from biphase.planner.reports import InstanceReport, Member, Room, RouterReport
from biphase.protos.errors import SetupError

HISTORY = ROOT / "examples" / "history.jsonl"
POLICY_FILE = ROOT / "examples" / "policy.yaml"


def make_history() -> list[str]:
    model = QueueingModel(
        lambda now_s: Traffic(0.5 if now_s < 60 else 7.0, 400, 20),
        Ratio(prefill=1, decode=1),
        prefill_step=PREFILL_STEP,
        decode_step=DECODE_STEP,
    )
    return model.history(150.0, unix_s=1.8e9, every_s=5.0)


def test_a_moment_comes_back_as_it_was_written() -> None:
    moment = Moment(
        unix_s=5.0,
        members=(Member(name="prefill-0", role="prefill", phase="starting", age_s=3.0, node="a"),),
        room=Room(prefill=2, decode=1, can_grow=True),
        reports=(
            RouterReport(name="router-0", incarnation=2, offered_requests=3, ended={"finished": 2}),
            InstanceReport(name="decode-0", role="decode", decode_step=DECODE_STEP, busy_s=1.5),
        ),
    )
    model = QueueingModel(
        lambda _: Traffic(1, 1, 1), Ratio(prefill=1, decode=1), prefill_step=PREFILL_STEP, decode_step=DECODE_STEP
    )
    setup, moments = read_history([setup_line(model.setup), moment_line(moment)], source="x")
    assert setup == model.setup
    assert list(moments) == [moment]


def test_what_it_would_have_done_follows_its_own_decisions() -> None:
    setup, moments = read_history(make_history(), source="x")
    done = list(Replay(POLICY, setup, start_s=20.0).run(moments))
    starts = [(item.at_s, a) for item in done for a in item.decision.actions]
    assert starts == [(70.0, StartInstance(role="prefill"))]
    assert (done[-1].decision.current, done[-1].recorded) == (Ratio(prefill=2, decode=1), Ratio(prefill=1, decode=1))


def test_as_recorded_it_says_the_same_over_and_over() -> None:
    setup, moments = read_history(make_history(), source="x")
    done = list(Replay(POLICY, setup, follow=False).run(moments))
    assert {item.decision.current for item in done} == {Ratio(prefill=1, decode=1)}
    assert sum(bool(item.decision.actions) for item in done) > 5


def test_another_setup_in_the_middle_is_obeyed_from_there_on() -> None:
    lines = make_history()
    setup, moments = read_history(lines, source="x")
    (stays,) = {item.decision.target for item in Replay(POLICY, setup, start_s=20.0).run(moments) if item.at_s > 80}
    half = [index for index, line in enumerate(lines) if index and json.loads(line)["unix_s"] <= 1.8e9 + 60][-1] + 1
    wide = replace(setup, prefill=replace(setup.prefill, gpus=8.0))  # the budget holds no second one
    for at, target in ((half, Ratio(prefill=1, decode=1)), (len(lines), stays)):
        changed = [*lines[:at], setup_line(wide), *lines[at:]]
        first, moments = read_history(changed, source="x")
        done = list(Replay(replace(POLICY, gpu_budget=GpuBudget(max=9.0)), first, start_s=20.0).run(moments))
        assert first == setup
        assert done[-1].decision.target == target


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "x: an empty file holds no history"),
        (["{}"], "x:1: this is no history of signals, whose first line is {'setup': ...}"),
        ([make_history()[0], '{"setup": {}}'], "x:2: not a moment of a history: 'prefill'"),
        ([make_history()[0], "{"], "x:2: not a moment of a history: Expecting property name"),
        ([make_history()[0], '{"unix_s": 1, "members": [], "reports": [{"kind": "cat"}]}'], "x:2: not a moment.*'cat'"),
        (
            [make_history()[0], *['{"unix_s": 1, "members": [], "reports": []}'] * 2],
            "x:3: unix_s is 1, not after 1 of the line before",
        ),
    ],
)
def test_what_is_no_history_is_said_in_one_line(lines: list[str], message: str) -> None:
    with pytest.raises(SetupError, match=message):
        setup, moments = read_history(lines, source="x")
        list(Replay(POLICY, setup).run(moments))


def test_the_command_prints_decisions_and_a_sum(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["autoscale", "replay", "--policy", str(POLICY_FILE), "--signals", str(HISTORY)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any("schedule working hours is on" in line for line in lines)
    assert any("2P:2D -> 1P:1D    stop prefill-0" in line for line in lines)
    assert lines[-1].startswith("90 decisions over 14.8 minutes, ")


def test_the_command_gives_json_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["autoscale", "replay", "--policy", str(POLICY_FILE), "--signals", str(HISTORY), "--json"]) == 0
    first = json.loads(capsys.readouterr().out.splitlines()[0])
    assert first["current"] == {"prefill": 2, "decode": 2}


def test_the_command_refuses_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["autoscale", "replay", "--policy", str(POLICY_FILE), "--signals", str(tmp_path / "none")]) == 2
    assert "cannot read history" in capsys.readouterr().err
    setup, *rest = HISTORY.read_text().splitlines()
    values = json.loads(setup)
    values["setup"]["prefill"]["gpus"] = 8.0
    (tmp_path / "big.jsonl").write_text("\n".join([json.dumps(values), *rest]))
    assert main(["autoscale", "replay", "--policy", str(POLICY_FILE), "--signals", str(tmp_path / "big.jsonl")]) == 2
    error = capsys.readouterr().err
    assert error.endswith("gpu_budget.max is 8, and the 1 prefill and 1 decode instances of min_replicas take 9 GPUs\n")
    with pytest.raises(SystemExit):
        main(["autoscale"])


def test_a_policy_for_fewer_gpus_does_less() -> None:
    setup, moments = read_history(HISTORY.read_text().splitlines(), source="x")
    small = replace(POLICY, gpu_budget=replace(POLICY.gpu_budget, max=2.0))
    assert all(item.decision.current.gpus(setup) <= 4 for item in Replay(small, setup).run(moments))


@pytest.mark.parametrize(("plan", "looks_under_way"), [("tp 1 x pp 1", []), ("tp 1 x pp 2", [35.0, 40.0, 45.0, 50.0])])
def test_a_turn_takes_a_flip_in_place_or_a_rebuild(plan: str, looks_under_way: list[float]) -> None:
    model = QueueingModel(
        lambda _: Traffic(7.0, 400, 20),
        Ratio(prefill=1, decode=2),
        prefill_step=PREFILL_STEP,
        decode_step=DECODE_STEP,
    )
    setup, moments = read_history(model.history(150.0, unix_s=1.8e9, every_s=5.0), source="x")
    cut = replace(setup, decode=replace(setup.decode, plan=plan), rebuild_s=25.0)
    policy = replace(POLICY, gpu_budget=GpuBudget(max=3.0))
    done = list(Replay(policy, cut).run(replace(moment, setup=None) for moment in moments))
    turned_s = [item.at_s for item in done if any(isinstance(a, FlipInstance) for a in item.decision.actions)]
    flipping_s = [item.at_s for item in done if any(member.phase == "flipping" for member in item.signals.members)]
    assert turned_s == [30.0]
    assert flipping_s == looks_under_way
