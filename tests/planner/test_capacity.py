"""Forecasts: what n instances make of a load, against simple truths and against the queueing model."""

import itertools
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.queueing import QueueingModel, Traffic
from support.scaling import DECODE_STEP, POLICY, PREFILL_STEP, make_load

from biphase.planner.capacity import DecodeModel, PrefillModel, RoleShape, Setup, prior_of
from biphase.planner.policy import GpuBudget, RoleBounds, Targets
from biphase.planner.ratio import Outlook, Ratio, choose
from biphase.protos.step_time import StepTime
from biphase.protos.values import Role

TARGETS = POLICY.targets
STEPS: dict[Role, StepTime] = {"prefill": PREFILL_STEP, "decode": DECODE_STEP}


def test_no_load_meets_every_goal_and_no_instance_meets_none() -> None:
    for load, wanted in ((make_load(0.0), 1.0), (make_load(1.0), 0.0)):
        count = 1 if wanted else 0
        assert PrefillModel(load, PREFILL_STEP, RoleShape(), TARGETS).at(count).attainment == wanted
        assert DecodeModel(load, DECODE_STEP, RoleShape(), TARGETS).at(count).attainment == wanted


@settings(max_examples=40, deadline=None)
@given(st.floats(0.1, 50.0), st.floats(10.0, 2000.0), st.floats(2.0, 400.0))
def test_more_instances_never_do_worse(rate: float, prompt: float, output: float) -> None:
    load = make_load(rate, prompt=prompt, output=output)
    for model in (
        PrefillModel(load, PREFILL_STEP, RoleShape(), TARGETS),
        DecodeModel(load, DECODE_STEP, RoleShape(), TARGETS),
    ):
        found = [model.at(count).attainment for count in range(12)]
        assert all(b >= a - 1e-6 for a, b in itertools.pairwise(found)), found
        assert all(0.0 <= value <= 1.0 + 1e-9 for value in found)


def test_one_prompt_at_a_time_is_the_queue_of_the_books() -> None:
    """M/D/1: at half load the mean wait is half a service; beyond it the tail is exponential."""
    load = make_load(1.0, prompt=500, output=2)
    step = StepTime(per_token_s=1e-3, num_steps=9)
    at_half = PrefillModel(load, step, RoleShape(max_num_batched_tokens=500), Targets(ttft_ms=1000.0)).at(1)
    assert at_half.utilisation == pytest.approx(0.5)
    assert at_half.attainment == pytest.approx(1 - 0.5 * 2.718281828**-1, abs=1e-6)


def test_kv_blocks_bound_decode() -> None:
    load = make_load(4.0, prompt=400, output=50)
    free = DecodeModel(load, DECODE_STEP, RoleShape(), TARGETS)
    bound = DecodeModel(load, DECODE_STEP, RoleShape(kv_tokens=1700), TARGETS)
    assert not free.kv_bound and bound.kv_bound
    assert bound.most == pytest.approx(0.95 * 1700 / 425)
    assert bound.at(1).attainment < 0.9 < free.at(1).attainment
    assert bound.at(4).attainment > 0.9


def test_a_higher_percentile_needs_more_prefill() -> None:
    load = make_load(4.0, prompt=400, output=2)
    counts = []
    for percentile in (50.0, 99.0):
        targets = Targets(ttft_ms=500.0, tpot_ms=100.0, percentile=percentile, attainment=percentile / 100)
        outlook = Outlook(load, STEPS, Setup(), targets)
        chosen = choose(outlook, replace(POLICY, targets=targets), Ratio(prefill=1, decode=1), most_gpus=8)
        counts.append(chosen.prefill)
    assert counts[0] < counts[1]


def test_the_prior_is_the_deployments_or_what_its_limits_are_meant_for() -> None:
    told = RoleShape(step_time=StepTime(fixed_s=1.0, num_steps=1))
    assert prior_of("prefill", told, TARGETS).fixed_s == 1.0
    decode = prior_of("decode", RoleShape(max_num_seqs=32), TARGETS)
    assert decode.seconds(32, 0) == pytest.approx(TARGETS.tpot_ms / 1e3)
    prefill = prior_of("prefill", RoleShape(max_num_batched_tokens=512), TARGETS)
    assert prefill.seconds(512, 0) == pytest.approx(TARGETS.ttft_ms / 4e3)


def test_a_narrow_budget_is_filled_as_instances_of_several_gpus_allow() -> None:
    setup = Setup(prefill=RoleShape(gpus=4.0), decode=RoleShape(gpus=2.0))
    policy = replace(
        POLICY,
        gpu_budget=GpuBudget(min=7, max=7),
        prefill=RoleBounds(min_replicas=1, max_replicas=2),
        decode=RoleBounds(min_replicas=1, max_replicas=4),
    )
    outlook = Outlook(make_load(0.0), STEPS, setup, TARGETS)
    assert choose(outlook, policy, Ratio(prefill=1, decode=1), most_gpus=100) == Ratio(prefill=1, decode=1)


def test_colocated_decode_instances_prefill_as_well() -> None:
    load = make_load(3.0, prompt=400, output=20)
    alone = Outlook(load, STEPS, Setup(colocated=True), TARGETS)
    beside = Outlook(load, STEPS, Setup(), TARGETS)
    assert alone.forecast("decode", 1).utilisation > 2 * beside.forecast("decode", 1).utilisation


@pytest.mark.parametrize(
    ("traffic", "ratio"),
    [
        (Traffic(2.0, 400, 30), Ratio(prefill=1, decode=1)),
        (Traffic(6.0, 400, 20), Ratio(prefill=2, decode=1)),
        (Traffic(3.0, 100, 80), Ratio(prefill=1, decode=1)),
        (Traffic(5.0, 40, 100), Ratio(prefill=1, decode=2)),
        (Traffic(9.0, 40, 100), Ratio(prefill=1, decode=2)),
        (Traffic(8.0, 400, 20), Ratio(prefill=1, decode=1)),
    ],
)
def test_forecasts_agree_with_the_queueing_model(traffic: Traffic, ratio: Ratio) -> None:
    """Where the model says that the goals are met the forecast does, and where they are missed it does."""
    model = QueueingModel(lambda _: traffic, ratio, prefill_step=PREFILL_STEP, decode_step=DECODE_STEP, seed=3)
    model.run(130.0)
    measured = model.attainment(TARGETS.ttft_ms, TARGETS.tpot_ms, 5.0, 110.0)
    load = make_load(traffic.requests_per_s, prompt=traffic.prompt, output=traffic.output)
    forecast = Outlook(load, STEPS, model.setup, TARGETS).attainment(ratio)
    assert (forecast >= 0.9) == (measured >= 0.9), (forecast, measured)
