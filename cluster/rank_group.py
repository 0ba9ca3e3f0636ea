"""One life of a process of the deployment: its ranks, which live and end together. Most have one; instances tp x pp.

The first rank that ends takes the others with it: whoever holds a group kills them at once, stopped ones (SIGSTOP) too,
unless the rank said that it stops in order; then they have a moment to do the same. The group has ended when all have.
What a rank is, and how it is killed, is the backend's.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Protocol

from biphase.cluster.backend import Kind
from biphase.protos.errors import one_line
from biphase.protos.process import Announcement

STOP_GRACE_S = 3.0
"""How long the others may take after a rank that has ended in order."""
RELEASE_S = 2.0
logger = logging.getLogger("biphase.cluster.ranks")


class Rank(Protocol):
    """One process."""

    pid: int
    """0 until known."""
    end: str | None
    """Why it ended, None while it runs."""

    def word(self) -> Announcement | None:
        """Its newest announcement."""
        ...

    async def ended(self) -> str: ...

    async def ask_to_stop(self) -> None: ...

    async def kill(self) -> None:
        """End it now, stopped or not; one that has ended already is left."""
        ...

    def release(self) -> None:
        """Stop watching; the process goes on."""
        ...


class MissingRank:
    """The place of a rank that is not there any more, or that whoever started the group did not come to start."""

    def __init__(self, end: str) -> None:
        self.pid = 0
        self.end: str | None = end

    def word(self) -> Announcement | None:
        return None

    async def ended(self) -> str:
        return self.end or ""

    async def ask_to_stop(self) -> None:
        pass

    async def kill(self) -> None:
        pass

    def release(self) -> None:
        pass


class RankGroup:
    """The handle of one life: ``ranks`` in their order. Rank 0 speaks for all. Owned by the backend that made it."""

    def __init__(
        self,
        *,
        name: str,
        kind: Kind,
        incarnation: int,
        ranks: Sequence[Rank],
        on_gone: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        """``on_gone`` gives back what the group held, once all ranks have ended."""
        self.name, self.kind, self.incarnation = name, kind, incarnation
        self.ranks = tuple(ranks)
        self.end: str | None = None
        self._on_gone = on_gone
        self._gone = asyncio.Event()
        self._follow = asyncio.create_task(self._follow_ranks())

    @property
    def pid(self) -> int:
        return self.ranks[0].pid

    @property
    def pids(self) -> tuple[int, ...]:
        """Of all ranks, in their order."""
        return tuple(rank.pid for rank in self.ranks)

    def word(self) -> Announcement | None:
        """Rank 0's newest announcement, or that of the first rank whose set-up failed."""
        words = [rank.word() for rank in self.ranks]
        for index, word in enumerate(words):
            if word is not None and word.state == "failed":
                return replace(word, rank=0, detail=f"rank {index}: {word.detail}" if index else word.detail)
        return words[0]

    async def ended(self) -> str:
        """Wait until every rank is gone; the first one's end is why."""
        await self._gone.wait()
        assert self.end is not None
        return self.end

    async def ask_to_stop(self) -> None:
        """Rank 0 tells the others when its work is done."""
        await self.ranks[0].ask_to_stop()

    async def kill(self) -> None:
        await asyncio.gather(*(rank.kill() for rank in self.ranks))

    def release(self) -> None:
        self._follow.cancel()
        for rank in self.ranks:
            rank.release()

    async def _follow_ranks(self) -> None:
        waits = [asyncio.create_task(rank.ended()) for rank in self.ranks]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            first = next(index for index, wait in enumerate(waits) if wait.done())
            end = self._why(first)
            if len(self.ranks) > 1:
                word = self.ranks[first].word()
                if word is not None and word.state == "stopped":
                    await asyncio.wait(waits, timeout=STOP_GRACE_S)
                if not all(wait.done() for wait in waits):
                    logger.warning("%s#%d: %s, ending its other ranks", self.name, self.incarnation, end)
                    await self.kill()
                await asyncio.wait(waits)
            if self._on_gone is not None:
                try:
                    await asyncio.wait_for(self._on_gone(), RELEASE_S)
                except Exception as error:  # noqa: BLE001 -- its end must be told all the same, or it is never replaced
                    logger.warning(
                        "%s#%d: what it held is not given back: %s", self.name, self.incarnation, one_line(error)
                    )
            self.end = end
            self._gone.set()
        finally:
            for wait in waits:
                wait.cancel()

    def _why(self, first: int) -> str:
        """The first rank's end, or why it gave up on the others."""
        word, end = self.ranks[first].word(), self.ranks[first].end or "ended"
        if len(self.ranks) == 1:
            return end
        if word is not None and word.state == "lost":
            end = word.detail
        return f"rank {first}: {end}"

    def __repr__(self) -> str:
        return f"<RankGroup {self.name}#{self.incarnation} pids {', '.join(map(str, self.pids))} {self.end or 'runs'}>"
