"""What routers and workers say, and what the controller knows of its instances: plain values. Pure.

Totals are since the source's incarnation began. Reports are sound or refused: a negative, infinite or missing number is no
report (``is_sound``), so that one bad source cannot spoil the sums.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from biphase.protos.step_time import RecentSteps, StepTime
from biphase.protos.values import Role

MemberPhase = Literal["starting", "ready", "draining", "flipping", "lost"]
"""lost: wanted and gone, with no place to start again. flipping: on its way into ``role``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Histogram:
    """counts[i] is what was below bounds[i] and not below the bound before; one more count for the rest."""

    bounds: tuple[float, ...] = ()
    counts: tuple[int, ...] = ()

    @property
    def total(self) -> int:
        return sum(self.counts)

    def since(self, before: "Histogram") -> "Histogram":
        if before.bounds != self.bounds or len(before.counts) != len(self.counts):
            return self
        return Histogram(bounds=self.bounds, counts=_less(self.counts, before.counts))

    def plus(self, other: "Histogram") -> "Histogram":
        if not self.counts:
            return other
        if other.bounds != self.bounds or len(other.counts) != len(self.counts):
            return self
        return Histogram(
            bounds=self.bounds, counts=tuple(a + b for a, b in zip(self.counts, other.counts, strict=True))
        )

    def spread(self) -> list[tuple[float, int]]:
        """(a value in the middle of the bucket, its count) of all that hold anything."""
        edges = [0.0, *self.bounds, 2 * self.bounds[-1] if self.bounds else 1.0]
        return [((edges[i] + edges[i + 1]) / 2, count) for i, count in enumerate(self.counts) if count]

    def mean_within(self) -> tuple[float, float]:
        """Between which two means the counted values must lie."""
        edges = [0.0, *self.bounds, 2 * self.bounds[-1] if self.bounds else 1.0]
        total = max(1, self.total)
        lows = sum(edges[i] * count for i, count in enumerate(self.counts)) / total
        return lows, sum(edges[i + 1] * count for i, count in enumerate(self.counts)) / total


