"""What has happened, in words, for people: numbered, bounded, kept outside the controller over all its lives.

Events are kept in chunks of a hundred under keys that are used again and again, so that one more costs one small write.
"""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict, dataclass
from typing import Protocol

MAX_EVENTS = 10_000
CHUNK = 100
HEAD_KEY = "events/head"
logger = logging.getLogger("biphase.cluster.events")


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """``kind``: decision, start, ready, end, flip, drain, scale, update, node, policy, refused, warning."""

    number: int
    unix_s: float
    kind: str
    subject: str
    text: str


BEGIN = ("start", "")
"""Kind and subject of a deployment's beginning. What is before it was another one of the same name."""


class Keeper(Protocol):
    """Where they are kept; a backend is one."""

    async def save_state(self, text: str, key: str) -> None: ...

    async def load_state(self, key: str) -> str | None: ...


class EventLog:
    """Owns the events of one deployment. ``add`` is quick; ``keep`` writes what is new."""

    def __init__(self, keeper: Keeper, clock: Callable[[], float]) -> None:
        self._keeper, self._clock = keeper, clock
        self._events: list[Event] = []
        self._next = 1
        self._kept = 0
        """The number of the last one that is kept."""
        self._change = asyncio.Event()
        self._keeping = asyncio.Lock()

    async def open(self) -> None:
        """Read back what earlier lives saw. What cannot be read is left out and said."""
        try:
            self._next = int(await self._keeper.load_state(HEAD_KEY) or 1)
            for chunk in range(max(0, self._next - MAX_EVENTS) // CHUNK, (self._next - 1) // CHUNK + 1):
                text = await self._keeper.load_state(_key(chunk))
                found = [Event(**values) for values in json.loads(text)] if text else []
                self._events += [event for event in found if event.number // CHUNK == chunk]
        except (ValueError, TypeError) as error:
            logger.warning("earlier events cannot be read: %s", error)
        self._next = max([self._next, *(event.number + 1 for event in self._events)])
        self._kept = self._next - 1

    def add(self, kind: str, subject: str, text: str) -> Event:
        event = Event(number=self._next, unix_s=self._clock(), kind=kind, subject=subject, text=text)
        self._next += 1
        self._events.append(event)
        if len(self._events) > MAX_EVENTS:
            del self._events[: len(self._events) - MAX_EVENTS]
        logger.info("%s: %s", kind, text)
        self._change.set()
        self._change = asyncio.Event()
        return event

    async def keep(self) -> None:
        """Write what is new. Call it after ``add``, as often as liked."""
        async with self._keeping:
            while self._kept < self._next - 1:
                chunk = (self._kept + 1) // CHUNK
                part = [event for event in self._events if event.number // CHUNK == chunk]
                last = part[-1].number if part else self._next - 1
                await self._keeper.save_state(json.dumps([asdict(event) for event in part]), _key(chunk))
                await self._keeper.save_state(str(last + 1), HEAD_KEY)
                self._kept = last

    def after(self, number: int) -> list[Event]:
        return [event for event in self._events if event.number > number]

    def last(self, count: int, kinds: frozenset[str]) -> list[Event]:
        """The newest of these kinds since the deployment began, the oldest of them first."""
        found: list[Event] = []
        for event in reversed(self._events):
            if (event.kind, event.subject) == BEGIN:
                break
            if event.kind in kinds:
                found.append(event)
                if len(found) == count:
                    break
        return found[::-1]

    async def follow(self, after: int) -> AsyncIterator[Event]:
        """Every event after that number, then each new one."""
        while True:
            change = self._change
            for event in self.after(after):
                after = event.number
                yield event
            await change.wait()

    def __repr__(self) -> str:
        return f"<EventLog [{len(self._events)}, next {self._next}]>"


def _key(chunk: int) -> str:
    return f"events/{chunk % (MAX_EVENTS // CHUNK + 1)}"
