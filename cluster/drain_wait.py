"""What a drain still has to wait for, read off a deployment's status. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from biphase.protos.errors import Aborted

AFTER_GRACE_S = 15.0
"""What is left after the grace ends with the step or transfer that it is in, and a process may take 10 s to stop."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Remaining:
    """``lines``: what is left, instance by instance; none: it is over. ``grace_left_s``: until that goes on elsewhere."""

    lines: tuple[str, ...]
    aboard: int = 0
    grace_left_s: float = 0.0

    def __str__(self) -> str:
        words = ", ".join(self.lines)
        if not self.aboard:
            return words
        if self.grace_left_s:
            return f"{words}; what is left in {self.grace_left_s:.0f} s goes on elsewhere"
        return f"{words}; the time is over, what is left goes on elsewhere"


def meant_by(status: Any, *, instance: str | None, node: str | None) -> dict[str, int]:
    """The lives that a drain just asked for is about, by name. Who has no process now has nothing to end."""
    return {
        process.name: process.incarnation
        for process in status.processes
        if process.role
        and (process.name == instance or (node is not None and process.node == node))
        and process.state not in ("waiting", "stopped")
    }


def remaining(status: Any, meant: Mapping[str, int], *, to_stop: bool) -> Remaining:
    """``to_stop``: they end once they are drained, as those of a node do. Raises Aborted when the drain was taken back."""
    lines: list[str] = []
    total, grace_left_s = 0, 0.0
    for process in status.processes:
        if meant.get(process.name) != process.incarnation or process.state in ("waiting", "stopped"):
            continue  # that life is over
        if process.state == "ready":
            raise Aborted(f"the drain of {process.name} was taken back")
        if process.drained or process.state == "lost":
            lines += [f"{process.name} ends"] if to_stop else []
            continue
        aboard = max(process.legs, process.running)
        requests = f"{aboard} request{'' if aboard == 1 else 's'} aboard"
        lines.append(f"{process.name} has {requests}" if aboard else f"{process.name} is being told")
        total, grace_left_s = total + aboard, max(grace_left_s, process.grace_left_s)
    return Remaining(lines=tuple(lines), aboard=total, grace_left_s=grace_left_s)
