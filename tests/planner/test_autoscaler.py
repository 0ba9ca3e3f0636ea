"""Decisions, one rule at a time: what is done, in which order, and what is said of it."""

from dataclasses import replace
from typing import Any

import pytest
from support.scaling import (
    DECODE_STEP,
    POLICY,
    PREFILL_STEP,
    START_S,
    Cluster,
    change_of,
    make_load,
    make_members,
    make_signals,
)

from biphase.planner.autoscaler import decide, reason_against
from biphase.planner.autoscaler_state import (
    AskNode,
    AutoscalerState,
    Decision,
    FlipInstance,
    Hold,
    StartInstance,
    StopInstance,
    WithdrawNode,
)
from biphase.planner.capacity import OfferedLoad, RoleShape, Setup
from biphase.planner.policy import BoundsChange, GpuBudget, Policy, RoleBounds, RoleFlip, ScaleRule, Schedule
from biphase.planner.ratio import Ratio
from biphase.planner.reports import JointHistogram, Member, Room

QUIET = make_load(0.2)
PROMPTS = make_load(10.0, prompt=400, output=10)
"""Needs 3 prefill instances and 1 decode instance."""
TOKENS = make_load(8.0, prompt=20, output=100)
"""Needs 1 prefill instance and several decode instances."""
FIXED = replace(POLICY, gpu_budget=GpuBudget(min=4, max=4))


def actions(cluster: Cluster, load: object, seconds: float) -> list[object]:
    return [action for decision in cluster.run(load, seconds) for action in decision.actions]  # type: ignore[arg-type]


def test_steady_load_means_no_action() -> None:
    cluster = Cluster(POLICY, Ratio(prefill=1, decode=1))
    assert actions(cluster, QUIET, 300) == []


def test_a_step_is_answered_at_once_after_stabilization() -> None:
    cluster = Cluster(POLICY, Ratio(prefill=1, decode=1))
    cluster.run(QUIET, 60)
    found = cluster.run(PROMPTS, 15)
    assert [decision.actions for decision in found] == [(), (), (StartInstance(role="prefill"),) * 2]
    assert "10 prompts/s of 400 tokens keep 1 prefill busy to 205%" in found[-1].reasons[-1]


def test_a_short_peak_moves_nothing() -> None:
    cluster = Cluster(POLICY, Ratio(prefill=1, decode=1))
    cluster.run(QUIET, 60)
    assert actions(cluster, PROMPTS, 10) == []
    assert actions(cluster, QUIET, 100) == []


@pytest.mark.parametrize("pause_s", [10, 1200])
def test_a_peak_before_a_pause_moves_nothing_after_it(pause_s: int) -> None:
    """Under half of the instances report, or the controller was away: the newest recommendation is an old one then."""
    cluster = Cluster(POLICY, Ratio(prefill=1, decode=1))
    cluster.run(QUIET, 60)
    assert cluster.tick(PROMPTS).actions == ()
    cluster.now_s += pause_s
    early = replace(make_signals(QUIET, cluster.members), watched_s=0.0)
    assert decide(POLICY, early, cluster.state, cluster.now_s).actions == ()
    assert actions(cluster, QUIET, 30) == []


def test_no_arrivals_is_data() -> None:
    cluster = Cluster(POLICY, Ratio(prefill=3, decode=3))
    cluster.run(make_load(0.0), 60)
    assert cluster.ratio == Ratio(prefill=1, decode=1)


def test_it_holds_while_under_half_report_and_only_then() -> None:
    cluster = Cluster(POLICY, Ratio(prefill=2, decode=2))
    silent = ["prefill-0", "prefill-1", "decode-0"]
    held = [cluster.tick(PROMPTS, silent=silent) for _ in range(20)]
    assert {decision.actions for decision in held} == {(Hold(reason="1 of 4 instances report, under half"),)}
    assert [decision.is_news for decision in held[:3]] == [True, False, False]
    acted = [cluster.tick(PROMPTS, silent=silent[:2]) for _ in range(4)]
    assert any(StartInstance(role="prefill") in decision.actions for decision in acted)


def test_under_a_fixed_budget_the_ratio_moves_by_flips() -> None:
    cluster = Cluster(FIXED, Ratio(prefill=2, decode=2))
    moved = actions(cluster, PROMPTS, 60)
    assert [type(action) for action in moved] == [FlipInstance]
    assert cluster.ratio == Ratio(prefill=3, decode=1)
    moved = actions(cluster, TOKENS, 90)
    assert {type(action) for action in moved} == {FlipInstance}
    assert cluster.ratio == Ratio(prefill=1, decode=3)
    # names stay what they were
    assert sorted(member.name for member in cluster.members) == ["decode-0", "decode-1", "prefill-0", "prefill-1"]


