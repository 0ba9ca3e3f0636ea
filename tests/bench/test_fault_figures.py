"""What the benches of faults make of what they measured."""

import math
from dataclasses import replace
from typing import Any

import pytest
from fault_outcome import Fault, Outcome, View, seen_unix_s, worst
from idle_counters import held
from prefill_work import covered_s, gap_bound_s, prefill_rate, tokens_again
from recovery import CORES, cores_for, requests_for
from recovery_judge import judge, per_fault
from report import Report

from biphase.client.bench.measured import DONE, Measured


def one(index: int, *token_at_s: float, kind: str = DONE, replays: int = 0, **values: Any) -> Measured:
    return Measured(
        **{
            "index": index,
            "phase": 0,
            "due_s": 0.0,
            "sent_s": 0.5,
            "ended_s": max((0.5, *token_at_s)),
            "token_at_s": token_at_s,
            "input_tokens": 10,
            "asked_tokens": 4,
            "kind": kind,
            "replays": replays,
            "address": "a:1",
            "prefill_instance": "prefill-0#1 (pid 7)",
            "decode_instance": "decode-1#1 (pid 8)",
            **values,
        }
    )


def outcome(victim: str, *measured: Measured, **values: Any) -> Outcome:
    fault = Fault(kind="kill", victim=victim)
    return Outcome(fault=fault, life=f"{victim}#1", at_s=2.0, measured=list(measured), **{"address": "a:1", **values})


# -- displaced streams and their pause


def test_gap_and_displaced_tokens_are_those_of_replayed_streams() -> None:
    found = outcome("decode-0", one(0, 1.0, 1.5, 4.0, 4.5, replays=1), one(1, 1.0, 9.0), one(2, 0.6, 1.9, replays=1))
    assert found.gap_s == 2.5
    assert found.displaced_tokens == 10 + 2
    assert (len(found.lost), found.replays) == (0, 2)


def test_a_stream_that_ended_on_the_life_that_was_hit_was_not_displaced_from_it() -> None:
    stayed = one(0, 1.0, 9.0, replays=1, decode_instance="decode-0#1 (pid 3)")
    assert outcome("decode-0", stayed).displaced == []
    came_back = replace(stayed, decode_instance="decode-0#2 (pid 4)")
    assert outcome("decode-0", came_back).displaced == [came_back]


def test_a_first_token_that_came_late_counts_from_the_fault() -> None:
    assert outcome("prefill-0", one(0, 4.0, replays=1, prefill_instance="")).gap_s == 2.0


def test_without_displaced_streams_there_is_no_gap() -> None:
    assert math.isnan(outcome("decode-0", one(0, 1.0, 9.0)).gap_s)


def test_only_streams_of_the_faulted_router_are_excused() -> None:
    streams = (
        one(0, kind="UNAVAILABLE", ended_s=4.0),
        one(1, kind="UNAVAILABLE", ended_s=4.0, address="b:1"),
        one(2, kind="INTERNAL", ended_s=4.0),
        one(3, 1.0),
    )
    assert [lost.index for lost in outcome("router-0", *streams).lost] == [1, 2]
    assert [lost.index for lost in outcome("decode-0", *streams).lost] == [0, 1, 2]


@pytest.mark.parametrize(
    ("sent_s", "ended_s", "is_excused"),
    [
        (0.5, 1.9, False),  # before the fault
        (0.5, 5.0, True),
        (0.5, 5.1, False),
        (11.0, 14.0, True),
        (3.0, 61.0, False),
        (11.9, 12.5, True),
        (12.1, 12.2, False),  # the router had answered again
    ],
)
def test_a_router_is_excused_until_it_answers_again_and_only_what_ends_in_time(
    sent_s: float, ended_s: float, is_excused: bool
) -> None:
    stream = one(0, kind="UNAVAILABLE", sent_s=sent_s, ended_s=ended_s)
    found = outcome("router-0", stream, over_s=12.0)
    assert (len(found.excused), len(found.lost)) == (is_excused, not is_excused)


def test_a_router_is_seen_to_be_gone_when_the_last_of_its_streams_has_ended() -> None:
    streams = (one(0, 2.5), one(1, ended_s=4.5, kind="UNAVAILABLE"), one(2, 9.0))
    assert outcome("router-0", *streams, doomed=[0, 1]).seen_s == 2.5
    assert math.isnan(outcome("router-0", *streams, doomed=[]).seen_s)
    assert math.isnan(outcome("router-0", *streams, doomed=[0, 7]).seen_s)


