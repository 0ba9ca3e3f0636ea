"""What was measured against what is forecast: nothing shrinks for want of load while requests miss their goals."""

from dataclasses import replace

import pytest
from support.scaling import POLICY, START_S, Cluster, make_load, make_members, make_signals

from biphase.planner.autoscaler import decide
from biphase.planner.autoscaler_state import AutoscalerState
from biphase.planner.capacity import OfferedLoad
from biphase.planner.policy import Policy, RoleBounds
from biphase.planner.ratio import Ratio
from biphase.planner.reports import JointHistogram

QUIET = make_load(0.2)
LARGE = Ratio(prefill=3, decode=2)
LEAST = Ratio(prefill=1, decode=1)


def seen(*counts: int, missed: int = 0) -> JointHistogram:
    """(met both goals, missed TPOT, missed TTFT, missed both) and those that were not served."""
    return JointHistogram(ttft_ms=(800.0,), tpot_ms=(40.0,), counts=counts, missed=missed)


def settled(latency: JointHistogram, policy: Policy = POLICY, load: OfferedLoad = QUIET) -> tuple[Ratio, str]:
    """What is left of a large deployment, by default under hardly any load, and the last reasons."""
    cluster = Cluster(policy, LARGE)
    cluster.latency = latency
    found = cluster.run(load, 100)
    return cluster.ratio, "; ".join(found[-1].reasons)


@pytest.mark.parametrize(
    ("latency", "left", "reason"),
    [
        (seen(200, 0, 0, 0, missed=5000), LARGE, "only 4% of 5200 requests met their goals, more was forecast"),
        (seen(0, 0, 0, 0, missed=5000), LARGE, "prefill and decode stay: only 0% of 5000 requests"),
        (JointHistogram(missed=20), LARGE, "only 0% of 20 requests"),
        (JointHistogram(missed=19), LEAST, ""),
        (seen(1000, 0, 0, 0, missed=50), LEAST, ""),
        (seen(20, 0, 30, 0), Ratio(prefill=3, decode=1), "prefill stays: only 40% of 50 requests"),
        (seen(89, 0, 5, 0, missed=6), Ratio(prefill=3, decode=1), "prefill stays: only 89% of 100 requests"),
        (seen(88, 6, 6, 0), LARGE, "prefill and decode stay: only 88% of 100 requests"),
    ],
)
def test_requests_that_nobody_served_have_missed_both_goals(latency: JointHistogram, left: Ratio, reason: str) -> None:
    ratio, said = settled(latency)
    assert ratio == left
    assert reason in said


def test_the_newest_count_alone_where_they_are_enough_misses_too() -> None:
    members = make_members(LARGE)
    bad, good = seen(0, 0, 0, 0, missed=500), seen(500, 0, 0, 0)
    for recent, latency, kept in ((bad, good, True), (good, bad, False), (JointHistogram(missed=5), good, False)):
        state, now_s = AutoscalerState(), START_S
        for _ in range(6):
            now_s += POLICY.interval_s
            signals = replace(make_signals(QUIET, members), recent=recent, latency=latency)
            decision = decide(POLICY, signals, state, now_s)
            state = decision.state
        assert (decision.target == LARGE) is kept


def test_where_not_even_the_forecast_is_good_refusals_keep_what_is_there() -> None:
    bounded = replace(POLICY, decode=RoleBounds(min_replicas=1, max_replicas=2))
    tokens = make_load(20.0, prompt=20, output=100)  # far more than 2 decode instances can do
    late, _ = settled(seen(0, 100, 0, 0), bounded, tokens)
    assert late == Ratio(prefill=1, decode=2), "where the forecast agrees it is what chooses"
    ratio, said = settled(seen(0, 0, 0, 0, missed=100), bounded, tokens)
    assert ratio == LARGE
    assert said.endswith("prefill stays: only 0% of 100 requests met their goals")


def test_bounds_are_kept_whatever_is_missed() -> None:
    bounded = replace(POLICY, prefill=RoleBounds(min_replicas=1, max_replicas=2))
    assert settled(seen(0, 0, 0, 0, missed=100), bounded)[0] == Ratio(prefill=2, decode=2)
