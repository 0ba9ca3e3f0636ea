"""What a book of steps says: totals, overlap, the step under way, and what the fits know."""

import pytest

from biphase.engine.step import SeqStep, StepPlan
from biphase.engine.step_book import StepBook, StepFits
from biphase.protos.ids import SeqId
from biphase.protos.values import Load

LOAD = Load(queued_tokens=7, queued=2, running=3, free_blocks=9)


def plan(*lengths: int, start: int = 0) -> StepPlan:
    return StepPlan(
        seqs=tuple(
            SeqStep(seq_id=SeqId(n), token_ids=[1] * num, start=start, blocks=[]) for n, num in enumerate(lengths)
        )
    )


def test_tokens_of_chunks_are_prefill_single_ones_decode() -> None:
    book = StepBook(100.0)
    book.launched(plan(10, 1, 1), 100.0)
    book.over(100.5)
    said = book.signals(LOAD, 33, 101.0)
    assert (said.prefill_tokens, said.decode_tokens, said.num_steps) == (10, 2, 1)
    assert (said.uptime_s, said.busy_s, said.running_tokens) == (1.0, 0.5, 33)
    assert (said.queued, said.queued_tokens, said.running, said.free_blocks) == (2, 7, 3, 9)
    assert (said.recent.num_steps, said.recent.seconds, said.recent.tokens) == (1, 0.5, 12)
    assert said.prefill_step.num_steps == 1 and said.decode_step.num_steps == 0


def test_steps_that_overlap_are_busy_once() -> None:
    book = StepBook(0.0)
    book.launched(plan(1), 0.0)
    book.launched(plan(1), 0.1)
    book.over(1.0)
    book.over(1.5)
    book.launched(plan(1), 3.0)
    book.over(3.25)
    assert book.signals(LOAD, 0, 4.0).busy_s == pytest.approx(1.0 + 0.5 + 0.25)


def test_a_step_under_way_is_busy_and_a_long_one_recent() -> None:
    book = StepBook(0.0)
    book.launched(plan(4), 2.0)
    short, long = book.signals(LOAD, 0, 2.5), book.signals(LOAD, 0, 7.0)
    assert (short.busy_s, short.recent.num_steps, short.num_steps) == (0.5, 0, 0)
    assert (long.busy_s, long.recent.num_steps, long.recent.seconds, long.num_steps) == (5.0, 1, 5.0, 0)
    book.over(7.5)
    assert book.signals(LOAD, 0, 7.5).busy_s == 5.5


def test_a_failed_step_takes_time_and_teaches_nothing() -> None:
    book = StepBook(0.0)
    book.launched(plan(4), 0.0)
    book.over(1.0, failed=True)
    said = book.signals(LOAD, 0, 1.0)
    assert (said.busy_s, said.num_steps, said.recent.num_steps, said.prefill_step.num_steps) == (1.0, 0, 0, 0)


def test_fits_outlive_a_life() -> None:
    fits = StepFits()
    for life in range(2):
        book = StepBook(10.0 * life)
        book.fits = fits
        for step in range(20):
            at_s = 10.0 * life + 0.1 * step
            book.launched(plan(1, 1, start=step), at_s)
            book.over(at_s + 0.01)
        assert book.signals(LOAD, 0, 10.0 * life + 5).decode_step.num_steps == 20 * (life + 1)
    assert fits.decode.step_time().seconds(2, 20) == pytest.approx(0.01, rel=0.2)
