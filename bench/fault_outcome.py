"""What a fault is, and what it did by what was measured: to the requests, to their tokens, and for how long. Pure."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from prefill_work import tokens_again

from biphase.client.bench.measured import Measured

Kind = Literal["kill", "stop", "partition", "pair"]
KINDS_OF: tuple[Kind, ...] = ("kill", "stop", "partition", "pair")
ENDED_WITHIN_S = 3.0
"""By when what a faulted router cannot serve has ended at the client with UNAVAILABLE."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """``victim`` is the name of a process; of a ``pair`` the decode instance, cut off from ``other``."""

    kind: Kind
    victim: str
    other: str = ""

    @property
    def role(self) -> str:
        return self.victim.partition("-")[0]

    @property
    def label(self) -> str:
        if self.kind == "pair":
            return "partition prefill-decode"
        return {"kill": "kill -9", "stop": "SIGSTOP", "partition": "partition"}[self.kind] + f" {self.role}"


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """One router's word on an instance: in ``state`` since a Unix time."""

    incarnation: int
    state: str
    since_unix_s: float
    legs: int = 0


def seen_unix_s(view: View | None, hit_unix_s: float, asked_unix_s: float) -> float | None:
    """By when a router has seen a fault of an instance that was ready when it was hit; None: it has not yet.

    Whatever state began after the fault, the instance had left its old one by then: of one that is lost this is the moment,
    of one that is ready again, or another life of it, the latest moment that it can have been. An instance that the router
    does not know any more was seen when it was asked.
    """
    if view is None:
        return asked_unix_s
    return view.since_unix_s if view.since_unix_s > hit_unix_s else None


@dataclass(slots=True, kw_only=True)
class Outcome:
    """Seconds count from the fault; NaN where there is nothing to measure or it was not seen in time."""

    fault: Fault
    life: str = ""
    """The life that was hit, NAME#INCARNATION."""
    at_s: float = math.nan
    """On the load's own clock."""
    on_victim: int = 0
    """What it had to do when it was hit: requests aboard an instance, streams at a router, pulls between a pair."""
    detected_s: float = math.nan
    """Until the last router had the instance as not ready, by the routers' own clocks; of a pair: until a router knew of the
    first handoff that failed."""
    strong_s: float = math.nan
    """When everything was ready again: of an instance when it was replaced, of others once they were healed."""
    stopped_s: float = math.nan
    """Of a router: when the instances held no more of its work."""
    measured: list[Measured] = field(default_factory=list)
    left: dict[str, int] = field(default_factory=dict)
    """Counters that were not back after the last end."""
    former: list[str] = field(default_factory=list)
    """Lives that were replaced and still ran some time after the fault was healed."""
    restarted: list[str] = field(default_factory=list)
    """Processes that were not hit and have another life now."""
    address: str = ""
    """Of the faulted router."""
    doomed: Sequence[int] = ()
    """The requests that ran at the faulted router when it was hit."""
    over_s: float = math.inf
    """Of a router: when it answered again, on the load's own clock; infinite: it has not."""
    served_after: int = 0
    """Of a router: requests that it served once all was ready again."""
    failed_handoffs: int = 0
    """Between prefill and decode instances, from the fault on."""

    @property
    def seen_s(self) -> float:
        """The detection; of a router, until its last stream had ended at the client."""
        if self.fault.role != "router":
            return self.detected_s
        ends = [one.ended_s - self.at_s for one in self.measured if one.index in self.doomed]
        return max(ends) if ends and len(ends) == len(self.doomed) else math.nan

    @property
    def excused(self) -> list[Measured]:
        """Failed as they may: at the faulted router, with UNAVAILABLE, sent before it answered again and ended in time."""
        if self.fault.role != "router":
            return []
        return [
            one
            for one in self.measured
            if one.kind == "UNAVAILABLE"
            and one.address == self.address
            and one.sent_s < self.over_s
            and one.ended_s >= self.at_s
            and one.ended_s - max(one.sent_s, self.at_s) <= ENDED_WITHIN_S
        ]

    @property
    def lost(self) -> list[Measured]:
        excused = {one.index for one in self.excused}
        return [one for one in self.measured if not one.done and one.index not in excused]

    @property
    def wrong(self) -> int:
        return sum(one.wrong for one in self.measured)

    @property
    def replays(self) -> int:
        return sum(one.replays for one in self.measured)

    @property
    def displaced(self) -> list[Measured]:
        """Done requests that ran when the fault came, and went on elsewhere than on the life that was hit."""
        return [
            one
            for one in self.measured
            if one.done and one.replays and one.sent_s < self.at_s < one.ended_s and not self._ended_on_victim(one)
        ]

    def _ended_on_victim(self, one: Measured) -> bool:
        return self.life in (one.prefill_instance.partition(" ")[0], one.decode_instance.partition(" ")[0])

    @property
    def displaced_tokens(self) -> int:
        return tokens_again(self.displaced, self.at_s)

    @property
    def gap_s(self) -> float:
        """The longest silence of a displaced stream that ended after the fault; before a first token it counts from the
        fault, for what a prompt had waited by then has other causes."""
        gaps = [
            later - earlier
            for one in self.displaced
            for earlier, later in zip((self.at_s, *one.token_at_s), one.token_at_s, strict=False)
            if later > self.at_s
        ]
        return max(gaps, default=math.nan)


def worst(values: Iterable[float]) -> float:
    """The largest; what was not measured, or nothing at all, is as bad as can be."""
    return max((math.inf if math.isnan(value) else value for value in values), default=math.inf)
