"""Signals: differences of cumulative reports, stale sources, new lives, sudden changes of the load."""

import pytest
from support.scaling import DECODE_STEP, PREFILL_STEP, make_members

from biphase.planner.flow import Flow
from biphase.planner.ratio import Ratio
from biphase.planner.reports import Histogram, InstanceReport, JointHistogram, RouterReport
from biphase.planner.signals import SignalWindow

BOUNDS = (10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0)


class Source:
    """A router's counters under a steady flow of equal requests."""

    def __init__(self, name: str = "router-0", incarnation: int = 1, began_s: float = 0.0) -> None:
        self.name, self.incarnation, self.began_s = name, incarnation, began_s
        self.requests = self.prompt = self.output = 0
        self.prompts = [0] * 8
        self.outputs = [0] * 8

    def offer(self, requests: int, prompt: int, output: int) -> None:
        self.requests += requests
        self.prompt += requests * prompt
        self.output += requests * output
        self.prompts[sum(bound <= prompt for bound in BOUNDS)] += requests
        self.outputs[sum(bound <= output for bound in BOUNDS)] += requests

    def report(self, now_s: float) -> RouterReport:
        return RouterReport(
            name=self.name,
            incarnation=self.incarnation,
            uptime_s=now_s - self.began_s,
            offered_requests=self.requests,
            offered_prompt_tokens=self.prompt,
            offered_output_tokens=self.output,
            prompt_tokens=Histogram(bounds=BOUNDS, counts=tuple(self.prompts)),
            output_tokens=Histogram(bounds=BOUNDS, counts=tuple(self.outputs)),
        )


def run(window: SignalWindow, source: Source, begin_s: int, end_s: int, *, prompt: int = 400, output: int = 40) -> None:
    """Ten requests a second from one time to another, a report each second."""
    for second in range(begin_s, end_s):
        source.offer(10, prompt, output)
        window.add(source.report(second + 1.0), second + 1.0)


def test_a_steady_flow_is_measured_exactly() -> None:
    window, source = SignalWindow(), Source()
    run(window, source, 0, 100)
    signals = window.over(30.0, 100.0)
    assert signals.span_s == pytest.approx(30.0)
    assert signals.num_requests == 300
    assert signals.load.requests_per_s == pytest.approx(10.0)
    assert signals.load.prompt_mean == pytest.approx(400.0)
    assert signals.load.output_mean == pytest.approx(40.0)
    assert signals.load.output_tokens_per_s == pytest.approx(400.0)


def test_routers_add_up() -> None:
    window = SignalWindow()
    for name in ("router-0", "router-1"):
        run(window, Source(name), 0, 60)
        window_of_one = window.over(30.0, 60.0)
    assert window_of_one.load.requests_per_s == pytest.approx(20.0)
    assert window_of_one.num_routers == 2


def test_what_still_runs_counts_by_what_it_has_seen_and_is_no_total() -> None:
    """Long answers that come too slowly must not look well until they have ended."""
    bounds = (100.0,)
    slow = JointHistogram(ttft_ms=bounds, tpot_ms=bounds, counts=(0, 5, 0, 0))
    done = JointHistogram(ttft_ms=bounds, tpot_ms=bounds, counts=(3, 0, 0, 0))
    window = SignalWindow()
    for second in range(11):
        window.add(RouterReport(name="router-0", uptime_s=second + 1.0, running=slow, latency=done), float(second))
    first, then, both, requests = window.over(5.0, 10.0).latency.shares(100.0, 100.0)
    assert (first, then, both, requests) == (1.0, 0.0, 0.0, 5)  # the 3 ended before the window
    window.add(RouterReport(name="router-0", uptime_s=12.0, latency=done), 11.0)
    assert window.over(5.0, 11.0).latency.shares(100.0, 100.0)[3] == 0


def test_a_new_life_counts_from_its_beginning_and_an_old_ones_words_are_refused() -> None:
    window = SignalWindow()
    first, second = Source(), Source(incarnation=2, began_s=90.0)
    run(window, first, 0, 90)
    run(window, second, 90, 95)
    assert window.over(30.0, 95.0).load.requests_per_s == pytest.approx(10.0)
    assert not window.add(first.report(96.0), 96.0)
    assert window.num_refused == 1


def test_a_silent_source_is_dropped_after_three_intervals() -> None:
    window = SignalWindow()
    run(window, Source("router-0"), 0, 60)
    run(window, Source("router-1"), 0, 75)
    assert window.over(30.0, 74.0, interval_s=5.0).num_routers == 2
    assert window.over(30.0, 75.5, interval_s=5.0).num_routers == 1


