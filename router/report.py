"""What a router tells the controller about the requests it was offered: totals since it began, so that whoever reads them
takes differences over a window of its own. Pure: times come in, and what runs now is handed in with the question.

A request is offered once, before it is placed, whatever comes of it; a mistake of the user's is none. It ends once, however
often it was replayed. Refused, expired and failed ones have missed their goals; cancelled ones count by what they had seen.
"""

import bisect
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

Ending = Literal["finished", "cancelled", "refused", "expired", "failed"]

MISSED: frozenset[Ending] = frozenset({"refused", "expired", "failed"})
ENDINGS: tuple[Ending, ...] = ("finished", "cancelled", "refused", "expired", "failed")


def decades(first: float, last: float, per_decade: int) -> tuple[float, ...]:
    """Bounds from ``first`` to ``last``, so many to a factor of ten, rounded to three digits."""
    count = round(math.log10(last / first) * per_decade)
    return tuple(float(f"{first * 10 ** (step / per_decade):.3g}") for step in range(count + 1))


TTFT_MS = decades(1, 100_000, 10)
TPOT_MS = decades(1, 10_000, 10)
LENGTHS = tuple(float(2**power) for power in range(18))


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """A live request at present. ``ttft_ms``: so far, while it waits for its first token; ``tpot_ms``: None before two."""

    output_tokens: int
    ttft_ms: float
    tpot_ms: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Joint:
    """Requests by TTFT and TPOT; ``counts[i * (len(TPOT_MS) + 1) + j]``. A request of one token has a TPOT of 0."""

    counts: tuple[int, ...]
    missed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """The totals at one moment. ``running`` alone is no total: those that live now and have two tokens, so that both their
    times are known, by what they have seen so far."""

    offered_requests: int
    offered_prompt_tokens: int
    offered_output_tokens: int
    ended: dict[str, int]
    latency: Joint
    running: Joint
    prompt_tokens: tuple[int, ...]
    output_tokens: tuple[int, ...]


def bucket(bounds: Sequence[float], value: float) -> int:
    """Index of the first bound above ``value``; the last bucket has none."""
    return bisect.bisect_right(bounds, value)


class _JointCounts:
    def __init__(self) -> None:
        self.counts = [0] * ((len(TTFT_MS) + 1) * (len(TPOT_MS) + 1))
        self.missed = 0

    def add(self, ttft_ms: float, tpot_ms: float | None) -> None:
        self.counts[bucket(TTFT_MS, ttft_ms) * (len(TPOT_MS) + 1) + bucket(TPOT_MS, tpot_ms or 0.0)] += 1

    def freeze(self) -> Joint:
        return Joint(counts=tuple(self.counts), missed=self.missed)


class LoadReport:
    """Owned by the front door."""

    def __init__(self) -> None:
        self._offered_requests = 0
        self._prompt_tokens = 0
        self._ended_output_tokens = 0
        self._ended: dict[Ending, int] = dict.fromkeys(ENDINGS, 0)
        self._latency = _JointCounts()
        self._prompts = [0] * (len(LENGTHS) + 1)
        self._outputs = [0] * (len(LENGTHS) + 1)
        self._read_chars = self._read_tokens = 0

    def offered(self, prompt_tokens: int, *, prompt_chars: int = 0) -> None:
        """A request whose prompt was read; ``prompt_chars``: of its text, where it came as text."""
        self._offered_requests += 1
        self._prompt_tokens += prompt_tokens
        self._prompts[bucket(LENGTHS, prompt_tokens)] += 1
        if prompt_chars:
            self._read_chars += prompt_chars
            self._read_tokens += prompt_tokens

    def offered_unread(self, prompt_chars: int) -> None:
        """A request that was refused before its text was read: its tokens are guessed from those that were."""
        chars_per_token = self._read_chars / self._read_tokens if self._read_tokens else 4.0
        self.offered(max(1, round(prompt_chars / chars_per_token)))

    def ended(self, ending: Ending, *, output_tokens: int, ttft_ms: float | None, tpot_ms: float | None) -> None:
        """``ttft_ms`` None: no token had come."""
        self._ended[ending] += 1
        self._ended_output_tokens += output_tokens
        if ending in MISSED:
            self._latency.missed += 1
        elif ttft_ms is not None:
            self._latency.add(ttft_ms, tpot_ms)
        if ending == "finished":
            self._outputs[bucket(LENGTHS, output_tokens)] += 1

    def snapshot(self, running: Iterable[Running]) -> Snapshot:
        now = _JointCounts()
        present_tokens = 0
        for request in running:
            if request.tpot_ms is not None:
                now.add(request.ttft_ms, request.tpot_ms)
            present_tokens += request.output_tokens
        return Snapshot(
            offered_requests=self._offered_requests,
            offered_prompt_tokens=self._prompt_tokens,
            offered_output_tokens=self._ended_output_tokens + present_tokens,
            ended={ending: count for ending, count in self._ended.items()},
            latency=self._latency.freeze(),
            running=now.freeze(),
            prompt_tokens=tuple(self._prompts),
            output_tokens=tuple(self._outputs),
        )

    def __repr__(self) -> str:
        return f"<LoadReport [{self._offered_requests} offered, {self._ended}]>"
