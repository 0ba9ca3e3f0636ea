"""What bench/live_shift.py makes of what it measured."""

import math
from typing import Any

import pytest
import shift_plot
from report import Report
from shift_judge import (
    PHASE_S,
    Arm,
    Look,
    Turn,
    fewest_in_window,
    judge,
    parts_of,
    phases_run,
    reversals,
    settled_ratios,
    turn_of,
)
from shift_shape import decode_step, first_tokens_per_s, length_for, tokens_between

from biphase.client.bench.arrivals import Arrival, Phase
from biphase.client.bench.lengths import fixed
from biphase.client.bench.measured import DONE, Measured

GOALS = {"ttft": 100.0}
NAMES = ("prefill-heavy", "decode-heavy", "prefill-heavy")


def test_a_change_that_is_taken_back_at_once_is_a_reversal() -> None:
    there_and_back = [(0.0, 2, 1), (40.0, 1, 1), (41.0, 1, 2), (60.0, 1, 1), (61.0, 2, 1)]
    assert settled_ratios(there_and_back) == [(0.0, 2, 1), (41.0, 1, 2), (61.0, 2, 1)]
    assert reversals(there_and_back) == 1
    assert reversals([(0.0, 2, 1), (41.0, 1, 2), (90.0, 2, 1)]) == 0


# -- drain and turn


def look(asked_s: float, role: str, state: str, since_s: float, legs: int = 0) -> Look:
    return Look(asked_unix_s=asked_s, role=role, state=state, since_unix_s=since_s, legs=legs)


BEFORE = look(99.9, "prefill", "ready", 5.0, 3)


def test_a_drain_ends_with_the_last_request_and_the_turn_when_a_router_may_use_it() -> None:
    looks = [
        BEFORE,
        look(100.1, "prefill", "draining", 100.05, 3),
        look(104.0, "prefill", "draining", 100.05, 1),
        look(104.1, "prefill", "draining", 100.05, 0),
        look(104.2, "decode", "connecting", 104.15),
        look(104.6, "decode", "ready", 104.5),
        look(108.0, "decode", "ready", 104.5, 7),
    ]
    turn = turn_of("prefill-0", 100.0, looks)
    assert (turn.drain_s, turn.turn_s) == (pytest.approx(4.0), pytest.approx(0.5))


def test_an_idle_instance_turns_from_the_order_on() -> None:
    turn = turn_of("p", 100.0, [look(99.9, "prefill", "ready", 5.0), look(100.4, "decode", "ready", 100.3)])
    assert (turn.drain_s, turn.turn_s) == (0.0, pytest.approx(0.3))


def test_one_that_has_not_turned_has_taken_for_ever() -> None:
    never = Turn(name="p", drain_s=math.inf, turn_s=math.inf)
    assert turn_of("p", 100.0, [BEFORE, look(100.1, "prefill", "draining", 100.0, 2)]) == never
    assert turn_of("p", 100.0, []) == never


# -- goals


def phases(seconds: float = PHASE_S) -> list[Phase]:
    of: dict[str, Any] = {"seconds": seconds, "rate": 2.0, "rate_end": 2.0, "burstiness": 1.0}
    return [Phase(name=name, input_tokens=fixed(1), output_tokens=fixed(1), **of) for name in NAMES]


def arm(name: str, slow: "set[int] | frozenset[int]" = frozenset(), seconds: float = PHASE_S, **values: Any) -> Arm:
    """Two requests a second; those of the phases in ``slow`` miss their goal."""
    measured = []
    for index in range(int(6 * seconds)):
        due_s = index / 2
        ttft_s = 1.0 if int(due_s / seconds) in slow else 0.05
        measured.append(
            Measured(
                index=index,
                phase=0,
                due_s=due_s,
                sent_s=due_s,
                ended_s=due_s + ttft_s,
                token_at_s=(due_s + ttft_s,),
                input_tokens=1,
                asked_tokens=1,
                kind=DONE,
            )
        )
    return Arm(**{"name": name, "headroom": 0.3, "measured": measured, **values})


def good() -> list[Arm]:
    ratios = [(0.0, 2, 1), (160.0, 1, 2), (310.0, 2, 1)]
    turns = [Turn(name="p", drain_s=2.0, turn_s=0.4)] * 2
    return [arm("auto", ratios=ratios, turns=turns), arm("2P1D", {1}), arm("1P2D", {0, 2})]


def missed(arms: list[Arm], seconds: float = PHASE_S) -> set[str]:
    found = Report("live_shift", ())
    judge(found, arms, GOALS, phases(seconds))  # type: ignore[arg-type]
    return {goal.name for goal in found.goals if not goal.met}


def test_a_good_run_meets_every_goal() -> None:
    assert missed(good()) == set()


@pytest.mark.parametrize(
    ("values", "goal"),
    [
        ({"turns": []}, "flip_turn_worst_s"),
        ({"turns": [Turn(name="p", drain_s=1.0, turn_s=1.1)] * 2}, "flip_turn_worst_s"),
        ({"turns": [Turn(name="p", drain_s=12.0, turn_s=0.1)] * 2}, "flip_drain_worst_s"),
        ({"ratios": [(0.0, 2, 1)]}, "auto_changes_of_ratio"),
        ({"ratios": [(0.0, 2, 1), (160.0, 1, 2), (170.0, 2, 1)]}, "auto_reversals_within_cooldown"),
        ({"measured": []}, "auto_0_prefill-heavy_attainment"),
        ({"measured": []}, "auto_0_prefill-heavy_worst_window"),
        ({"measured": arm("auto").measured[::2]}, "auto_1_decode-heavy_fewest_in_window"),
        ({"measured": arm("auto", {1}).measured}, "auto_1_decode-heavy_attainment"),
    ],
)
def test_each_harm_is_a_goal_missed(values: dict[str, Any], goal: str) -> None:
    auto, *fixed_ones = good()
    for name, value in values.items():
        setattr(auto, name, value)
    assert goal in missed([auto, *fixed_ones])