def test_a_step_of_the_load_shows_within_two_intervals() -> None:
    window, source = SignalWindow(), Source()
    run(window, source, 0, 100)
    run(window, source, 100, 110, prompt=40, output=300)
    signals = window.over(60.0, 110.0, interval_s=5.0)
    assert signals.span_s == pytest.approx(10.0)
    assert signals.load.prompt_mean == pytest.approx(40.0)
    assert signals.load.output_mean == pytest.approx(300.0, rel=0.02)


def test_no_arrivals_is_a_load_of_nothing_with_the_lengths_known_last() -> None:
    window, source = SignalWindow(), Source()
    run(window, source, 0, 60)
    window.over(30.0, 60.0)
    for second in range(60, 120):
        window.add(source.report(second + 1.0), second + 1.0)
    load = window.over(30.0, 120.0).load
    assert load.is_idle and (load.prompt_mean, load.output_mean) == (pytest.approx(400.0), pytest.approx(40.0))


def test_with_no_router_heard_what_was_computed_is_the_least_that_was_offered() -> None:
    window = SignalWindow()
    for second in range(40):
        for name, role, prefill, decode in (("prefill-0", "prefill", 1024, 0), ("decode-0", "decode", 0, 256)):
            report = InstanceReport(
                name=name,
                role=role,  # type: ignore[arg-type]
                uptime_s=1000.0 + second,
                prefill_tokens=prefill * second,
                decode_tokens=decode * second,
            )
            window.add(report, float(second))
    load = window.over(30.0, 39.0).load
    assert load.requests_per_s * load.prompt_mean == pytest.approx(1024.0)
    assert load.output_tokens_per_s == pytest.approx(256.0)


def test_a_total_that_falls_begins_anew_and_a_number_that_is_none_is_refused() -> None:
    window = SignalWindow()
    run(window, Source(), 0, 30)
    assert window.add(Source().report(31.0), 31.0)
    assert window.over(30.0, 31.0).load.requests_per_s == 0.0
    assert not window.add(RouterReport(name="router-0", uptime_s=float("nan")), 32.0)
    assert not window.add(RouterReport(name="router-0", offered_requests=-1), 32.0)
    assert repr(window) == "<SignalWindow [1 sources, 2 reports refused]>"


def test_who_is_heard_of_those_that_are_known() -> None:
    window, members = SignalWindow(), make_members(Ratio(prefill=2, decode=2))
    for member in members[:3]:
        window.add(InstanceReport(name=member.name, role=member.role, prefill_step=PREFILL_STEP), 10.0)
    signals = window.over(30.0, 12.0, members=members)
    assert (signals.num_heard, signals.num_known) == (3, 4)
    found = signals.report("prefill-0")
    assert found is not None and found.prefill_step == PREFILL_STEP != DECODE_STEP


def test_kv_blocks_are_those_that_decode_instances_report() -> None:
    window = SignalWindow()
    for index, blocks in enumerate((10, 100, 1_000_000)):
        window.add(InstanceReport(name=f"decode-{index}", role="decode", num_blocks=blocks, block_size=16), 1.0)
    assert window.over(30.0, 1.0).setup.decode.kv_tokens == 1600


def test_shares_of_the_joint_histogram() -> None:
    joint = JointHistogram(ttft_ms=(100.0, 500.0), tpot_ms=(50.0,), counts=(6, 1, 2, 0, 1, 0), missed=10)
    assert joint.shares(500.0, 50.0) == (pytest.approx(9 / 20), pytest.approx(9 / 20), pytest.approx(8 / 20), 20)
    assert joint.shares(300.0, 50.0)[0] == pytest.approx(8 / 20)  # a bucket that the goal cuts counts by its part
    assert JointHistogram().shares(1.0, 1.0) == (1.0, 1.0, 1.0, 0)


def test_lengths_lie_within_what_the_buckets_allow() -> None:
    histogram = Histogram(bounds=(10.0, 20.0), counts=(1, 1, 0))
    assert histogram.mean_within() == (5.0, 15.0)
    assert histogram.since(Histogram(bounds=(10.0, 20.0), counts=(1, 0, 0))).counts == (0, 1, 0)
    assert histogram.plus(histogram).total == 4


@pytest.mark.parametrize("num_requests", [0, 2])
def test_tokens_of_an_answer_that_began_before_say_nothing_of_lengths(num_requests: int) -> None:
    """The part of the window that says how long answers are may hold one that runs, and none that begins or ends."""
    answers = Flow(
        seconds=10.0, num_requests=num_requests, requests_per_s=num_requests / 10.0, output_tokens_per_s=20.0
    )
    mean, square = SignalWindow()._outputs(answers, at_least=0.0)
    assert (mean, square) == ((100.0, 10_000.0) if num_requests else (1.0, 1.0))
