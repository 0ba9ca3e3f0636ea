"""Which leg of which link is which sequence here. Pure bookkeeping, owned by the worker's loop."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

from biphase.engine.link import Link
from biphase.protos.ids import LegId, RequestId, SeqId


@dataclass(slots=True, eq=False, kw_only=True)
class Leg:
    """One request's work here, as its router knows it."""

    link: Link
    leg_id: LegId
    request_id: RequestId
    seq_id: SeqId


L = TypeVar("L", bound=Leg)


class LegTable(Generic[L]):
    """All live legs. A leg is known by its link and the id that its router chose, and by our sequence id."""

    def __init__(self) -> None:
        self._by_seq: dict[SeqId, L] = {}
        self._by_link: dict[Link, dict[LegId, L]] = {}

    def add(self, leg: L) -> None:
        self._by_seq[leg.seq_id] = leg
        self._by_link.setdefault(leg.link, {})[leg.leg_id] = leg

    def remove(self, leg: L) -> None:
        del self._by_seq[leg.seq_id]
        of_link = self._by_link[leg.link]
        del of_link[leg.leg_id]
        if not of_link:
            del self._by_link[leg.link]

    def find(self, link: Link, leg_id: LegId) -> L | None:
        return self._by_link.get(link, {}).get(leg_id)

    def of_seq(self, seq_id: SeqId) -> L:
        return self._by_seq[seq_id]

    def find_seq(self, seq_id: SeqId) -> L | None:
        return self._by_seq.get(seq_id)

    def of_link(self, link: Link) -> list[L]:
        return list(self._by_link.get(link, {}).values())

    def __iter__(self) -> Iterator[L]:
        return iter(list(self._by_seq.values()))

    def __len__(self) -> int:
        return len(self._by_seq)
