"""Figures from what was measured."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from biphase.client.bench.goals import parse_goals
from biphase.client.bench.measured import DONE, NOT_SENT, Measured
from biphase.client.bench.summary import PERCENTILES, percentile, spread_of, summarize, windows
from biphase.protos.errors import SetupError


def one(
    *token_at_s: float, sent_s: float = 0.0, kind: str = DONE, index: int = 0, late_s: float = 0.0, wrong: bool = False
) -> Measured:
    return Measured(
        index=index,
        phase=0,
        due_s=sent_s - late_s,
        sent_s=sent_s,
        ended_s=max((sent_s, *token_at_s)),
        token_at_s=token_at_s,
        input_tokens=10,
        asked_tokens=len(token_at_s),
        kind=kind,
        detail="" if kind == DONE else f"the detail of {kind}",
        wrong=wrong,
        checked=wrong,
    )


def test_the_four_times_of_a_request() -> None:
    found = one(1.5, 1.75, 1.75, 3.0, sent_s=1.0)
    assert (found.ttft_ms, found.tpot_ms, found.e2e_ms) == (500.0, 500.0, 2000.0)
    assert found.itl_ms == [250.0, 0.0, 1250.0]
    single, none = one(1.5, sent_s=1.0), one(kind="UNAVAILABLE")
    assert (single.tpot_ms, single.itl_ms, none.ttft_ms) == (None, [], None)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50), st.floats(0, 100))
def test_percentiles_are_those_of_numpy(values: list[float], percent: float) -> None:
    assert percentile(sorted(values), percent) == pytest.approx(
        float(np.percentile(values, percent)), rel=1e-6, abs=1e-6
    )


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=50))
def test_a_spread_is_ordered(values: list[float]) -> None:
    spread = spread_of(values)
    assert spread is not None
    in_order = [spread.percentiles[percent] for percent in PERCENTILES] + [spread.maximum]
    assert in_order == sorted(in_order)
    assert spread.count == len(values)


def test_a_spread_of_nothing_is_none() -> None:
    assert spread_of([]) is None


def test_refused_failed_wrong_and_unsent_requests_are_misses() -> None:
    found = [
        one(0.4, 0.5),
        one(0.6, 0.7),  # too late
        one(0.4, 0.6),  # too slow
        one(0.1, kind="UNAVAILABLE"),
        one(kind="RESOURCE_EXHAUSTED"),
        one(kind="RESOURCE_EXHAUSTED"),
        one(kind=NOT_SENT),
        one(0.4, 0.5, wrong=True),
    ]
    summary = summarize(found, parse_goals(["ttft:500", "tpot:150"]))
    assert (summary.offered, summary.done, summary.met, summary.wrong) == (8, 4, 1, 1)
    assert summary.attainment == 1 / 8
    assert summary.goodput == pytest.approx(1 / 0.7)
    assert summary.errors == {"RESOURCE_EXHAUSTED": 2, "UNAVAILABLE": 1, NOT_SENT: 1}
    assert summary.examples["UNAVAILABLE"] == "the detail of UNAVAILABLE"


def test_without_goals_there_is_no_attainment() -> None:
    summary = summarize([one(0.4)], {})
    assert (summary.attainment, summary.goodput) == (None, None)


def test_an_empty_load_has_figures() -> None:
    summary = summarize([], parse_goals(["ttft:1"]))
    assert (summary.offered, summary.seconds, summary.attainment, summary.spreads) == (0, 0.0, None, {})


def test_lateness_is_the_generators() -> None:
    assert summarize([one(2.0, sent_s=1.0, late_s=0.25), one(2.0, sent_s=1.0)], {}).late_ms == 250.0


@given(st.lists(st.floats(0, 29.999), max_size=40))
def test_windows_hold_every_request_once(dues: list[float]) -> None:
    found = windows([one(sent_s=due, index=at) for at, due in enumerate(dues)], 10.0, 30.0)
    assert len(found) == 3
    assert sorted(one.index for window in found for one in window) == list(range(len(dues)))
    for at, window in enumerate(found):
        assert all(10.0 * at <= one.due_s < 10.0 * (at + 1) for one in window)


def test_what_is_due_after_the_end_is_in_no_window() -> None:
    assert windows([one(sent_s=30.0)], 10.0, 30.0) == [[], [], []]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tft:5"], "unknown metric 'tft': did you mean ttft"),
        (["speed:5"], "unknown metric 'speed'"),
        (["ttft"], "'ttft' is not METRIC:MILLISECONDS"),
        (["ttft:0"], "a finite number above 0"),
        (["tpot:inf"], "a finite number above 0"),
        (["tpot:5", "tpot:6"], "tpot is given twice"),
    ],
)
def test_goals_that_make_no_sense_are_one_line(words: list[str], message: str) -> None:
    with pytest.raises(SetupError, match=message):
        parse_goals(words)