# -- how fast prompts are prefilled


def prefilled(first_s: float, seconds: float, tokens: int, instance: str = "prefill-0#1 (pid 7)") -> Measured:
    return one(0, first_s, prefill_ms=1e3 * seconds, input_tokens=tokens, prefill_instance=instance)


def test_seconds_that_prompts_share_count_once_and_idle_ones_never() -> None:
    assert covered_s([(0.0, 2.0), (1.0, 3.0), (1.5, 1.6), (10.0, 11.0)]) == pytest.approx(4.0)
    together = [prefilled(2.0, 2.0, 100), prefilled(3.0, 2.0, 100), prefilled(11.0, 1.0, 100)]
    assert prefill_rate(together) == pytest.approx(300 / 4)


def test_the_rate_is_that_of_one_instance() -> None:
    beside = [prefilled(2.0, 2.0, 100), prefilled(2.0, 2.0, 300, "prefill-1#1 (pid 9)")]
    assert prefill_rate(beside) == pytest.approx(400 / 4)


def test_what_waited_in_a_queue_or_failed_is_no_slow_prefill() -> None:
    waited = replace(prefilled(9.0, 1.0, 50), sent_s=0.0)
    assert prefill_rate([waited, one(1, 99.0, kind="UNAVAILABLE", prefill_ms=1e3)]) == pytest.approx(50)
    assert math.isnan(prefill_rate([]))


def test_the_bound_is_detection_what_is_prefilled_again_and_a_second() -> None:
    displaced = [one(0, 1.0, 1.5, 4.0), one(1, 3.0)]
    assert tokens_again(displaced, 2.0) == 10 + 2 + 10
    assert gap_bound_s(2.0, 22, 11.0) == 5.0
    assert math.isnan(gap_bound_s(2.0, 22, math.nan))


# -- when a fault was seen


def test_detection_is_the_routers_own_word() -> None:
    def at(state: str, since_unix_s: float, incarnation: int = 1) -> float | None:
        view = View(incarnation=incarnation, state=state, since_unix_s=since_unix_s)
        return seen_unix_s(view, 100.0, 103.0)

    assert at("ready", 40.0) is None
    assert at("lost", 40.0) is None, "it was lost before the fault: this is not its detection"
    assert at("lost", 101.5) == 101.5
    assert at("connecting", 102.0, 2) == 102.0 and at("ready", 102.5, 2) == 102.5
    assert at("ready", 101.7) == 101.7, "it was away between two looks"
    assert seen_unix_s(None, 100.0, 103.0) == 103.0


def test_what_was_not_measured_is_as_bad_as_can_be() -> None:
    assert worst([0.5, math.nan]) == worst([]) == math.inf
    assert worst([0.5, 2.0]) == 2.0


def test_an_instance_that_does_not_answer_may_hold_anything() -> None:
    assert held({"decode-0": {"legs": 0}, "decode-1": {"legs": 2}}) == {"decode-1.legs": 2}
    assert list(held({"decode-0": {}})) == ["decode-0 does not answer"]


# -- goals


def missed(*cases: Outcome) -> set[str]:
    found = Report("recovery", ())
    judge(found, [(case, 3.0) for case in cases])
    return {goal.name for goal in found.goals if not goal.met}


def good(victim: str = "decode-0", kind: str = "kill") -> Outcome:
    """Ten requests, four of them displaced, in time."""
    elsewhere = {"prefill_instance": "decode-1#1 (pid 8)"}
    streams = [one(index, 1.0, 3.0, replays=int(index < 4), **elsewhere) for index in range(10)]
    values: dict[str, Any] = {"on_victim": 4, "served_after": 1, "failed_handoffs": 2, "doomed": [0]}
    found = outcome(victim, *streams, detected_s=0.05, strong_s=5.0, stopped_s=1.0, **values)
    found.fault = Fault(kind=kind, victim=victim, other="prefill-0" if kind == "pair" else "")  # type: ignore[arg-type]
    return found


@pytest.mark.parametrize("victim", ["prefill-0", "decode-0", "controller", "router-0"])
@pytest.mark.parametrize("kind", ["kill", "stop", "partition"])
def test_a_good_case_meets_every_goal(victim: str, kind: str) -> None:
    assert missed(good(victim, kind)) == set()
    assert missed(good(kind="pair")) == set()


