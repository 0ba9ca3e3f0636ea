"""Hosts that get no instance for a while because one that was there could not be reached. Pure."""

AVOID_S = 90.0
"""Longer than Ray takes to give up a node that is gone (65 s)."""


class UnreachableHosts(dict[str, float]):
    """Until when (s) each of them gets none. Owned by the Reconciler.

    Not kept over lives of the controller: the next one finds out anew, and places anew what waits for room.
    """

    def __init__(self) -> None:
        super().__init__()
        self.silent: dict[str, str] = {}
        """Of those that answered nothing at all: an address there, to ask whether they are back."""

    def avoid(self, node: str, now_s: float, silent_at: str = "") -> None:
        self[node] = now_s + AVOID_S
        if silent_at:
            self.silent[node] = silent_at

    def reached(self, node: str) -> None:
        self.pop(node, None)
        self.silent.pop(node, None)

    def end(self, now_s: float) -> None:
        """Drop those whose time is over."""
        for node in [node for node, until_s in self.items() if now_s >= until_s]:
            self.reached(node)
