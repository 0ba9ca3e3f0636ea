"""Starts that failed, counted by host: one where several fail in a row gets no more instances. Pure."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

MAX_FAILED_STARTS = 3


@dataclass(slots=True)
class StartFailures:
    """Owned by the Reconciler. ``cordoned``: hosts that get nothing new, with the reason; people cordon hosts too."""

    cordoned: dict[str, str] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    known: set[str] = field(default_factory=set)
    takers: Mapping[str, Collection[str]] | None = None
    """By host that is there: the roles that it can take; None: nobody lists hosts."""

    def seen(self, node: str) -> None:
        if node:
            self.known.add(node)

    def started(self, node: str) -> None:
        """An instance got ready there."""
        self.counts.pop(node, None)

    def left(self, node: str) -> None:
        """It is no host of the cluster any more."""
        self.known.discard(node)

    def failed(self, node: str, kind: str = "", *, away: Collection[str] = ()) -> str | None:
        """A start of an instance of role ``kind`` has failed there; the words for it when that is one too many. The last
        host that could take one is never cordoned, nor the last beside those that are ``away``."""
        if not node:
            return None
        self.counts[node] = self.counts.get(node, 0) + 1
        others = self.known if self.takers is None else {name for name, roles in self.takers.items() if kind in roles}
        others = others - set(self.cordoned) - set(away) - {node}
        if self.counts[node] < MAX_FAILED_STARTS or node in self.cordoned or not others:
            return None
        self.cordon(node, f"{self.counts[node]} starts failed there in a row")
        return f"{node} is cordoned: {self.cordoned[node]}; `biphase cordon {node} --undo` takes it back"

    def cordon(self, node: str, reason: str) -> None:
        self.cordoned[node] = reason

    def uncordon(self, node: str) -> None:
        self.cordoned.pop(node, None)
        self.counts.pop(node, None)