@pytest.mark.parametrize(
    ("harm", "goal"),
    [
        ({"measured": []}, "requests_fewest"),
        ({"on_victim": 3}, "on_victim_lacking"),
        ({"detected_s": math.nan}, "kill_decode_seen_worst_s"),
        ({"detected_s": 0.11}, "kill_decode_seen_worst_s"),
        ({"measured": [one(index, 1.0, 3.0) for index in range(10)]}, "kill_decode_displaced_fewest"),
        ({"measured": [one(index, 1.0, 3.0) for index in range(10)]}, "kill_decode_gap_over_bound_worst_s"),
        ({"measured": [one(index, 1.0, 5.0, replays=1) for index in range(10)]}, "kill_decode_gap_over_bound_worst_s"),
        ({"measured": [one(0, kind="INTERNAL")]}, "lost_requests"),
        ({"measured": [one(0, 1.0, wrong=True)]}, "wrong_tokens"),
        ({"left": {"decode-0.legs": 1}}, "leaked"),
        ({"former": ["decode-0#1 on n1"]}, "former_lives_left"),
        ({"restarted": ["prefill-0"]}, "others_restarted"),
        ({"strong_s": math.nan}, "not_back_at_full_strength"),
    ],
)
def test_each_harm_is_a_goal_missed_among_good_cases(harm: dict[str, Any], goal: str) -> None:
    assert goal in missed(good(), replace(good(), **harm), good())


@pytest.mark.parametrize(
    ("harm", "goal"),
    [
        ({"on_victim": 0}, "on_victim_lacking"),
        ({"failed_handoffs": 0}, "pair_decode_failed_handoffs_fewest"),
        ({"detected_s": 2.6}, "pair_decode_seen_worst_s"),
        ({"detected_s": math.nan}, "pair_decode_seen_worst_s"),
    ],
)
def test_a_pair_whose_handoffs_go_on_or_fail_late_is_a_goal_missed(harm: dict[str, Any], goal: str) -> None:
    assert missed(replace(good(kind="pair"), on_victim=1)) == set(), "one pull under way is enough"
    assert missed(good(kind="pair"), replace(good(kind="pair"), **harm)) == {goal}


def test_a_prefill_instance_that_took_nothing_with_it_shows_nothing() -> None:
    idle = replace(good("prefill-0"), measured=[one(index, 1.0, 3.0) for index in range(10)])
    assert missed(good("prefill-0"), idle) == {"kill_prefill_displaced_fewest"}


def test_a_router_that_serves_nobody_after_the_heal_is_a_goal_missed() -> None:
    deaf = replace(good("router-0", "stop"), served_after=0)
    assert missed(good("router-0", "stop"), deaf) == {"stop_router_served_after_fewest"}


def test_figures_of_a_fault_are_medians_and_maxima_of_its_cases() -> None:
    cases = [replace(good(), strong_s=strong_s) for strong_s in (4.0, 9.0, 5.0)]
    of = per_fault([*cases, good("prefill-0")])["kill -9 decode"]
    assert (of["cases"], of["strong_s_median"], of["strong_s_max"], of["gap_s_max"]) == (3, 5.0, 9.0, 2.0)


def test_a_router_without_streams_shows_nothing() -> None:
    assert "kill_router_streams_ended_worst_s" in missed(good("router-0"), replace(good("router-0"), doomed=[]))
    late = replace(good("router-0"), stopped_s=math.nan)
    assert missed(good("router-0"), late) == {"kill_router_work_stopped_worst_s"}


# -- the load of a case


def test_streams_that_are_to_be_cut_off_outlast_the_others() -> None:
    def longest(kind: str, victim: str) -> tuple[int, int]:
        fault = Fault(kind=kind, victim=victim, other="prefill-0")  # type: ignore[arg-type]
        due = requests_for(fault, 0.3, 1)
        burst, even = ([one.output_tokens for one in due if one.phase == phase] for phase in (0, 1))
        assert len(burst) == 10 and len(even) > 30
        return max(burst), max(even)

    for kind, victim in (("kill", "decode-0"), ("stop", "router-0")):
        assert 96 < longest(kind, victim)[0] <= 256
    for kind, victim in (("kill", "prefill-0"), ("pair", "decode-0")):
        burst, even = longest(kind, victim)
        assert 32 < burst <= 64 and 16 < even <= 32


def test_instances_have_their_own_cores_where_that_is_possible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cpu_shares.lacking", lambda: "")
    assert cores_for(None) == (CORES, "")
    monkeypatch.setattr("cpu_shares.lacking", lambda: "not root")
    cores, said = cores_for(None)
    assert cores == 0.0 and "not root" in said
    assert cores_for(0.25) == (0.25, "")
