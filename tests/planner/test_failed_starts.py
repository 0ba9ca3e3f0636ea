"""The backoff of starts that never come to serve: what ends it and what does not, and that a dry run has none."""

from dataclasses import replace

from support.scaling import POLICY, Cluster, make_load

from biphase.planner.autoscaler_state import StopInstance
from biphase.planner.ratio import Ratio
from biphase.planner.reports import Member

PROMPTS = make_load(10.0, prompt=400, output=10)
"""Needs 3 prefill instances and 1 decode instance."""


def make_backing_off() -> Cluster:
    """The starts of two prefill instances were given up; the next is tried much later."""
    cluster = Cluster(POLICY, Ratio(prefill=1, decode=1), start_s=1e9)
    cluster.run(PROMPTS, 85)
    assert cluster.state.prefill.failed_starts == 2
    assert cluster.state.prefill.start_after_s > cluster.now_s
    return cluster


def test_one_that_comes_back_is_no_start_that_served() -> None:
    cluster = make_backing_off()
    before = cluster.state.prefill
    for phase in ("starting", "lost", "starting", "ready"):
        cluster.set_phase("prefill-0", phase=phase, age_s=0.0)
        cluster.tick(PROMPTS)
        after = cluster.state.prefill
        assert (after.failed_starts, after.start_after_s) == (before.failed_starts, before.start_after_s), phase


def test_the_next_life_of_the_controller_sees_all_come_to_serve_and_remembers() -> None:
    cluster = make_backing_off()
    before = cluster.state.prefill
    for phase in ("starting", "ready"):
        for name in ("prefill-0", "decode-0"):
            cluster.set_phase(name, phase=phase, age_s=0.0)
        cluster.tick(PROMPTS)
    assert cluster.state.prefill.start_after_s == before.start_after_s


def test_one_that_turns_to_the_role_is_no_start_that_served() -> None:
    cluster = make_backing_off()
    cluster.set_phase("decode-0", role="prefill")
    cluster.tick(PROMPTS)
    assert cluster.state.prefill.failed_starts == 2


def test_a_new_one_that_serves_ends_it_even_under_a_name_that_has_served_before() -> None:
    cluster = make_backing_off()
    cluster.members.append(Member(name="prefill-7", role="prefill", node="n"))
    cluster.tick(PROMPTS)
    assert (cluster.state.prefill.failed_starts, cluster.state.prefill.start_after_s) == (0, 0.0)
    cluster = make_backing_off()
    member = next(member for member in cluster.members if member.name == "prefill-0")
    cluster.members.remove(member)
    cluster.tick(PROMPTS)
    cluster.members.append(replace(member, phase="ready"))
    cluster.tick(PROMPTS)
    assert cluster.state.prefill.failed_starts == 0


def test_a_dry_run_says_that_a_start_is_late_and_holds_nothing_against_it() -> None:
    cluster = Cluster(replace(POLICY, dry_run=True), Ratio(prefill=1, decode=1), start_s=1e9)
    for name in ("prefill-1", "prefill-2"):
        cluster.members.append(Member(name=name, role="prefill", phase="starting", node="n"))
    found = cluster.run(PROMPTS, 80)
    assert {action.name for action in found[-1].actions if isinstance(action, StopInstance)} == {
        "prefill-1",
        "prefill-2",
    }
    said = " ".join(found[-1].reasons)
    assert "the next prefill start waits 60 s" in said and "the next prefill start waits 120 s" in said
    assert [decision.is_news for decision in found[-2:]] == [False, False]
    state = cluster.state
    assert (state.given_up, state.prefill.failed_starts, state.prefill.start_after_s) == ((), 0, 0.0)
    assert state.prefill.expected == 3, "they are wanted as before"
    assert state.prefill.changed_s is None
    cluster.policy = POLICY  # in earnest from now on
    cluster.tick(PROMPTS)
    assert (set(cluster.state.given_up), cluster.state.prefill.failed_starts) == ({"prefill-1", "prefill-2"}, 2)