def test_a_flip_that_gains_too_little_is_not_made() -> None:
    stubborn = replace(FIXED, role_flip=RoleFlip(enabled=True, min_gain=0.99, cooldown_s=15))
    cluster = Cluster(stubborn, Ratio(prefill=2, decode=2))
    found = cluster.run(PROMPTS, 60)
    assert [action for decision in found for action in decision.actions] == []
    assert "less than min_gain 0.99" in " ".join(found[-1].reasons)


def test_without_flips_one_is_stopped_and_one_started_once_its_gpu_is_free() -> None:
    policy = replace(FIXED, role_flip=RoleFlip(enabled=False), gpu_budget=GpuBudget(max=4))
    cluster = Cluster(policy, Ratio(prefill=2, decode=2), gpus=4, drain_s=12.0)
    moved = actions(cluster, PROMPTS, 120)
    assert [type(action) for action in moved] == [StopInstance, StartInstance]
    assert cluster.ratio == Ratio(prefill=3, decode=1)


def test_a_flips_cost_counts_where_ranks_are_built_anew() -> None:
    slow = Setup(
        prefill=RoleShape(plan="tp 2 x pp 1"), decode=RoleShape(plan="tp 1 x pp 2"), flip_s=1.0, rebuild_s=3600.0
    )
    busy = make_load(7.9, prompt=400, output=60)  # decode is needed meanwhile
    cheap, dear = (Cluster(FIXED, Ratio(prefill=2, decode=2), setup=setup) for setup in (Setup(), slow))
    assert actions(cheap, PROMPTS, 60)
    assert [cluster.ratio for cluster in (cheap, dear)][1] == Ratio(prefill=2, decode=2)
    assert actions(dear, busy, 60) == []


def test_starting_and_draining_instances_count_against_the_budget() -> None:
    policy = replace(POLICY, gpu_budget=GpuBudget(max=3))
    cluster = Cluster(policy, Ratio(prefill=1, decode=1), start_s=1000.0)
    cluster.members.append(Member(name="decode-9", role="decode", phase="draining"))
    cluster.drain_s = 1000.0
    assert actions(cluster, PROMPTS, 60) == []
    decision = cluster.tick(PROMPTS)
    assert "3 of 3 GPUs of the budget are held, 1 of them draining" in " ".join(decision.reasons)


def test_what_is_starting_counts_so_that_starts_do_not_stack() -> None:
    cluster = Cluster(POLICY, Ratio(prefill=1, decode=1), start_s=50.0)
    assert len(actions(cluster, PROMPTS, 50)) == 2


def test_a_start_that_never_serves_is_given_up_backs_off_and_is_reported() -> None:
    cluster = Cluster(POLICY, Ratio(prefill=1, decode=1), start_s=1e9)
    cluster.run(PROMPTS, 20)
    assert cluster.ratio == Ratio(prefill=3, decode=1)
    found = cluster.run(PROMPTS, 65)
    stopped = [a for d in found for a in d.actions if isinstance(a, StopInstance)]
    assert {stop.name for stop in stopped} == {"prefill-1", "prefill-2"}
    said = " ".join(reason for decision in found for reason in decision.reasons)
    assert "prefill-1 is given up: not serving 65 s after its start on node-x, start_timeout_s is 60" in said
    assert "2 starts failed, the next is tried in" in said
    assert cluster.state.prefill.failed_starts == 2
    assert not [a for d in found for a in d.actions[1:] if isinstance(a, StartInstance)]
    # after the backoff it is tried again, and one that serves clears the record
    cluster.start_s = 0.0
    cluster.run(PROMPTS, 130)
    assert cluster.ratio == Ratio(prefill=3, decode=1)
    assert cluster.state.prefill.failed_starts == 0


def test_until_a_step_time_is_fitted_it_goes_one_step_at_a_time() -> None:
    cluster = Cluster(POLICY, Ratio(prefill=1, decode=1), fitted=False)
    for decision in cluster.run(make_load(100.0, prompt=400, output=500), 60):
        assert all(abs(change) <= 1 for change in change_of(decision, cluster.members).values() if decision.actions)
    assert cluster.ratio.gpus(Setup()) > 2


