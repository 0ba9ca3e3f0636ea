"""The arrival process: counts follow the rate, order and ends hold, nothing is lost at a phase's change."""

import math
import random

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from biphase.client.bench.arrivals import Arrival, Phase, arrivals, total_s
from biphase.client.bench.lengths import fixed


def phase(rate: float, seconds: float = math.inf, rate_end: float | None = None, burstiness: float = 1.0) -> Phase:
    return Phase(
        name="",
        seconds=seconds,
        rate=rate,
        rate_end=rate if rate_end is None else rate_end,
        burstiness=burstiness,
        input_tokens=fixed(3),
        output_tokens=fixed(5),
    )


def drawn(*phases: Phase, seed: int = 0, most: int | None = None) -> list[Arrival]:
    return list(arrivals(phases, random.Random(seed), most))


rates = st.one_of(st.just(0.0), st.floats(0.01, 50))
phases = st.lists(
    st.builds(
        phase,
        rate=rates,
        seconds=st.floats(0.1, 20),
        rate_end=rates,
        burstiness=st.sampled_from([0.2, 1.0, 5.0, math.inf]),
    ),
    min_size=1,
    max_size=4,
)


@example(phases=[phase(0.0, seconds=12.52734375, rate_end=17.6875, burstiness=0.2)], seed=223)
@given(phases=phases, seed=st.integers(0, 1000))
def test_arrivals_are_in_order_and_inside_their_phase(phases: list[Phase], seed: int) -> None:
    found = drawn(*phases, seed=seed)
    assert [one.index for one in found] == list(range(len(found)))
    assert [one.at_s for one in found] == sorted(one.at_s for one in found)
    for one in found:
        began_s = total_s(phases[: one.phase])
        assert began_s - 1e-9 <= one.at_s <= began_s + phases[one.phase].seconds + 1e-9
        assert phases[one.phase].expected > 0
    assert found == drawn(*phases, seed=seed)


@given(phases=phases)
def test_equal_gaps_give_exactly_the_expected_count(phases: list[Phase]) -> None:
    even = [phase(one.rate, seconds=one.seconds, rate_end=one.rate_end, burstiness=math.inf) for one in phases]
    assert len(drawn(*even)) == pytest.approx(sum(one.expected for one in even), abs=1.001)


@given(rate=rates, rate_end=rates, seconds=st.floats(0.1, 100), share=st.floats(0, 1))
@example(rate=0.0, rate_end=0.1, seconds=100.0, share=5e-324)
def test_seconds_at_inverts_the_integral_of_the_rate(
    rate: float, rate_end: float, seconds: float, share: float
) -> None:
    one = phase(rate, seconds=seconds, rate_end=rate_end)
    expected = share * one.expected
    at_s = one.seconds_at(expected)
    assert 0 <= at_s <= seconds
    assert rate * at_s + (rate_end - rate) / seconds * at_s**2 / 2 == pytest.approx(expected, abs=1e-6, rel=1e-6)


@pytest.mark.parametrize("burstiness", [0.5, 1.0, 4.0])
def test_counts_and_spread_follow_rate_and_burstiness(burstiness: float) -> None:
    counts = [len(drawn(phase(10.0, seconds=10.0, burstiness=burstiness), seed=seed)) for seed in range(300)]
    mean = sum(counts) / len(counts)
    variance = sum((count - mean) ** 2 for count in counts) / len(counts)
    assert mean == pytest.approx(100, abs=2.5)
    assert variance == pytest.approx(100 / burstiness, rel=0.3)


def test_a_silent_phase_only_shifts_what_follows() -> None:
    found = drawn(phase(2.0, seconds=5.0), phase(0.0, seconds=100.0), phase(2.0, seconds=5.0), seed=4)
    together = drawn(phase(2.0, seconds=10.0), seed=4)
    assert [one.at_s - (100.0 if one.phase == 2 else 0.0) for one in found] == pytest.approx(
        [one.at_s for one in together]
    )


def test_an_infinite_rate_sends_all_at_once() -> None:
    assert [one.at_s for one in drawn(phase(math.inf), most=5)] == [0.0] * 5


def test_a_number_of_requests_ends_it() -> None:
    assert len(drawn(phase(3.0), most=7)) == 7
    assert len(drawn(phase(1.0, seconds=3.0, burstiness=math.inf), most=70)) == 2  # at 1 s and 2 s
