"""Logs of a deployment's processes, read where the controller can see them."""

import asyncio
import difflib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING

from biphase.protos.errors import InvalidRequest

if TYPE_CHECKING:
    from biphase.cluster.controller import Controller

CHUNK_BYTES = 64 * 2**10
FOLLOW_POLL_S = 0.2


async def read_log(controller: "Controller", name: str, *, tail_lines: int, follow: bool) -> AsyncIterator[bytes]:
    """The log of a process's newest life, its last lines, then what comes. Raises InvalidRequest."""
    path = _log_file(controller, name)
    try:
        file = path.open("rb")
    except OSError as error:
        slot = controller.core.slots.get(name)
        where = f"; it runs on {slot.node}" if slot is not None and slot.node else ""
        raise InvalidRequest(f"the log of {name} cannot be read here, {path}: {error.strerror}{where}") from error
    with file:
        if tail_lines:
            file.seek(_start_of_tail(path, tail_lines))
        while True:
            data = file.read(CHUNK_BYTES)
            if data:
                yield data
            elif not follow:
                return
            else:
                newest = _log_file(controller, name)
                if newest != path and newest.exists():  # its next life writes another file
                    async for chunk in read_log(controller, name, tail_lines=0, follow=True):
                        yield chunk
                    return
                await asyncio.sleep(FOLLOW_POLL_S)


def _log_file(controller: "Controller", name: str) -> Path:
    own = controller.announcer.current
    if name == own.name:
        return Path(own.log_file)
    slot = controller.core.slots.get(name)
    if slot is None:
        known = [*controller.core.slots, own.name]
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"processes: {', '.join(known)}"
        raise InvalidRequest(f"no process is called {name}: {hint}")
    if slot.announcement is not None and slot.announcement.log_file:
        return Path(slot.announcement.log_file)
    return Path(controller.spec.run_dir) / "logs" / f"{name}-{slot.life}.log"


def _start_of_tail(path: Path, lines: int) -> int:
    """Where the last ``lines`` lines begin."""
    with path.open("rb") as file:
        end = file.seek(0, 2)
        found, at = 0, end
        while at > 0:
            size = min(CHUNK_BYTES, at)
            at -= size
            file.seek(at)
            data = file.read(size)
            if at + size == end and data.endswith(b"\n"):
                data = data[:-1]
            for index in range(len(data) - 1, -1, -1):
                if data[index] == 10:
                    found += 1
                    if found == lines:
                        return at + index + 1
        return 0
