"""The autoscaler in a closed loop with a queueing model of the two phases: how soon, how near, how steady."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
from support.queueing import QueueingModel, Tick, Traffic
from support.scaling import DECODE_STEP, POLICY, PREFILL_STEP

from biphase.planner.policy import GpuBudget, Policy, RoleBounds, RoleFlip, ScaleRule
from biphase.planner.ratio import Ratio

LIGHT = Traffic(1.0, 100, 20)
PROMPTS = Traffic(7.0, 400, 20)
TOKENS = Traffic(6.0, 40, 100)
BOTH = Traffic(6.0, 400, 80)
LOOP = replace(
    POLICY,
    scale_up=ScaleRule(stabilization_s=10.0, cooldown_s=10.0, max_step=8),
    scale_down=ScaleRule(stabilization_s=10.0, cooldown_s=10.0, max_step=8),
    role_flip=RoleFlip(enabled=True, min_gain=0.05, cooldown_s=10.0),
)
TURN_S = 60.0
SETTLED_S = TURN_S + 10.0 + 3 * LOOP.interval_s


def make_model(load: Callable[[float], Traffic], ratio: Ratio, *, start_s: float = 0.0, seed: int = 1) -> QueueingModel:
    return QueueingModel(load, ratio, prefill_step=PREFILL_STEP, decode_step=DECODE_STEP, start_s=start_s, seed=seed)


@cache
def attainment(traffic: Traffic, prefill: int, decode: int) -> float:
    """Of a fixed ratio, tried in the model; of several runs, for near the edge of what a ratio carries they differ much."""
    found = []
    for seed in (9, 20, 21):
        model = make_model(lambda _: traffic, Ratio(prefill=prefill, decode=decode), seed=seed)
        model.run(100.0)
        found.append(model.attainment(LOOP.targets.ttft_ms, LOOP.targets.tpot_ms, 5.0, 90.0))
        if len(found) == 1 and found[0] < 0.5:
            break  # plainly too few
    return sum(found) / len(found)


def best(traffic: Traffic, *, exactly: int | None = None) -> Ratio:
    """The ratio that does it with the fewest instances, or that does it best with exactly so many."""
    found = [Ratio(prefill=p, decode=d) for p in range(1, 5) for d in range(1, 5)]
    if exactly is not None:
        return max((r for r in found if r.prefill + r.decode == exactly), key=lambda r: attainment(traffic, *pair(r)))
    for total in range(2, 9):
        good = [
            r
            for r in found
            if r.prefill + r.decode == total and attainment(traffic, *pair(r)) >= LOOP.targets.attainment
        ]
        if good:
            return max(good, key=lambda r: attainment(traffic, *pair(r)))
    raise AssertionError(f"no ratio carries {traffic}")


def pair(ratio: Ratio) -> tuple[int, int]:
    return ratio.prefill, ratio.decode


def far(ticks: list[Tick], wanted: Ratio, after_s: float) -> list[tuple[float, Ratio]]:
    """When and how it was more than one instance off."""
    return [
        (tick.at_s, tick.ratio)
        for tick in ticks
        if tick.at_s >= after_s
        and max(abs(tick.ratio.prefill - wanted.prefill), abs(tick.ratio.decode - wanted.decode)) > 1
    ]


def step(before: Traffic, after: Traffic) -> Callable[[float], Traffic]:
    return lambda now_s: before if now_s < TURN_S else after


@pytest.mark.parametrize("seed", range(1, 7))
@pytest.mark.parametrize(
    ("before", "after"), [(LIGHT, PROMPTS), (LIGHT, TOKENS), (LIGHT, BOTH), (PROMPTS, TOKENS), (TOKENS, PROMPTS)]
)
def test_within_one_instance_of_the_best_ratio_three_intervals_after_stabilization(
    before: Traffic, after: Traffic, seed: int
) -> None:
    model = make_model(step(before, after), best(before), seed=seed)
    model.autoscale(LOOP, 160.0)
    assert far(model.ticks, best(after), SETTLED_S) == []


MANY_PROMPTS, MANY_TOKENS, MUCH = Traffic(20.0, 400, 20), Traffic(17.0, 40, 100), Traffic(12.0, 400, 60)
LARGE = replace(
    LOOP,
    gpu_budget=GpuBudget(max=16),
    prefill=RoleBounds(max_replicas=8),
    decode=RoleBounds(max_replicas=8),
)


def best_of_many(traffic: Traffic) -> Ratio:
    """The fewest prefill instances that do it beside plenty of decode instances, then the fewest of these."""
    prefill = next(count for count in range(1, 9) if attainment(traffic, count, 8) >= LOOP.targets.attainment)
    decode = next(count for count in range(1, 9) if attainment(traffic, prefill, count) >= LOOP.targets.attainment)
    return Ratio(prefill=prefill, decode=decode)


@pytest.mark.parametrize(
    ("before", "after", "seed"),
    [
        (LIGHT, MANY_PROMPTS, 1),
        (LIGHT, MANY_PROMPTS, 2),
        (LIGHT, MANY_PROMPTS, 3),
        (LIGHT, MUCH, 1),
        (LIGHT, MUCH, 2),
        (MANY_PROMPTS, MANY_TOKENS, 1),
        (MANY_PROMPTS, MANY_TOKENS, 2),
        (MANY_PROMPTS, MANY_TOKENS, 9),
        (MANY_TOKENS, MANY_PROMPTS, 1),
        (MANY_TOKENS, MANY_PROMPTS, 30),
    ],
)
def test_a_large_turn_is_made_at_once(before: Traffic, after: Traffic, seed: int) -> None:
    model = make_model(step(before, after), best_of_many(before), seed=seed)
    model.autoscale(LARGE, 130.0)
    assert far(model.ticks, best_of_many(after), SETTLED_S) == []


@pytest.mark.parametrize(
    ("before", "after", "seed", "more_s"),
    [
        # prompts that waited for the last change miss their goal long after it, and are no reason to stay
        (Traffic(5.45, 536, 165, 0.0), Traffic(7.21, 130, 156, 0.0), 104, 0.0),
        # answers that began before the turn end long after it
        (Traffic(5.33, 100, 272, 0.6), Traffic(27.77, 69, 24), 209, 10.0),
        # of answers that pile up those that have ended are the short ones
        (LIGHT, Traffic(4.17, 263, 225, 0.6), 90, 10.0),
        (Traffic(13.56, 127, 15, 0.0), Traffic(9.67, 282, 127, 0.6), 118, 10.0),
    ],
)
def test_what_is_left_of_the_load_before_holds_little_up(
    before: Traffic, after: Traffic, seed: int, more_s: float
) -> None:
    """``more_s``: of two loads that differ by how long answers are nobody can tell before some have ended."""
    model = make_model(step(before, after), best_of_many(before), seed=seed)
    model.autoscale(replace(LARGE, window_s=60.0), 130.0)
    assert far(model.ticks, best_of_many(after), SETTLED_S + more_s) == []


@pytest.mark.parametrize("seed", [1, 2])
def test_under_a_fixed_budget_the_ratio_turns_and_turns_back(seed: int) -> None:
    policy = replace(LOOP, gpu_budget=GpuBudget(min=3, max=3))
    model = make_model(lambda t: PROMPTS if t < 60 or t >= 180 else TOKENS, Ratio(prefill=2, decode=1), seed=seed)
    model.autoscale(policy, 300.0)
    turned = [tick.ratio for tick in model.ticks if 60 + 25 <= tick.at_s <= 180]
    back = [tick.ratio for tick in model.ticks if tick.at_s >= 180 + 25]
    assert set(turned) == {best(TOKENS, exactly=3)} == {Ratio(prefill=1, decode=2)}
    assert set(back) == {best(PROMPTS, exactly=3)} == {Ratio(prefill=2, decode=1)}
    for begin_s, end_s in ((110.0, 180.0), (230.0, 290.0)):
        assert model.attainment(policy.targets.ttft_ms, policy.targets.tpot_ms, begin_s, end_s) >= 0.9
    reversals = [tick.at_s for tick in model.ticks if tick.decision is not None and tick.decision.actions]
    assert len(reversals) == 2


@pytest.mark.parametrize("after", [PROMPTS, TOKENS, BOTH])
def test_delayed_starts_overshoot_by_no_more_than_one(after: Traffic) -> None:
    wanted = best(after)
    model = make_model(step(LIGHT, after), best(LIGHT), start_s=40.0, seed=4)
    model.autoscale(LOOP, 260.0)
    most = [max(pair(tick.ratio)[i] for tick in model.ticks) for i in (0, 1)]
    assert most[0] <= wanted.prefill + 1 and most[1] <= wanted.decode + 1
    assert far(model.ticks, wanted, SETTLED_S) == []


def test_a_ramp_is_followed() -> None:
    model = make_model(lambda t: Traffic(1.0 + min(t, 200.0) / 200.0 * 9.0, 400, 20), Ratio(prefill=1, decode=1))
    model.autoscale(LOOP, 260.0)
    prefills = [tick.ratio.prefill for tick in model.ticks]
    assert prefills == sorted(prefills), "never down while it rises"
    assert prefills[-1] in (3, 4)
    assert model.attainment(LOOP.targets.ttft_ms, LOOP.targets.tpot_ms, 210.0, 250.0) >= 0.9


def test_steady_load_with_headroom_settles_and_stays() -> None:
    """Random arrivals; at the very edge of a ratio's capacity they may ask for one more and give it back."""
    for traffic in (LIGHT, Traffic(6.0, 400, 20), Traffic(5.0, 40, 100)):
        model = make_model(lambda _, traffic=traffic: traffic, best(traffic), seed=7)
        model.autoscale(LOOP, 300.0)
        late = [tick.ratio for tick in model.ticks if tick.at_s > 60]
        changes = sum(a != b for a, b in itertools.pairwise(late))
        assert changes <= 1, late


def test_a_burst_moves_nothing_and_silence_shrinks_to_the_minima() -> None:
    model = make_model(lambda t: Traffic(20.0, 100, 5) if 60 <= t < 65 else LIGHT, Ratio(prefill=1, decode=1))
    model.autoscale(LOOP, 120.0)
    assert {tick.ratio for tick in model.ticks} == {Ratio(prefill=1, decode=1)}
    model = make_model(lambda t: PROMPTS if t < 60 else Traffic(0.0, 1, 1), Ratio(prefill=3, decode=2))
    model.autoscale(LOOP, 140.0)
    assert model.ticks[-1].ratio == Ratio(prefill=1, decode=1)


def test_a_dry_run_leaves_the_ratio_alone() -> None:
    policy: Policy = replace(LOOP, dry_run=True)
    model = make_model(step(LIGHT, PROMPTS), Ratio(prefill=1, decode=1))
    model.autoscale(policy, 120.0)
    assert {tick.ratio for tick in model.ticks} == {Ratio(prefill=1, decode=1)}
    assert model.ticks[-1].decision is not None and model.ticks[-1].decision.target.prefill > 1
