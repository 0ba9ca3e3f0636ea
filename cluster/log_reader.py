"""Logs of a deployment's processes, read where they are written."""

import asyncio
import difflib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from biphase.cluster.local_logs import LocalLogs
from biphase.cluster.log_source import LogSource
from biphase.protos.errors import InvalidRequest, one_line

if TYPE_CHECKING:
    from biphase.cluster.controller import Controller


@dataclass(frozen=True, slots=True, kw_only=True)
class LogPlace:
    """``node``: the host, as its processes announce it. ``here``: the controller's own host, whatever that is called."""

    path: str
    node: str = ""
    here: bool = False

    def is_other(self, before: "LogPlace") -> bool:
        """Another file; a host that was not said before is the one that the file was read on."""
        moved = bool(before.node) and self.node != before.node
        return self.path != before.path or self.here != before.here or moved


async def read_log(controller: "Controller", name: str, *, tail_lines: int, follow: bool) -> AsyncIterator[bytes]:
    """The log of a process's newest life, its last lines (0: all); with ``follow`` what comes, over its next lives, until it
    is wanted no more. Holds one part at a time. Raises InvalidRequest."""
    place = _place_of(controller, name)
    source, at, data = await _begin(controller, name, place, tail_lines)
    while True:
        if data:
            yield data
        elif not follow:
            return
        else:
            await asyncio.sleep(source.poll_s)
            newest = _place_if_known(controller, name)
            if newest is None:
                return
            if newest.is_other(place):
                try:
                    source, at, data = await _begin(controller, name, newest)
                except InvalidRequest:
                    pass  # its next life has written nothing yet
                else:
                    place = newest
                    continue
        try:
            at, data = await source.read(place.path, at)
        except InvalidRequest as error:
            newest = _place_if_known(controller, name)
            if not follow or (newest is not None and not newest.is_other(place)):
                raise _unreadable(name, error) from error
            data = b""  # its host is gone, and it begins elsewhere


async def _begin(
    controller: "Controller", name: str, place: LogPlace, tail_lines: int = 0
) -> tuple[LogSource, int, bytes]:
    try:
        source = LocalLogs() if place.here else controller.backend.logs_of(place.node)
        return source, *await source.read(place.path, 0, tail_lines)
    except InvalidRequest as error:
        raise _unreadable(name, error) from error


def _unreadable(name: str, error: InvalidRequest) -> InvalidRequest:
    return InvalidRequest(f"the log of {name} cannot be read: {one_line(error)}")


def _place_if_known(controller: "Controller", name: str) -> LogPlace | None:
    try:
        return _place_of(controller, name)
    except InvalidRequest:
        return None


def _place_of(controller: "Controller", name: str) -> LogPlace:
    """Raises InvalidRequest for a name that nobody has, with the nearest one."""
    own = controller.announcer.current
    if name == own.name:
        return LogPlace(path=own.log_file, here=True)
    slot = controller.core.slots.get(name)
    if slot is None:
        known = [*controller.core.slots, own.name]
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"processes: {', '.join(known)}"
        raise InvalidRequest(f"no process is called {name or '(empty)'}: {hint}")
    if slot.announcement is not None and slot.announcement.log_file:
        return LogPlace(path=slot.announcement.log_file, node=slot.node)
    return LogPlace(path=str(Path(controller.spec.run_dir) / "logs" / f"{name}-{slot.life}.log"), node=slot.node)