def test_with_a_prior_the_first_decision_moves_at_once_and_what_is_fitted_replaces_it() -> None:
    slow = replace(PREFILL_STEP, per_token_s=2 * PREFILL_STEP.per_token_s, num_steps=1)
    for prior, first in ((replace(PREFILL_STEP, num_steps=1), 3), (slow, 5)):
        setup = Setup(prefill=RoleShape(step_time=prior), decode=RoleShape(step_time=replace(DECODE_STEP, num_steps=1)))
        cluster = Cluster(POLICY, Ratio(prefill=1, decode=1), fitted=False, setup=setup)
        moves = [decision.actions for decision in cluster.run(PROMPTS, 30) if decision.actions]
        assert moves == [(StartInstance(role="prefill"),) * (first - 1)]
        cluster.fitted = True
        cluster.run(PROMPTS, 60)
        assert cluster.ratio == Ratio(prefill=3, decode=1)


def test_what_was_fitted_is_kept_while_nobody_can_say_it() -> None:
    cluster = Cluster(POLICY, Ratio(prefill=1, decode=1))
    cluster.run(QUIET, 10)
    cluster.fitted = False
    cluster.run(PROMPTS, 15)
    assert cluster.ratio == Ratio(prefill=3, decode=1)


def test_victims_have_the_least_work_left_then_the_emptiest_node() -> None:
    members = [
        Member(name="decode-0", role="decode", node="a"),
        Member(name="decode-1", role="decode", node="b"),
        Member(name="decode-2", role="decode", node="b"),
        Member(name="prefill-0", role="prefill", node="b"),
    ]
    policy = replace(POLICY, decode=RoleBounds(min_replicas=1, max_replicas=2))
    for work, victim in (({"decode-0": 9, "decode-1": 5, "decode-2": 7}, "decode-1"), ({}, "decode-0")):
        decision = decide(policy, make_signals(QUIET, members, work=work), AutoscalerState(), START_S)
        assert decision.actions == (StopInstance(name=victim),)


def test_nodes_are_asked_for_when_no_gpu_is_idle_and_withdrawn_when_none_comes() -> None:
    cluster = Cluster(POLICY, Ratio(prefill=1, decode=1), gpus=2)
    cluster.can_grow = True
    found = cluster.run(PROMPTS, 30)
    assert [a for d in found for a in d.actions] == [AskNode(role="prefill")]
    assert "ask for a node" in " ".join(r for d in found for r in d.reasons)
    found = cluster.run(PROMPTS, 120)
    assert [a for d in found for a in d.actions] == [WithdrawNode(role="prefill")]
    assert "none came in 120 s, node_wait_s is 120" in " ".join(r for d in found for r in d.reasons)
    assert actions(cluster, PROMPTS, 60) == []  # and not asked for again at once
    cluster.gpus = 3
    assert actions(cluster, PROMPTS, 15) == [StartInstance(role="prefill")]


def test_a_start_takes_the_new_node_where_it_has_come_and_room_that_was_there_before_it() -> None:
    cluster = Cluster(POLICY, Ratio(prefill=1, decode=1), gpus=2)
    cluster.can_grow = True
    cluster.run(PROMPTS, 30)
    asked = cluster.state.prefill.asked_s
    assert asked is not None
    for idle, came, started in (
        (1, ("prefill",), [StartInstance(role="prefill", on_new_node=True)]),
        (2, ("prefill",), [StartInstance(role="prefill"), StartInstance(role="prefill", on_new_node=True)]),
        (1, (), [StartInstance(role="prefill")]),
        (2, (), [StartInstance(role="prefill"), StartInstance(role="prefill"), WithdrawNode(role="prefill")]),
    ):
        state, now_s = cluster.state, cluster.now_s
        for _ in range(3):
            now_s += POLICY.interval_s
            signals = make_signals(PROMPTS, cluster.members)
            signals = replace(signals, room=Room(prefill=idle, decode=idle - len(came), can_grow=True, came=came))
            decision = decide(POLICY, signals, state, now_s)
            state = decision.state
            if decision.actions:
                break
        assert list(decision.actions) == started
        kept = not came and idle == 1
        assert state.prefill.asked_s == (asked if kept else None), "a request is for the instance it was made for"


