"""Stragglers: who is out at equal work, who never is, trials with backoff, and the end of what has stopped."""

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.scaling import DECODE_STEP

from biphase.planner.reports import InstanceReport
from biphase.planner.stragglers import Heard, Rules, StragglerState, Verdict, judge
from biphase.protos.step_time import RecentSteps, StepTime

RULES = Rules(slow_s=10.0, probe_after_s=10.0, probe_s=15.0, stopped_s=3.0, replace_after_s=30.0)


class Fleet:
    """Decode instances whose steps take so many times what they should; a look every second."""

    def __init__(self, factors: dict[str, float]) -> None:
        self.factors = factors
        self.stopped: set[str] = set()
        self.state = StragglerState()
        self.now_s = 0.0
        self.steps = 0
        self.said: list[str] = []
        self.frozen: dict[str, Heard] = {}

    def report(self, name: str, factor: float) -> InstanceReport:
        batch = 4 if name.endswith("0") else 16  # unequal work: only equal work is compared
        work = RecentSteps(num_steps=50, tokens=50 * batch, context_tokens=50 * batch * 200)
        own = replace(DECODE_STEP, fixed_s=DECODE_STEP.fixed_s * factor, per_token_s=DECODE_STEP.per_token_s * factor)
        return InstanceReport(
            name=name,
            role="decode",
            num_steps=self.steps,
            running=3,
            decode_step=own,
            recent=replace(work, seconds=factor * work.expected_s(DECODE_STEP)),
        )

    def look(self, seconds: int = 1) -> Verdict:
        for _ in range(seconds):
            self.now_s += 1.0
            self.steps += 20
            heard = []
            for name, factor in self.factors.items():
                fresh = Heard(report=self.report(name, factor), at_s=self.now_s)
                if name not in self.stopped:
                    self.frozen[name] = fresh
                heard.append(self.frozen[name])
            verdict, self.state = judge(heard, self.state, self.now_s, RULES)
            assert StragglerState.from_json(self.state.to_json()) == self.state
            self.said += verdict.reasons
        return verdict


def test_three_times_the_median_at_equal_work_for_ten_seconds_is_out() -> None:
    fleet = Fleet({"decode-0": 1.0, "decode-1": 1.1, "decode-2": 4.0})
    assert fleet.look(10).out == ()
    verdict = fleet.look(2)
    assert verdict.out == ("decode-2",)
    assert verdict.health == {"decode-2": "slow"}
    (said,) = fleet.said
    assert said.startswith("decode-2 gets no work: its steps take ") and said.endswith("tried again in 10 s")


def test_a_slow_moment_is_forgiven_and_less_than_three_times_is_none() -> None:
    fleet = Fleet({"decode-0": 1.0, "decode-1": 1.0, "decode-2": 4.0})
    fleet.look(8)
    fleet.factors["decode-2"] = 2.5
    assert fleet.look(60).out == ()
    assert fleet.said == []


def test_one_peer_is_no_jury() -> None:
    fleet = Fleet({"decode-0": 1.0, "decode-1": 50.0})
    assert fleet.look(60).out == ()


def test_never_more_than_half_are_out() -> None:
    fleet = Fleet({"decode-0": 1.0, "decode-1": 1.0, "decode-2": 1.0, "decode-3": 9.0, "decode-4": 9.0})
    assert fleet.look(15).out == ("decode-3", "decode-4")
    fleet.factors = {"decode-0": 9.0, "decode-1": 9.0, "decode-2": 1.0}
    fleet.state = StragglerState()
    assert len(fleet.look(40).out) <= 1


def test_trials_come_later_each_time_and_one_that_is_well_stays() -> None:
    fleet = Fleet({"decode-0": 1.0, "decode-1": 1.0, "decode-2": 5.0})
    waits, last_s = [], None
    for _ in range(200):
        verdict = fleet.look()
        if "decode-2" in verdict.out and last_s is None:
            last_s = fleet.now_s
        if verdict.probing and last_s is not None:
            waits.append(fleet.now_s - last_s)
            last_s = None
    assert waits == [10.0, 20.0, 40.0]
    fleet.factors["decode-2"] = 1.0
    fleet.look(200)
    assert fleet.said[-1].startswith("decode-2 is well again: its steps take 1.0 times")
    assert fleet.state.records["decode-2"].times_out == 0


def test_what_has_stopped_is_out_at_once_then_ended() -> None:
    fleet = Fleet({"decode-0": 1.0, "decode-1": 1.0})
    fleet.look(5)
    fleet.stopped.add("decode-1")
    assert fleet.look(3).out == ()
    verdict = fleet.look(2)
    assert (verdict.out, verdict.health) == (("decode-1",), {"decode-1": "stopped"})
    assert fleet.look(23).kill == ()
    verdict = fleet.look(3)
    assert verdict.kill == ("decode-1",)
    assert "decode-1 is ended and replaced: no step or no word for 3" in fleet.said[-1]


def test_the_last_of_a_role_that_has_stopped_stays_in_and_is_ended_all_the_same() -> None:
    fleet = Fleet({"decode-0": 1.0})
    fleet.look(5)
    fleet.stopped.add("decode-0")
    verdict = fleet.look(40)
    assert (verdict.out, verdict.kill) == ((), ("decode-0",))


