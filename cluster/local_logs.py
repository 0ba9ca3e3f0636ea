"""Logs that lie on this host, read part by part."""

import asyncio
from typing import BinaryIO

from biphase.protos.errors import InvalidRequest

PART_BYTES = 64 * 2**10
Part = tuple[int, bytes, str]
"""Where it ends in the file, its bytes (none: there are no more yet), and why it cannot be read (empty: it can)."""


class LocalLogs:
    """Of this host."""

    poll_s = 0.2

    async def read(self, path: str, at: int, tail_lines: int = 0) -> tuple[int, bytes]:
        end, data, problem = await asyncio.to_thread(read_part, path, at, tail_lines)
        if problem:
            raise InvalidRequest(f"{path}: {problem}")
        return end, data


def read_part(path: str, at: int, tail_lines: int) -> Part:
    """Blocking; runs on whichever host the file is of."""
    try:
        with open(path, "rb") as file:
            file.seek(_start_of_tail(file, tail_lines) if tail_lines else at)
            data = file.read(PART_BYTES)
            return file.tell(), data, ""
    except OSError as error:
        return at, b"", error.strerror or type(error).__name__


def _start_of_tail(file: BinaryIO, lines: int) -> int:
    """Where the last ``lines`` lines begin; the last one may lack its end."""
    at = file.seek(0, 2)
    left = lines
    if at:
        file.seek(at - 1)
        left += file.read(1) == b"\n"
    while at > 0:
        size = min(PART_BYTES, at)
        at -= size
        file.seek(at)
        data = file.read(size)
        found = data.count(b"\n")
        if found < left:
            left -= found
            continue
        end = len(data)
        for _ in range(left):
            end = data.rindex(b"\n", 0, end)
        return at + end + 1
    return 0