def test_a_request_that_the_budget_has_no_room_for_any_more_is_withdrawn() -> None:
    cluster = Cluster(POLICY, Ratio(prefill=1, decode=1), gpus=2)
    cluster.can_grow = True
    cluster.run(PROMPTS, 30)
    cluster.policy = replace(POLICY, gpu_budget=GpuBudget(max=2))
    assert cluster.tick(PROMPTS).actions == (WithdrawNode(role="prefill"),)


def test_a_node_is_asked_for_over_a_restart_of_the_controller_for_as_long_as_is_left() -> None:
    cluster = Cluster(POLICY, Ratio(prefill=1, decode=1), gpus=2)
    cluster.can_grow = True
    cluster.run(PROMPTS, 90)
    cluster.state = AutoscalerState.from_json(cluster.state.to_json())
    assert actions(cluster, PROMPTS, 40) == []
    assert actions(cluster, PROMPTS, 25) == [WithdrawNode(role="prefill")]


def test_a_node_that_is_needed_no_more_is_withdrawn() -> None:
    cluster = Cluster(POLICY, Ratio(prefill=1, decode=1), gpus=2)
    cluster.can_grow = True
    cluster.run(PROMPTS, 30)
    assert actions(cluster, QUIET, 40) == [WithdrawNode(role="prefill")]


def told(found: list[Decision]) -> list[str]:
    """The reasons that no node can be had."""
    return [reason for decision in found for reason in decision.reasons if "the cluster has no autoscaler" in reason]


def test_without_an_autoscaler_of_nodes_that_is_said_once() -> None:
    cluster = Cluster(POLICY, Ratio(prefill=1, decode=1), gpus=2)
    found = cluster.run(PROMPTS, 60)
    assert [a for d in found for a in d.actions] == []
    assert told(found) == ["prefill lacks 2: no GPU is idle, and the cluster has no autoscaler"]
    assert not any(decision.is_news for decision in found[-3:])


def test_other_news_does_not_repeat_that_there_is_no_autoscaler_of_nodes_until_nodes_have_not_been_lacked() -> None:
    cluster = Cluster(POLICY, Ratio(prefill=1, decode=1), gpus=2)
    assert len(told(cluster.run(PROMPTS, 60))) == 1
    ready = [member.name for member in cluster.members]
    found = [cluster.tick(PROMPTS, silent=ready), *cluster.run(PROMPTS, 15)]
    assert [reason.split(":")[0] for decision in found for reason in decision.reasons] == ["hold"]
    slow = replace(POLICY, targets=replace(POLICY.targets, ttft_ms=1.0))
    found = []
    for load, policy in ((make_load(11.0, prompt=450, output=10), POLICY), (PROMPTS, slow), (PROMPTS, POLICY)):
        cluster.policy = policy
        found += cluster.run(load, 30)
    assert any(decision.is_news and decision.reasons for decision in found)
    assert told(found) == []
    cluster.gpus = 3
    found = cluster.run(PROMPTS, 60)
    assert [action for decision in found for action in decision.actions] == [StartInstance(role="prefill")]
    assert told(found) == [], "one more has room, another one is lacked still"
    assert told(cluster.run(QUIET, 60)) == []
    cluster.gpus = 2
    assert len(told(cluster.run(PROMPTS, 60))) == 1, "anew, for it had ended"
    cluster.can_grow = True
    assert actions(cluster, PROMPTS, 10) == [AskNode(role="prefill")]
    cluster.can_grow = False
    assert len(told(cluster.run(PROMPTS, 300))) == 1, "an autoscaler that has gone again"


def test_a_dry_run_does_nothing_and_follows_what_really_happens() -> None:
    cluster = Cluster(replace(POLICY, dry_run=True), Ratio(prefill=1, decode=1))
    found = cluster.run(PROMPTS, 60)
    assert found[-1].dry_run and found[-1].actions == (StartInstance(role="prefill"),) * 2
    assert found[-1].state.prefill.changed_s is None
    assert [decision.is_news for decision in found[-3:]] == [False] * 3
    cluster.members.append(Member(name="prefill-7", role="prefill", node="n"))  # somebody did it by hand
    assert cluster.tick(PROMPTS).state.prefill.changed_s == cluster.now_s


def test_a_pin_is_kept_within_the_budget_and_without_waiting() -> None:
    members = make_members(Ratio(prefill=1, decode=1))
    signals = make_signals(QUIET, members)
    decision = decide(POLICY, signals, AutoscalerState(), START_S, pinned=Ratio(prefill=3, decode=1))
    assert decision.actions == (StartInstance(role="prefill"),) * 2
    tight = replace(POLICY, gpu_budget=GpuBudget(max=3))
    decision = decide(tight, signals, AutoscalerState(), START_S, pinned=Ratio(prefill=3, decode=1))
    assert decision.actions == (StartInstance(role="prefill"),)
    assert decision.reasons[0] == (
        "pinned to 3P:1D, 2P:1D is kept: 3P:1D takes 4 GPUs, more than gpu_budget.max 3 of the policy"
    )


