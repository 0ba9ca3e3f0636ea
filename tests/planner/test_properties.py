"""Whatever the signals say: bounds, budget, steps, cooldowns; the same input gives the same decision."""

from dataclasses import replace

from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from support.scaling import POLICY, START_S, Cluster, change_of, make_load, make_members, make_signals

from biphase.planner.autoscaler import MIN_REQUESTS, decide
from biphase.planner.autoscaler_state import AutoscalerState, FlipInstance, StartInstance, StopInstance
from biphase.planner.capacity import OfferedLoad
from biphase.planner.policy import ROLES, GpuBudget, Policy, RoleBounds, RoleFlip, ScaleRule
from biphase.planner.ratio import Ratio, outside
from biphase.planner.reports import Histogram, InstanceReport, JointHistogram, RouterReport, is_sound
from biphase.planner.signals import SignalWindow
from biphase.protos.step_time import StepTime

loads = st.one_of(
    st.just(make_load(0.0)),
    st.builds(
        make_load,
        st.floats(0.01, 40.0),
        prompt=st.floats(1.0, 4000.0),
        output=st.floats(1.0, 500.0),
    ),
    st.just(make_load(1e9, prompt=1e6, output=1e6)),  # a lie
)
latencies = st.builds(
    lambda met, late, missed: JointHistogram(
        ttft_ms=(800.0,), tpot_ms=(40.0,), counts=(met, late[0], late[1], 0), missed=missed
    ),
    st.integers(0, 200),
    st.tuples(st.integers(0, 30), st.integers(0, 30)),
    st.integers(0, 5000),
)


@st.composite
def policies(draw: st.DrawFn) -> Policy:
    bounds = []
    for _ in ROLES:
        least = draw(st.integers(1, 3))
        bounds.append(RoleBounds(min_replicas=least, max_replicas=draw(st.integers(least, 6))))
    minima, maxima = sum(b.min_replicas for b in bounds), sum(b.max_replicas for b in bounds)
    most = draw(st.integers(minima, 12))
    rules = [
        ScaleRule(
            stabilization_s=draw(st.sampled_from([0.0, 5.0, 10.0, 20.0])),
            cooldown_s=draw(st.sampled_from([0.0, 10.0, 30.0])),
            max_step=draw(st.integers(1, 4)),
        )
        for _ in range(2)
    ]
    return replace(
        POLICY,
        gpu_budget=GpuBudget(min=draw(st.integers(0, min(most, maxima))), max=most),
        prefill=bounds[0],
        decode=bounds[1],
        scale_up=rules[0],
        scale_down=rules[1],
        role_flip=RoleFlip(
            enabled=draw(st.booleans()),
            min_gain=draw(st.floats(0.0, 0.3)),
            cooldown_s=draw(st.sampled_from([0.0, 20.0])),
        ),
        start_timeout_s=40.0,
    )


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(policies(), st.data())
def test_bounds_budget_steps_and_cooldowns_hold_whatever_the_load(policy: Policy, data: st.DataObject) -> None:
    ratio = Ratio(prefill=policy.prefill.min_replicas, decode=policy.decode.min_replicas)
    cluster = Cluster(
        policy,
        ratio,
        gpus=data.draw(st.integers(2, 14)),
        start_s=data.draw(st.sampled_from([0.0, 12.0])),
        drain_s=data.draw(st.sampled_from([0.0, 12.0])),
        fitted=data.draw(st.booleans()),
    )
    cluster.gpus = max(cluster.gpus, ratio.prefill + ratio.decode)
    changed: dict[str, tuple[float, int]] = {}
    for load in data.draw(st.lists(loads, min_size=2, max_size=8)):
        for _ in range(data.draw(st.integers(1, 6))):
            before = list(cluster.members)
            cluster.latency = data.draw(latencies)
            decision = cluster.tick(load, silent=data.draw(st.sampled_from([(), ("decode-0",), ("prefill-0",)])))
            assert cluster.held <= policy.gpu_budget.max
            for role, change in change_of(decision, before).items():
                bounds = policy.bounds(role)
                assert bounds.min_replicas <= cluster.ratio.of(role) <= bounds.max_replicas
                rule = policy.rule("up" if change > 0 else "down")
                assert abs(change) <= (rule.max_step if cluster.fitted else 1)
                if change:
                    then_s, last = changed.get(role, (float("-inf"), change))
                    if (last > 0) != (change > 0):
                        assert cluster.now_s - then_s >= rule.cooldown_s, "a reversal within the cooldown"
                    changed[role] = cluster.now_s, change
            assert decision.reasons or not decision.actions


