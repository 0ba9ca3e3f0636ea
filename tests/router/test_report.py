"""Totals of offered load and of what came of it."""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from biphase.router.report import ENDINGS, LENGTHS, MISSED, TPOT_MS, TTFT_MS, LoadReport, Running, bucket

WIDTH = len(TPOT_MS) + 1


def test_bounds_are_even_and_readable() -> None:
    assert (TTFT_MS[0], TTFT_MS[10], TTFT_MS[-1]) == (1.0, 10.0, 100_000.0)
    assert (TPOT_MS[0], TPOT_MS[20], TPOT_MS[-1]) == (1.0, 100.0, 10_000.0)
    assert list(TTFT_MS) == sorted(set(TTFT_MS)) and list(LENGTHS) == sorted(LENGTHS)
    assert [bucket((1.0, 2.0), value) for value in (0.5, 1.0, 1.9, 2.0, 9.0)] == [0, 1, 1, 2, 2]


def test_a_request_is_offered_once_and_ends_once() -> None:
    report = LoadReport()
    report.offered(100, prompt_chars=300)
    report.offered(7)
    report.offered_unread(30)  # at three characters a token
    report.ended("finished", output_tokens=20, ttft_ms=55.0, tpot_ms=12.0)
    report.ended("refused", output_tokens=0, ttft_ms=None, tpot_ms=None)
    slow = Running(output_tokens=3, ttft_ms=1500.0, tpot_ms=40.0)
    waits = Running(output_tokens=0, ttft_ms=100.0, tpot_ms=None)
    now = report.snapshot([slow, waits])
    assert (now.offered_requests, now.offered_prompt_tokens, now.offered_output_tokens) == (3, 117, 23)
    assert now.ended == {"finished": 1, "cancelled": 0, "refused": 1, "expired": 0, "failed": 0}
    place = bucket(TTFT_MS, 55.0) * WIDTH + bucket(TPOT_MS, 12.0)
    assert [index for index, count in enumerate(now.latency.counts) if count] == [place]
    assert now.latency.missed == 1
    place = bucket(TTFT_MS, 1500.0) * WIDTH + bucket(TPOT_MS, 40.0)
    assert [index for index, count in enumerate(now.running.counts) if count] == [place], "what waits has no pace yet"
    assert (sum(now.prompt_tokens), sum(now.output_tokens)) == (3, 1)
    assert repr(report).startswith("<LoadReport [3 offered")


def test_text_that_was_never_read_is_guessed_at() -> None:
    report = LoadReport()
    report.offered_unread(40)
    report.offered_unread(0)
    assert report.snapshot([]).offered_prompt_tokens == 11


ENDS = st.tuples(st.sampled_from(ENDINGS), st.integers(0, 500), st.floats(0, 1e6), st.floats(0, 1e5))


@given(ends=st.lists(ENDS, max_size=40))
def test_totals_never_fall_and_every_request_is_somewhere(ends: list[Any]) -> None:
    report = LoadReport()
    before = report.snapshot([])
    for ending, tokens, ttft_ms, tpot_ms in ends:
        report.offered(1)
        report.ended(ending, output_tokens=tokens, ttft_ms=ttft_ms if tokens else None, tpot_ms=tpot_ms)
        now = report.snapshot([])
        assert all(a <= b for a, b in zip(before.latency.counts, now.latency.counts, strict=True))
        assert now.offered_output_tokens >= before.offered_output_tokens
        before = now
    unseen = sum(1 for ending, tokens, _, _ in ends if ending not in MISSED and not tokens)
    assert sum(before.latency.counts) + before.latency.missed + unseen == len(ends)
    assert before.latency.missed == sum(1 for ending, *_ in ends if ending in MISSED)
