"""The ranks of one life as Ray's actors: one handle, which also says what it waits for before it has a process."""

import asyncio
from typing import Any

from biphase.cluster.rank_group import RankGroup
from biphase.protos.process import Announcement


class RayGroup(RankGroup):
    """A group whose ranks tell when there is news, and that says what it waits for before it has a process."""

    def __init__(self, changed: asyncio.Event, **group: Any) -> None:
        super().__init__(**group)
        self.changed = changed
        self._waits_for = ""

    @property
    def is_ending(self) -> bool:
        return any(rank.end is not None for rank in self.ranks)

    @property
    def is_silent(self) -> bool:
        return super().word() is None

    def say_waiting(self, what: str) -> None:
        if what != self._waits_for:
            self._waits_for = what
            self.changed.set()

    def word(self) -> Announcement | None:
        said = super().word()
        if said is None and self._waits_for:
            return Announcement(
                name=self.name, kind=self.kind, incarnation=self.incarnation, pid=0, detail=self._waits_for
            )
        return said
