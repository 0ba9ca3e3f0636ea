"""When requests arrive and how long they are: phases of a rate and of lengths, in order. Pure.

Gaps are drawn from a gamma distribution of mean 1 in units of expected arrivals and then laid over the rate as it changes,
so that a phase's change neither loses nor bunches requests. Burstiness is the distribution's shape, as in vLLM's bench: 1
is a Poisson process, less comes in bursts, more is more even, infinite gives equal gaps.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from biphase.client.bench.draws import Draws
from biphase.client.bench.lengths import Lengths


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """``seconds`` of load that goes evenly from ``rate`` to ``rate_end`` requests/s. Infinite seconds: to the end."""

    name: str
    seconds: float
    rate: float
    rate_end: float
    burstiness: float
    input_tokens: Lengths
    output_tokens: Lengths

    @property
    def expected(self) -> float:
        """Requests that arrive in it, on average."""
        if math.isinf(self.seconds):
            return math.inf if self.rate else 0.0
        return self.seconds * (self.rate + self.rate_end) / 2

    def seconds_at(self, expected: float) -> float:
        """When so many requests are expected to have arrived since the phase began; the inverse of the rate's integral."""
        slope = 0.0 if math.isinf(self.seconds) else (self.rate_end - self.rate) / self.seconds
        if math.isinf(self.rate):
            return 0.0
        # the root of rate * t + slope * t^2 / 2 = expected, in the form that stays exact for a small slope
        root = math.sqrt(max(self.rate**2 + 2 * slope * expected, 0.0))
        both = self.rate + root  # 0 too for an expectation so small that the root of its product with the slope is
        return 0.0 if not both else min(2 * expected / both, self.seconds)


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """One request: when, counted from the start, and how large. ``phase`` is the index of its phase."""

    index: int
    at_s: float
    phase: int
    input_tokens: int
    output_tokens: int


def arrivals(phases: Sequence[Phase], draws: Draws, max_requests: int | None = None) -> Iterator[Arrival]:
    """Every request in order of time, until the phases or ``max_requests`` are over; the same for the same draws."""
    began_s, expected_before, at, at_s = 0.0, 0.0, 0.0, 0.0
    phase_index = 0
    for index in itertools.count() if max_requests is None else range(max_requests):
        burstiness = phases[phase_index].burstiness
        at += 1.0 if math.isinf(burstiness) else draws.gammavariate(burstiness, 1 / burstiness)
        while at >= expected_before + phases[phase_index].expected:
            expected_before += phases[phase_index].expected
            began_s += phases[phase_index].seconds
            phase_index += 1
            if phase_index == len(phases):
                return
        phase = phases[phase_index]
        at_s = max(at_s, began_s + phase.seconds_at(at - expected_before))  # of nearly equal ones the root may fall
        yield Arrival(
            index=index,
            at_s=at_s,
            phase=phase_index,
            input_tokens=phase.input_tokens.draw(draws),
            output_tokens=phase.output_tokens.draw(draws),
        )


def total_s(phases: Sequence[Phase]) -> float:
    """How long all phases last; infinite where the last one goes on for ever."""
    return sum(phase.seconds for phase in phases)