@settings(max_examples=60, deadline=None)
@given(policies(), loads, latencies, st.tuples(st.integers(1, 6), st.integers(1, 6)))
def test_while_too_many_requests_are_not_served_nothing_shrinks_but_by_bounds_and_budget(
    policy: Policy, load: OfferedLoad, latency: JointHistogram, counts: tuple[int, int]
) -> None:
    total = sum(latency.counts) + latency.missed
    assume(total >= MIN_REQUESTS and latency.missed > (1 - policy.targets.attainment) * total)
    cluster = Cluster(policy, Ratio(prefill=counts[0], decode=counts[1]), gpus=14)
    cluster.latency = latency
    for decision in cluster.run(load, 60):
        current, target = decision.current, decision.target
        if outside(current, policy, cluster.setup) is None and current != target:
            assert any(target.of(role) > current.of(role) for role in ROLES), (current, target)


@settings(max_examples=20, deadline=None)
@given(policies(), loads, st.integers(1, 6), st.integers(1, 6))
def test_a_steady_load_comes_to_rest(policy: Policy, load: OfferedLoad, prefill: int, decode: int) -> None:
    ratio = Ratio(
        prefill=min(max(prefill, policy.prefill.min_replicas), policy.prefill.max_replicas),
        decode=min(max(decode, policy.decode.min_replicas), policy.decode.max_replicas),
    )
    cluster = Cluster(policy, ratio, gpus=14)
    cluster.run(load, 500)
    assert [action for decision in cluster.run(load, 100) for action in decision.actions] == []


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["starting", "ready", "draining", "flipping", "lost"]), st.booleans(), st.booleans()),
        max_size=9,
    ),
    loads,
    st.integers(0, 9),
    st.booleans(),
)
def test_any_fleet_gets_a_decision_that_names_whom_it_has(
    fleet: list[tuple[str, bool, bool]], load: OfferedLoad, idle: int, grow: bool
) -> None:
    members = [
        replace(
            make_members(Ratio(prefill=1, decode=0))[0],
            name=f"x-{i}",
            role=ROLES[i % 2],
            phase=phase,
            out=out,
            age_s=100.0 * late,
        )  # type: ignore[arg-type]
        for i, (phase, out, late) in enumerate(fleet)
    ]
    signals = make_signals(load, members, idle=idle, can_grow=grow)
    decision = decide(POLICY, signals, AutoscalerState(), START_S)
    assert decision == decide(POLICY, signals, AutoscalerState(), START_S)
    named = [a.name for a in decision.actions if isinstance(a, StopInstance | FlipInstance)]
    assert len(named) == len(set(named)) and set(named) <= {member.name for member in members}
    assert sum(isinstance(a, StartInstance) for a in decision.actions) <= idle


numbers = st.one_of(st.integers(0, 10**12), st.floats(allow_nan=True), st.integers(-(10**9), -1))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.booleans(), st.integers(0, 3), st.integers(0, 3), numbers, numbers, st.floats(-1e3, 1e3)),
        max_size=30,
    )
)
def test_lying_reports_make_no_signal_that_is_no_number(
    said: list[tuple[bool, int, int, float, float, float]],
) -> None:
    window, now_s = SignalWindow(), 100.0
    for router, name, incarnation, first, second, step_s in said:
        now_s += 2.0
        lie = StepTime(fixed_s=step_s, per_token_s=first, num_steps=50)
        report: RouterReport | InstanceReport = (
            RouterReport(
                name=f"router-{name}",
                incarnation=incarnation,
                uptime_s=now_s,
                offered_requests=first,  # type: ignore[arg-type]
                offered_prompt_tokens=second,  # type: ignore[arg-type]
                prompt_tokens=Histogram(bounds=(10.0,), counts=(first, second)),  # type: ignore[arg-type]
            )
            if router
            else InstanceReport(
                name=f"prefill-{name}",
                role="prefill",
                incarnation=incarnation,
                uptime_s=now_s,
                prefill_tokens=first,  # type: ignore[arg-type]
                busy_s=second,
                prefill_step=lie,
                decode_step=lie,
            )
        )
        taken = window.add(report, now_s)
        assert is_sound(report) or not taken
        signals = window.over(30.0, now_s, members=make_members(Ratio(prefill=3, decode=1)))
        load = signals.load
        for value in (load.requests_per_s, load.prompt_mean, load.output_mean, load.output_tokens_per_s):
            assert 0 <= value < float("inf")
        decide(POLICY, signals, AutoscalerState(), START_S + now_s)