@pytest.mark.parametrize(
    ("policy", "pinned", "kept", "why"),
    [
        (
            replace(POLICY, prefill=RoleBounds(min_replicas=1, max_replicas=2)),
            Ratio(prefill=4, decode=1),
            Ratio(prefill=2, decode=1),
            "prefill is 4, more than prefill.max_replicas 2 of the policy",
        ),
        (
            replace(POLICY, decode=RoleBounds(min_replicas=2, max_replicas=6)),
            Ratio(prefill=1, decode=1),
            Ratio(prefill=1, decode=2),
            "decode is 1, less than decode.min_replicas 2 of the policy",
        ),
        (
            replace(POLICY, gpu_budget=GpuBudget(min=4, max=8)),
            Ratio(prefill=1, decode=2),
            Ratio(prefill=1, decode=3),
            "1P:2D takes 3 GPUs, less than gpu_budget.min 4 of the policy",
        ),
    ],
)
def test_a_pin_outside_the_bounds_yields_to_them_in_words(policy: Policy, pinned: Ratio, kept: Ratio, why: str) -> None:
    cluster = Cluster(policy, pinned)
    for _ in range(3):
        signals = make_signals(PROMPTS, cluster.members, idle=cluster.idle)
        decision = decide(policy, signals, cluster.state, cluster.now_s, pinned=pinned)
        assert (decision.target, decision.reasons[0]) == (kept, f"pinned to {pinned}, {kept} is kept: {why}")
        cluster.carry_out(decision)
    assert (cluster.ratio, decision.actions, decision.is_news) == (kept, (), False)


def test_who_may_pin_what() -> None:
    tight = replace(POLICY, gpu_budget=GpuBudget(min=2, max=3), prefill=RoleBounds(min_replicas=1, max_replicas=2))

    def against(prefill: int, decode: int, **words: Any) -> str | None:
        return reason_against(Ratio(prefill=prefill, decode=decode), tight, Setup(), START_S, **words)

    assert against(2, 1) is None
    assert against(3, 1) == "prefill is 3, more than prefill.max_replicas 2 of the policy"
    assert against(2, 2) == "2P:2D takes 4 GPUs, more than gpu_budget.max 3 of the policy"
    assert against(1, 0) == "decode is 0, less than decode.min_replicas 1 of the policy"
    assert against(2, 2, total=False) is None, "a flip keeps the total"
    assert against(3, 1, roles=("decode",), total=False) is None, "what somebody does not name stays"
    night = Schedule(
        cron="* * * * *", duration_s=3600, name="night", prefill=BoundsChange(min_replicas=1, max_replicas=1)
    )
    asleep = replace(tight, schedules=(night,))
    assert reason_against(Ratio(prefill=2, decode=1), asleep, Setup(), START_S) == (
        "prefill is 2, more than prefill.max_replicas 1 of the policy (schedule night is on)"
    )


def test_schedules_set_bounds() -> None:
    always = Schedule(
        cron="* * * * *", duration_s=3600, name="big", prefill=BoundsChange(min_replicas=3, max_replicas=6)
    )
    cluster = Cluster(replace(POLICY, schedules=(always,)), Ratio(prefill=1, decode=1))
    decision = cluster.tick(QUIET)
    assert decision.actions == (StartInstance(role="prefill"),) * 2
    assert "schedule big is on" in decision.reasons


def test_all_decode_instances_gone_a_prefill_instance_takes_their_place() -> None:
    cluster = Cluster(FIXED, Ratio(prefill=2, decode=1), gpus=2)
    cluster.set_phase("decode-0", phase="lost", age_s=0.0)
    decision = cluster.tick(QUIET)
    assert [action for action in decision.actions if isinstance(action, FlipInstance)] == [
        FlipInstance(name="prefill-0", role="decode")
    ]
    assert cluster.ratio == Ratio(prefill=1, decode=1)


