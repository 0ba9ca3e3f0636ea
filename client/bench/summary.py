"""Figures over all requests of a load, of one phase, or of a window of time. Pure."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

from biphase.client.bench.goals import Goals, Metric
from biphase.client.bench.measured import Measured

PERCENTILES = (50, 90, 95, 99)


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """Of one metric: how many values, their mean, percentiles (between neighbours, as numpy's default) and maximum."""

    count: int
    mean: float
    percentiles: Mapping[int, float]
    maximum: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """``seconds``: from the start of the load, or of the part of it, to its last end. Rates are over these, but for the
    offered one, which is over ``due_s``: to the last arrival."""

    seconds: float
    due_s: float
    offered: int
    done: int
    errors: Mapping[str, int]
    """Requests that were not done, by kind."""
    examples: Mapping[str, str]
    """One message of each kind."""
    input_tokens: int
    output_tokens: int
    """Of all requests, unfinished ones too."""
    spreads: Mapping[Metric, Spread]
    """Of done requests; those of ``itl`` over every gap."""
    met: int | None
    """Requests that met all goals; None without goals."""
    checked: int
    wrong: int
    replays: int
    late_ms: float
    """The most that the generator itself was behind the planned arrival."""

    @property
    def attainment(self) -> float | None:
        """Share of *all* requests that met the goals: a refused, expired or failed one has missed them."""
        return None if self.met is None or not self.offered else self.met / self.offered

    @property
    def goodput(self) -> float | None:
        """Requests/s that met the goals."""
        return None if self.met is None else self.per_second(self.met)

    @property
    def offered_per_second(self) -> float:
        """Infinite for a load that comes all at once."""
        return self.offered / self.due_s if self.due_s else math.inf if self.offered else 0.0

    def per_second(self, count: float) -> float:
        return count / self.seconds if self.seconds else 0.0


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Of ascending values, at least one: the value below which ``percent`` of them lie, linear between neighbours."""
    place = (len(ordered) - 1) * percent / 100
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def spread_of(values: Sequence[float]) -> Spread | None:
    """None of no values."""
    if not values:
        return None
    ordered = sorted(values)
    return Spread(
        count=len(ordered),
        mean=math.fsum(ordered) / len(ordered),
        percentiles={percent: percentile(ordered, percent) for percent in PERCENTILES},
        maximum=ordered[-1],
    )


def summarize(measured: Sequence[Measured], goals: Goals, began_s: float = 0.0) -> Summary:
    """Of all in ``measured``; ``began_s`` is when their part of the load began."""
    errors = Counter(one.kind for one in measured if not one.done)
    spreads = {metric: spread_of(_values(measured, metric)) for metric in get_args(Metric)}
    return Summary(
        seconds=max((one.ended_s for one in measured), default=began_s) - began_s,
        due_s=max((one.due_s for one in measured), default=began_s) - began_s,
        offered=len(measured),
        done=sum(one.done for one in measured),
        errors=dict(errors.most_common()),
        examples={one.kind: one.detail for one in reversed(measured) if not one.done},
        input_tokens=sum(one.input_tokens for one in measured),
        output_tokens=sum(one.output_tokens for one in measured),
        spreads={metric: spread for metric, spread in spreads.items() if spread is not None},
        met=sum(one.meets(goals) for one in measured) if goals else None,
        checked=sum(one.checked for one in measured),
        wrong=sum(one.wrong for one in measured),
        replays=sum(one.replays for one in measured),
        late_ms=max((1e3 * (one.sent_s - one.due_s) for one in measured), default=0.0),
    )


def _values(measured: Sequence[Measured], metric: Metric) -> list[float]:
    done = [one for one in measured if one.done]
    if metric == "itl":
        return [gap for one in done for gap in one.itl_ms]
    return [value for one in done if (value := one.value(metric)) is not None]


def windows(measured: Sequence[Measured], width_s: float, until_s: float) -> list[list[Measured]]:
    """The requests by when they were due: window k is from k * ``width_s`` on; those due from ``until_s`` on are left out."""
    found: list[list[Measured]] = [[] for _ in range(math.ceil(until_s / width_s))]
    for one in measured:
        if one.due_s < until_s:
            found[min(int(one.due_s / width_s), len(found) - 1)].append(one)
    return found
