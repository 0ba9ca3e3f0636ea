"""Where the log of a process is read: a file of this host, or, through what places processes, one of another host.

A log is read part by part, so that neither side ever holds more of it than that.
"""

from typing import Protocol


class LogSource(Protocol):
    poll_s: float
    """How often more is looked for where a log is followed."""

    async def read(self, path: str, at: int, tail_lines: int = 0) -> tuple[int, bytes]:
        """The next part from byte ``at`` on, and where it ends. ``tail_lines``: instead from where so many last lines begin.
        Raises InvalidRequest with why it cannot be read."""
        ...