def test_a_judge_that_stood_still_itself_ends_nobody() -> None:
    fleet = Fleet({"decode-0": 1.0, "decode-1": 1.0, "decode-2": 1.0})
    fleet.look(5)
    fleet.stopped = set(fleet.factors)
    fleet.now_s += 100.0
    verdict = fleet.look(1)
    assert (verdict.kill, verdict.out, verdict.health) == ((), (), {})
    fleet.stopped = set()
    assert fleet.look(10).health == {}


def test_an_idle_instance_has_not_stopped_and_a_new_life_has_a_clean_record() -> None:
    idle = InstanceReport(name="decode-0", role="decode", num_steps=7)
    state = StragglerState()
    for second in range(100):
        verdict, state = judge([Heard(report=idle, at_s=float(second))], state, float(second), RULES)
        assert verdict == Verdict()
    busy = replace(idle, running=1)
    for second in range(100, 110):
        hangs = replace(busy, step_s=float(second - 100), step_expected_s=0.1)
        verdict, state = judge([Heard(report=hangs, at_s=float(second))], state, float(second), RULES)
    assert verdict.health == {"decode-0": "stopped"}
    verdict, state = judge([Heard(report=replace(busy, incarnation=2), at_s=111.0)], state, 111.0, RULES)
    assert verdict.health == {}


@pytest.mark.parametrize(
    ("report", "stopped_at_s"),
    [
        (lambda second: InstanceReport(name="decode-0", role="decode", running=3, queued=2, num_steps=7), None),
        (lambda second: step_of(second, expected_s=0.05), 4),
        (lambda second: step_of(second, expected_s=3.0), 10),
        (lambda second: step_of(second, expected_s=0.0), 21),
        (lambda second: step_of(second % 9, expected_s=3.0), None),
    ],
    ids=["waits for KV", "a short step", "a long step", "the first of its kind", "one long step after the other"],
)
def test_a_step_has_its_time_and_who_has_none_to_take_has_not_stopped(
    report: Callable[[int], InstanceReport], stopped_at_s: int | None
) -> None:
    """A prefill of a long prompt on a slow host takes seconds; a decode instance may wait for KV for as long."""
    state, found = StragglerState(), None
    for second in range(40):
        verdict, state = judge([Heard(report=report(second), at_s=float(second))], state, float(second), RULES)
        if verdict.health and found is None:
            found = second
    assert found == stopped_at_s


def step_of(step_s: int, *, expected_s: float) -> InstanceReport:
    return InstanceReport(
        name="decode-0", role="decode", running=3, step_s=float(step_s), step_expected_s=expected_s, num_steps=7
    )


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0.2, 50.0), min_size=1, max_size=7), st.lists(st.integers(0, 6), max_size=3))
def test_somebody_is_always_left(factors: list[float], stopped: list[int]) -> None:
    fleet = Fleet({f"decode-{index}": factor for index, factor in enumerate(factors)})
    fleet.look(2)
    fleet.stopped = {f"decode-{index}" for index in stopped if index < len(factors)}
    for _ in range(40):
        verdict = fleet.look()
        assert 2 * len(verdict.out) <= len(factors) and len(verdict.out) < len(factors)


def test_unknown_step_times_judge_nobody() -> None:
    reports = [
        InstanceReport(
            name=f"decode-{i}", role="decode", decode_step=StepTime(), recent=RecentSteps(num_steps=9, seconds=9)
        )
        for i in range(3)
    ]
    verdict, _ = judge([Heard(report=report, at_s=0.0) for report in reports], StragglerState(), 0.0)
    assert verdict == Verdict()


def test_where_the_others_die_those_that_are_out_are_let_back_the_least_slow_first() -> None:
    fleet = Fleet({"decode-0": 1.0, "decode-1": 1.0, "decode-2": 1.0, "decode-3": 4.0, "decode-4": 9.0})
    assert fleet.look(15).out == ("decode-3", "decode-4")
    del fleet.factors["decode-0"], fleet.factors["decode-1"]
    assert fleet.look().out == ("decode-4",)
    assert fleet.said[-1] == "decode-3 gets work again though it is slow: only 3 of its role are left"
    del fleet.factors["decode-2"], fleet.factors["decode-3"]
    verdict = fleet.look()
    assert (verdict.out, verdict.health) == ((), {})
    assert fleet.said[-1] == "decode-4 gets work again though it is slow: nobody else of its role is left"
    said = len(fleet.said)
    assert fleet.look(60).out == ()
    assert len(fleet.said) == said
    fleet.factors |= {"decode-5": 1.0, "decode-6": 1.0}
    fleet.look(5)
    assert fleet.look(10).out == ("decode-4",), "judged anew once there is a jury"


def test_one_that_is_slow_is_let_back_before_one_that_has_stopped() -> None:
    fleet = Fleet({"decode-0": 1.0, "decode-1": 1.0, "decode-2": 9.0, "decode-3": 1.0})
    assert fleet.look(12).out == ("decode-2",)
    fleet.stopped.add("decode-3")
    fleet.look(5)
    assert set(fleet.look().out) == {"decode-2", "decode-3"}
    del fleet.factors["decode-0"]
    assert fleet.look().out == ("decode-3",)