@dataclass(frozen=True, slots=True, kw_only=True)
class JointHistogram:
    """Requests by TTFT and TPOT: counts[i * (len(tpot_ms) + 1) + j]. ``missed``: refused, expired, failed ones."""

    ttft_ms: tuple[float, ...] = ()
    tpot_ms: tuple[float, ...] = ()
    counts: tuple[int, ...] = ()
    missed: int = 0

    def since(self, before: "JointHistogram") -> "JointHistogram":
        if (before.ttft_ms, before.tpot_ms, len(before.counts)) != (self.ttft_ms, self.tpot_ms, len(self.counts)):
            return self
        return JointHistogram(
            ttft_ms=self.ttft_ms,
            tpot_ms=self.tpot_ms,
            counts=_less(self.counts, before.counts),
            missed=max(0, self.missed - before.missed),
        )

    def shares(self, ttft_ms: float, tpot_ms: float) -> tuple[float, float, float, int]:
        """The shares that met the first goal, the second, and both, misses counted; and the number of requests."""
        width = len(self.tpot_ms) + 1
        first, second = _shares_below(self.ttft_ms, ttft_ms), _shares_below(self.tpot_ms, tpot_ms)
        met = [0.0, 0.0, 0.0]
        for index, count in enumerate(self.counts):
            a, b = first[index // width], second[index % width]
            for goal, share in enumerate((a, b, a * b)):
                met[goal] += count * share
        total = sum(self.counts) + self.missed
        if not total:
            return 1.0, 1.0, 1.0, 0
        return met[0] / total, met[1] / total, met[2] / total, total


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterReport:
    """One router's totals, and what waits at it now."""

    name: str
    incarnation: int = 1
    uptime_s: float = 0.0
    offered_requests: int = 0
    offered_prompt_tokens: int = 0
    offered_output_tokens: int = 0
    ended: Mapping[str, int] = field(default_factory=dict)
    latency: JointHistogram = field(default_factory=JointHistogram)
    running: JointHistogram = field(default_factory=JointHistogram)
    """No total: those that live now and have two tokens, by what they have seen so far."""
    prompt_tokens: Histogram = field(default_factory=Histogram)
    output_tokens: Histogram = field(default_factory=Histogram)
    queued_requests: int = 0
    queued_tokens: int = 0
    running_requests: int = 0
    replays: int = 0

    @property
    def totals(self) -> tuple[int, ...]:
        """What never falls while it lives."""
        return (self.offered_requests, self.offered_prompt_tokens, self.offered_output_tokens, self.replays)


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceReport:
    """One instance's totals in this incarnation, and what it has now."""

    name: str
    role: Role
    incarnation: int = 1
    uptime_s: float = 0.0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    num_steps: int = 0
    busy_s: float = 0.0
    queued: int = 0
    queued_tokens: int = 0
    running: int = 0
    running_tokens: int = 0
    free_blocks: int = 0
    num_blocks: int = 0
    block_size: int = 0
    prefill_step: StepTime = field(default_factory=StepTime)
    decode_step: StepTime = field(default_factory=StepTime)
    recent: RecentSteps = field(default_factory=RecentSteps)
    step_s: float = 0.0
    """How long the oldest step under way has run; 0: none is."""
    step_expected_s: float = 0.0
    """What its like took so far; 0: not known."""

    @property
    def totals(self) -> tuple[float, ...]:
        """What never falls while it lives."""
        return (self.prefill_tokens, self.decode_tokens, self.num_steps, self.busy_s)

    @property
    def work_left(self) -> int:
        """Tokens that it still has: what waits, and the context of what runs."""
        return self.queued_tokens + self.running_tokens


Report = RouterReport | InstanceReport


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """An instance as the controller has it. ``age_s``: in this phase; ``out``: kept from work as a straggler."""

    name: str
    role: Role
    phase: MemberPhase = "ready"
    age_s: float = 0.0
    node: str = ""
    out: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """``idle``: how many instances of a role would find GPUs now, on the node that was asked for and has come too."""

    prefill: int = 0
    decode: int = 0
    can_grow: bool = False
    """Whether the cluster has an autoscaler that brings new nodes."""
    came: tuple[Role, ...] = ()
    """Roles for whose next instance a node was asked for and has come: one of their idle places is kept for it there."""

    def idle(self, role: Role) -> int:
        return self.prefill if role == "prefill" else self.decode


def is_sound(report: Report) -> bool:
    """Whether all numbers are finite and none is negative. Step times are judged on their own (``StepTime.is_known``)."""
    return all(_is_sound(getattr(report, item.name)) for item in fields(report) if not item.name.endswith("_step"))


def _is_sound(value: Any) -> bool:
    match value:
        case bool() | str():
            return True
        case int() | float():
            return math.isfinite(value) and value >= 0
        case Mapping():
            return all(_is_sound(item) for item in value.values())
        case tuple():
            return all(_is_sound(item) for item in value)
        case _:
            return all(_is_sound(getattr(value, item.name)) for item in fields(value))


def _less(now: tuple[int, ...], before: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(max(0, a - b) for a, b in zip(now, before, strict=True))


def _shares_below(bounds: tuple[float, ...], goal: float) -> list[float]:
    """Of each bucket, the share that lies within the goal: all, none, or evenly where the goal cuts it."""
    edges = [0.0, *bounds]
    shares = [
        min(1.0, max(0.0, (goal - low) / (high - low))) if high > low else 1.0
        for low, high in zip(edges, bounds, strict=False)
    ]
    return [*shares, 0.0 if not bounds or goal <= bounds[-1] * (1 + 1e-9) else 1.0]


def to_values(value: Any) -> dict[str, Any]:
    """A report, member or room as JSON-able values."""
    return asdict(value)


def router_from(values: Mapping[str, Any]) -> RouterReport:
    """The inverse of to_values; raises KeyError, TypeError or ValueError for anything else."""
    return RouterReport(
        **{
            **values,
            **{key: _joint(values.get(key, {})) for key in ("latency", "running")},
            **{key: _histogram(values.get(key, {})) for key in ("prompt_tokens", "output_tokens")},
        }
    )


def instance_from(values: Mapping[str, Any]) -> InstanceReport:
    return InstanceReport(
        **{
            **values,
            **{key: StepTime(**values.get(key, {})) for key in ("prefill_step", "decode_step")},
            "recent": RecentSteps(**values.get("recent", {})),
        }
    )


def _joint(values: Mapping[str, Any]) -> JointHistogram:
    given: dict[str, Any] = {key: tuple(item) if isinstance(item, list) else item for key, item in values.items()}
    return JointHistogram(**given)


def _histogram(values: Mapping[str, Any]) -> Histogram:
    return Histogram(**{key: tuple(items) for key, items in values.items()})
