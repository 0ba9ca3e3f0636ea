"""The fit of step times: exact on exact steps, never negative, forgetting only what is contradicted."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from biphase.engine.step import SeqStep, StepPlan
from biphase.engine.step_fit import RecentWindow, StepFit, is_prefill, work_of
from biphase.protos.ids import BlockId, SeqId
from biphase.protos.step_time import RecentSteps, StepTime, attended

TRUE = StepTime(fixed_s=8e-3, per_token_s=2e-4, per_context_s=3e-7, num_steps=1)


def make_seq(tokens: int, start: int) -> SeqStep:
    return SeqStep(seq_id=SeqId(start), token_ids=range(tokens), start=start, blocks=(BlockId(0),))


def book(fit: StepFit, truth: StepTime, batches: list[int], context: int, noise: float = 0.0) -> None:
    chance = random.Random(3)
    for batch in batches:
        seconds = truth.seconds(batch, batch * context) * (1 + chance.uniform(-noise, noise))
        fit.add(batch, batch * context, seconds)


def test_a_steps_work_is_its_tokens_and_what_they_attend_to() -> None:
    chunk, decode = make_seq(4, start=10), make_seq(1, start=7)
    assert work_of(StepPlan(seqs=(chunk, decode))) == (5, (11 + 12 + 13 + 14) + 8)
    assert attended(10, 4) == 50
    assert is_prefill(StepPlan(seqs=(chunk, decode)))
    assert not is_prefill(StepPlan(seqs=(decode,)))


def test_nothing_is_known_before_the_first_step() -> None:
    assert StepFit().step_time() == StepTime()
    assert not StepFit().step_time().is_known


def test_exact_steps_give_the_coefficients_back() -> None:
    fit = StepFit()
    for context in (50, 200, 900):
        book(fit, TRUE, [1, 2, 4, 8, 16, 32], context)
    found = fit.step_time()
    assert found.num_steps == 18
    assert found.seconds(64, 64 * 1000) == pytest.approx(TRUE.seconds(64, 64 * 1000), rel=1e-3)
    assert found.fixed_s == pytest.approx(TRUE.fixed_s, rel=0.01)


def test_noise_and_stalls_bend_it_little() -> None:
    fit = StepFit()
    for context in (50, 200, 900):
        book(fit, TRUE, [1, 2, 4, 8, 16, 32] * 20, context, noise=0.2)
    fit.add(8, 8 * 200, 10.0)
    assert fit.step_time().seconds(32, 32 * 500) == pytest.approx(TRUE.seconds(32, 32 * 500), rel=0.15)


def test_hours_of_small_steps_do_not_forget_what_a_large_one_took() -> None:
    fit = StepFit()
    for context in (64, 500):
        book(fit, TRUE, [1, 8, 32], context)
    book(fit, TRUE, [1] * 20_000, 64)
    assert fit.step_time().seconds(32, 32 * 500) == pytest.approx(TRUE.seconds(32, 32 * 500), rel=0.02)


def test_a_machine_that_has_become_slower_is_believed() -> None:
    fit = StepFit()
    slower = StepTime(fixed_s=3 * TRUE.fixed_s, per_token_s=3 * TRUE.per_token_s, per_context_s=3 * TRUE.per_context_s)
    for truth in (TRUE, slower):
        for context in (64, 500):
            book(fit, truth, [1, 4, 16] * 200, context)
    assert fit.step_time().seconds(16, 16 * 300) == pytest.approx(slower.seconds(16, 16 * 300), rel=0.1)


def test_what_can_be_no_measurement_is_left_out() -> None:
    fit = StepFit()
    for seconds in (0.0, -1.0, float("nan"), float("inf")):
        fit.add(1, 1, seconds)
    fit.add(0, 0, 1.0)
    assert repr(fit) == "<StepFit [0 steps in 0 buckets]>"


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 100_000), st.integers(0, 10**10), st.floats(1e-6, 1e4)), min_size=1, max_size=40)
)
def test_no_coefficient_is_ever_negative(steps: list[tuple[int, int, float]]) -> None:
    fit = StepFit()
    for tokens, context, seconds in steps:
        fit.add(tokens, context, seconds)
    assert fit.step_time().is_known


def test_one_kind_of_step_is_predicted_as_it_was_seen() -> None:
    fit = StepFit()
    book(fit, TRUE, [4] * 10, 100)
    assert fit.step_time().seconds(4, 400) == pytest.approx(TRUE.seconds(4, 400), rel=1e-3)


def test_recent_steps_leave_the_window() -> None:
    window = RecentWindow(within_s=10.0)
    for second in range(20):
        window.add(2, 30, 0.5, now_s=float(second))
    assert window.total(19.0) == RecentSteps(num_steps=11, seconds=5.5, tokens=22, context_tokens=330)
    assert window.total(40.0) == RecentSteps()
    slow = RecentSteps(num_steps=2, seconds=9.0, tokens=10, context_tokens=100)
    assert slow.expected_s(TRUE) == pytest.approx(2 * 8e-3 + 10 * 2e-4 + 100 * 3e-7)