@pytest.mark.parametrize("load", [PROMPTS, TOKENS], ids=["prompts", "tokens"])
def test_a_role_that_nobody_serves_gets_its_minimum_at_once_and_the_rest_waits(load: OfferedLoad) -> None:
    """One tick of load is no reason for more, nor to take from the other role what the repair does not need."""
    careful = replace(FIXED, scale_up=ScaleRule(stabilization_s=30.0, cooldown_s=60.0, max_step=2))
    cluster = Cluster(replace(careful, gpu_budget=GpuBudget(max=5)), Ratio(prefill=1, decode=4), gpus=5)
    cluster.set_phase("prefill-0", phase="lost", age_s=0.0)
    started = [action for action in cluster.tick(load).actions if not isinstance(action, StopInstance)]
    assert started == [StartInstance(role="prefill")]
    assert cluster.ratio == Ratio(prefill=1, decode=4)

    full = Cluster(careful, Ratio(prefill=1, decode=4), gpus=8)  # idle ones that are beyond the budget of 4
    full.set_phase("prefill-0", phase="lost", age_s=0.0)
    flips = [action for action in full.tick(load).actions if isinstance(action, FlipInstance)]
    assert [flip.role for flip in flips] == ["prefill"]
    assert full.ratio == Ratio(prefill=1, decode=3)


@pytest.mark.parametrize("strict", [False, True])
def test_the_last_prefill_instance_turns_only_where_decode_instances_may_prefill(strict: bool) -> None:
    cluster = Cluster(FIXED, Ratio(prefill=1, decode=1), gpus=1, setup=Setup(strict=strict))
    cluster.set_phase("decode-0", phase="lost", age_s=0.0)
    flips = [action for action in cluster.tick(QUIET).actions if isinstance(action, FlipInstance)]
    assert flips == ([] if strict else [FlipInstance(name="prefill-0", role="decode")])


def test_with_a_host_lost_the_ratio_is_rebuilt_from_what_is_left() -> None:
    cluster = Cluster(replace(FIXED, gpu_budget=GpuBudget(max=4)), Ratio(prefill=3, decode=1), gpus=4)
    cluster.run(PROMPTS, 60)
    assert cluster.ratio == Ratio(prefill=3, decode=1)
    cluster.gpus = 3
    cluster.set_phase("prefill-2", phase="lost", age_s=0.0)
    cluster.run(TOKENS, 60)
    assert cluster.ratio == Ratio(prefill=1, decode=2)


def test_nothing_shrinks_while_requests_miss_their_goals_against_the_forecast() -> None:
    members = make_members(Ratio(prefill=3, decode=2))
    cluster = Cluster(POLICY, Ratio(prefill=3, decode=2))
    cluster.run(PROMPTS, 10)
    late = JointHistogram(ttft_ms=(800.0,), tpot_ms=(40.0,), counts=(20, 0, 30, 0))
    signals = replace(make_signals(QUIET, members), latency=late)
    state, now_s = AutoscalerState(), START_S
    for _ in range(20):
        now_s += 5
        decision = decide(POLICY, signals, state, now_s)
        state = decision.state
        assert all(action == StopInstance(name="decode-0") for action in decision.actions)
    assert "prefill stays: only 40% of 50 requests met their goals, more was forecast" in decision.reasons


def test_a_goal_out_of_reach_is_said_and_does_not_grow_the_cluster_without_end() -> None:
    policy = replace(POLICY, targets=replace(POLICY.targets, ttft_ms=50.0))
    cluster = Cluster(policy, Ratio(prefill=1, decode=1))
    found = cluster.run(make_load(0.2), 60)
    assert "ttft_ms 50 is out of reach: long prompts take 206 ms with nobody before them" in found[-1].reasons
    assert cluster.ratio == Ratio(prefill=1, decode=1)


def test_a_restarted_controller_does_not_act_inside_a_cooldown() -> None:
    cluster = Cluster(POLICY, Ratio(prefill=1, decode=1))
    cluster.run(PROMPTS, 15)
    kept = cluster.state.to_json()
    assert cluster.ratio == Ratio(prefill=3, decode=1)
    cluster.state = AutoscalerState.from_json(kept)
    more = make_load(20.0, prompt=400, output=10)
    assert actions(cluster, more, 10) == []
    assert actions(cluster, more, 10) != []


def test_a_clock_set_back_holds_nothing_for_ever() -> None:
    cluster = Cluster(POLICY, Ratio(prefill=1, decode=1))
    cluster.run(PROMPTS, 15)
    cluster.now_s -= 1e6
    cluster.run(make_load(20.0, prompt=400, output=10), 60)
    assert cluster.ratio.prefill > 3
