"""What routers were offered over a stretch of time, and how unlike two stretches are. Pure: sums and their chance errors."""

import math
from dataclasses import dataclass, field

from biphase.planner.reports import Histogram, JointHistogram, RouterReport

MIN_RUNNING = 10
"""Answers that run from which on their present lengths count."""


@dataclass(slots=True)
class Flow:
    """What the routers were offered over a stretch of time, and what became of it."""

    seconds: float = 0.0
    requests_per_s: float = 0.0
    prompt_tokens_per_s: float = 0.0
    output_tokens_per_s: float = 0.0
    num_requests: int = 0
    num_ended: int = 0
    num_piled_up: int = 0
    """By how many more wait for a place at the end than at the beginning."""
    prompts: Histogram = field(default_factory=Histogram)
    outputs: Histogram = field(default_factory=Histogram)
    latency: list[JointHistogram] = field(default_factory=list)

    def add(self, seconds: float, first: RouterReport | None, last: RouterReport, *, latency: bool) -> None:
        before = first or RouterReport(name=last.name)
        requests = last.offered_requests - before.offered_requests
        self.seconds = max(self.seconds, seconds)
        self.num_requests += requests
        self.requests_per_s += requests / seconds
        self.prompt_tokens_per_s += (last.offered_prompt_tokens - before.offered_prompt_tokens) / seconds
        self.output_tokens_per_s += (last.offered_output_tokens - before.offered_output_tokens) / seconds
        outputs = last.output_tokens.since(before.output_tokens)
        self.num_ended += outputs.total
        self.num_piled_up += last.queued_requests - before.queued_requests
        self.prompts = self.prompts.plus(last.prompt_tokens.since(before.prompt_tokens))
        self.outputs = self.outputs.plus(outputs)
        if latency:
            self.latency.append(last.latency.since(before.latency))


def jump_of(old: Flow, new: Flow) -> float:
    """How different two stretches are in requests, prompt tokens and output lengths: squares of standard deviations, summed."""
    found = [_difference(old.requests_per_s, new.requests_per_s, old.seconds, new.seconds, 1.0)]
    prompts = old.prompts.plus(new.prompts)
    if prompts.total:
        mean = sum(value * count for value, count in prompts.spread()) / prompts.total
        square = sum(value * value * count for value, count in prompts.spread()) / prompts.total
        found.append(
            _difference(
                old.prompt_tokens_per_s, new.prompt_tokens_per_s, old.seconds, new.seconds, square / max(mean, 1e-12)
            )
        )
    found.append(_lengthened(old, new))
    return sum(deviations * deviations for deviations in found)


def jump_of_answers(old: Flow, new: Flow) -> float:
    """The same of how long answers are, and of the tokens that are drawn."""
    outputs = old.outputs.plus(new.outputs)
    found = [_lengthened(old, new)]
    if outputs.total:
        mean, variance = _moments(outputs)
        size = (variance + mean * mean) / max(mean, 1e-12)
        found.append(_difference(old.output_tokens_per_s, new.output_tokens_per_s, old.seconds, new.seconds, size))
    return sum(deviations * deviations for deviations in found)


def _lengthened(old: Flow, new: Flow) -> float:
    """By how many standard deviations the mean lengths of the answers that ended differ."""
    if old.outputs.total < 5 or new.outputs.total < 5:
        return 0.0
    (mean_a, variance_a), (mean_b, variance_b) = _moments(old.outputs), _moments(new.outputs)
    # where all lengths are equal a bucket's width is still unknown
    spread = variance_a / old.outputs.total + variance_b / new.outputs.total + (0.02 * (mean_a + mean_b)) ** 2
    return abs(mean_a - mean_b) / math.sqrt(max(spread, 1e-12))


def _difference(rate_a: float, rate_b: float, seconds_a: float, seconds_b: float, size: float) -> float:
    """Two rates of a compound Poisson flow whose items have mean square / mean ``size``, in standard deviations."""
    pooled = (rate_a * seconds_a + rate_b * seconds_b + size) / (seconds_a + seconds_b)
    return abs(rate_a - rate_b) / math.sqrt(max(1e-12, pooled * size * (1 / seconds_a + 1 / seconds_b)))


def _moments(histogram: Histogram) -> tuple[float, float]:
    total = histogram.total
    mean = sum(value * count for value, count in histogram.spread()) / total
    return mean, sum((value - mean) ** 2 * count for value, count in histogram.spread()) / total


def unended_mean(flow: Flow) -> float:
    """The mean length that answers must have where far more begin than end, which says little of those that are short; 0
    where as many do. One that runs has half of its tokens on average."""
    running = flow.num_requests - flow.num_ended - max(0, flow.num_piled_up)
    if running < max(MIN_RUNNING, 3 * math.sqrt(flow.num_requests)):
        return 0.0
    ended = _moments(flow.outputs)[0] * flow.num_ended if flow.num_ended else 0.0
    present = max(0.0, flow.output_tokens_per_s * flow.seconds - ended) / running
    return (ended + 2 * present * running) / (flow.num_ended + running)


def shares_of(histogram: Histogram, mean: float) -> tuple[tuple[float, float], ...]:
    """(length, share), moved so that their mean is the true one; the mean alone where there is no histogram."""
    spread = histogram.spread()
    total = sum(count for _, count in spread)
    if not total:
        return ((max(1.0, mean), 1.0),)
    middle = sum(value * count for value, count in spread) / total
    scale = mean / middle if middle > 0 else 1.0
    return tuple((max(1.0, value * scale), count / total) for value, count in spread)
