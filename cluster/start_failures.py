"""Starts that failed, counted by host: one where several fail in a row gets no more instances. Pure.

In a row: without a life there that was ready for a while. A life that got ready and died by itself right after counts like a
failed start, but the host is to blame only if that befalls several instances: all such deaths of the one that dies most often
count as one, so that a single instance's crash loop cordons no host.
"""

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

MAX_FAILED_STARTS = 3


@dataclass(slots=True)
class HostRecord:
    """What failed on one host since a life was last steady there."""

    failed_starts: int = 0
    early_deaths: Counter[str] = field(default_factory=Counter)
    """By instance: soon after it was ready."""
    last_s: float = 0.0

    @property
    def blamed(self) -> int:
        """The failures that the host has to answer for."""
        most = max(self.early_deaths.values(), default=0)
        return self.failed_starts + self.early_deaths.total() - max(0, most - 1)


@dataclass(slots=True)
class StartFailures:
    """Owned by the Reconciler. ``cordoned``: hosts that get nothing new, with the reason; people cordon hosts too."""

    cordoned: dict[str, str] = field(default_factory=dict)
    records: dict[str, HostRecord] = field(default_factory=dict)
    known: set[str] = field(default_factory=set)
    takers: Mapping[str, Collection[str]] | None = None
    """By host that is there: the roles that it can take; None: nobody lists hosts."""

    def seen(self, node: str) -> None:
        if node:
            self.known.add(node)

    def steady(self, node: str, at_s: float) -> None:
        """A life there had been ready for long enough at ``at_s``: what failed before that is forgotten. To be told before
        any later failure is."""
        record = self.records.get(node)
        if record is not None and record.last_s <= at_s:
            del self.records[node]

    def left(self, node: str) -> None:
        """It is no host of the cluster any more."""
        self.known.discard(node)

    def failed(
        self, node: str, kind: str, *, name: str, at_s: float, was_ready: bool = False, away: Collection[str] = ()
    ) -> str | None:
        """A start of instance ``name`` of role ``kind`` has failed there, or (``was_ready``) it died soon after; the words for
        it when that is one too many. The last host that could take one is never cordoned, nor the last beside those ``away``."""
        if not node:
            return None
        record = self.records.setdefault(node, HostRecord())
        if was_ready:
            record.early_deaths[name] += 1
        else:
            record.failed_starts += 1
        record.last_s = at_s
        others = self.known if self.takers is None else {host for host, roles in self.takers.items() if kind in roles}
        others = others - set(self.cordoned) - set(away) - {node}
        if record.blamed < MAX_FAILED_STARTS or node in self.cordoned or not others:
            return None
        early = record.early_deaths.total()
        once_ready = f", {early} of them soon after being ready" if early else ""
        self.cordon(node, f"{record.failed_starts + early} starts failed there in a row{once_ready}")
        return f"{node} is cordoned: {self.cordoned[node]}; `biphase cordon {node} --undo` takes it back"

    def cordon(self, node: str, reason: str) -> None:
        self.cordoned[node] = reason

    def uncordon(self, node: str) -> None:
        self.cordoned.pop(node, None)
        self.records.pop(node, None)