def test_fixed_ratios_must_be_there_and_show_what_they_are() -> None:
    auto, right, wrong = good()
    assert "ratios_in_the_table" in missed([auto, right])
    right.headroom = math.nan
    assert missed([auto, right, wrong]) == {"2P1D_headroom_where_right"}
    assert "1P2D_0_prefill-heavy_attainment_wrong" in missed([auto, right, arm("1P2D")])
    assert "2P1D_0_prefill-heavy_attainment_right" in missed([auto, arm("2P1D", {0, 1}), wrong])


def due() -> list[Arrival]:
    """One a second over all phases."""
    return [
        Arrival(index=index, at_s=float(index), phase=int(index / PHASE_S), input_tokens=1, output_tokens=1)
        for index in range(int(3 * PHASE_S))
    ]


def test_the_autoscaler_has_the_whole_load_at_once() -> None:
    assert parts_of("auto", due(), phases()) == [(0.0, due())]


def test_a_fixed_ratio_begins_each_phase_empty_and_has_none_twice() -> None:
    parts = parts_of("1P2D", due(), phases())
    assert [begin_s for begin_s, _ in parts] == [0.0, PHASE_S]
    for begin_s, part in parts:
        sent = [(one.index, one.at_s + begin_s) for one in part]
        assert sent == [(one.index, one.at_s) for one in due() if begin_s <= one.at_s < begin_s + PHASE_S]
        assert part[0].at_s == 0.0


def test_what_a_fixed_ratio_does_not_run_is_not_asked_of_it() -> None:
    assert (phases_run("auto", phases()), phases_run("2P1D", phases())) == ([0, 1, 2], [0, 1])
    auto, *fixed_ones = good()
    for one in fixed_ones:
        one.measured = [request for request in one.measured if request.due_s < 2 * PHASE_S]
    assert missed([auto, *fixed_ones]) == set()
    auto.measured = [request for request in auto.measured if request.due_s < 2 * PHASE_S]
    assert "auto_2_prefill-heavy_attainment" in missed([auto, *fixed_ones])


def test_the_picture_ends_with_the_requests_of_an_arm() -> None:
    one = arm("2P1D", {1})
    one.measured = [request for request in one.measured if request.due_s < 2 * PHASE_S]
    points = shift_plot.shares_of(one, GOALS, 30.0, 3 * PHASE_S)  # type: ignore[arg-type]
    assert points == [(30.0 * index, 100.0 if index < 5 else 0.0) for index in range(10)] + [(300.0, 0.0)]


def test_short_phases_show_nothing() -> None:
    arms = [arm(one.name, seconds=120.0, ratios=one.ratios, turns=one.turns) for one in good()]
    assert "phase_s" in missed(arms, 120.0)


def test_the_emptiest_window_counts() -> None:
    due = [
        Arrival(index=index, at_s=at_s, phase=0, input_tokens=1, output_tokens=1)
        for index, at_s in enumerate((1.0, 2.0, 31.0))
    ]
    assert (fewest_in_window(due, 60.0), fewest_in_window(due, 90.0)) == (1, 0)


# -- the load that is chosen


def test_what_a_decode_instance_can_do_is_bounded_by_the_goal() -> None:
    step = decode_step((6.0, 0.11), (20.0, 0.226))
    assert (step.base_s, step.slope_s) == (pytest.approx(0.06029, abs=1e-4), pytest.approx(0.00829, abs=1e-4))
    assert step.most_at_once(0.35) == pytest.approx(34.96, abs=0.01)
    assert step.capacity(0.35) == pytest.approx(99.9, abs=0.1)
    assert step.capacity(0.35) < 1 / step.slope_s
    assert decode_step((6.0, 0.1), (20.0, 0.1)).most_at_once(0.35) == math.inf


def test_lengths_leave_the_right_ratio_its_headroom() -> None:
    assert length_for(100.0, 2, 2.0, 0.25) == 75
    assert 1.0 - 2.0 * 75 / (2 * 100.0) == 0.25


def stream(*token_at_s: float) -> Measured:
    return Measured(
        index=0,
        phase=0,
        due_s=0.0,
        sent_s=0.0,
        ended_s=max(token_at_s, default=0.0),
        token_at_s=token_at_s,
        input_tokens=1,
        asked_tokens=1,
        kind=DONE,
    )


def test_tokens_count_when_they_came() -> None:
    some = [stream(1.0, 2.0, 3.0), stream(2.5, 3.5), stream()]
    assert tokens_between(some, 2.0, 3.0) == 2


@pytest.mark.parametrize("phase_s", [0.0, 0.5, 1.0, 2.0])
def test_prompts_that_end_by_fours_are_counted_by_whole_steps(phase_s: float) -> None:
    """Four every 2.5 s are 1.6 per second, whether three or four such steps end in the time that is looked at."""
    some = [stream(phase_s + 2.5 * step + 0.01 * one) for step in range(9) for one in range(4)]
    assert first_tokens_per_s(some, 8.0, 16.0) == pytest.approx(1.6, rel=0.01)


def test_one_step_alone_is_counted_over_all_of_the_time() -> None:
    assert first_tokens_per_s([stream(9.0), stream(9.05), stream()], 8.0, 16.0) == 0.25
    assert first_tokens_per_s([], 8.0, 16.0) == 0.0
