"""Counts by name, and what this process holds of the operating system. For GetServerInfo, tests and metrics."""

import asyncio
import os
import threading


class Counters:
    """Counts that only grow. Names are lower_snake; one appears with its first count."""

    def __init__(self, *names: str) -> None:
        self._counts = dict.fromkeys(names, 0)

    def add(self, name: str, count: int = 1) -> None:
        self._counts[name] = self._counts.get(name, 0) + count

    def get(self, name: str) -> int:
        return self._counts.get(name, 0)

    def snapshot(self) -> dict[str, int]:
        return dict(self._counts)

    def __repr__(self) -> str:
        return f"<Counters {self._counts}>"


def process_counters() -> dict[str, int]:
    """asyncio tasks, Python threads and open files of this process. Called in the loop."""
    counts = {"tasks": len(asyncio.all_tasks()), "threads": threading.active_count()}
    try:
        counts["open_fds"] = len(os.listdir("/proc/self/fd"))
    except OSError:  # no such file system here
        pass
    return counts
