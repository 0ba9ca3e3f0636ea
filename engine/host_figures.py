"""What the operating system says of this process and its host: from psutil, or where that is missing from /proc."""

import os
from pathlib import Path
from typing import Any

try:
    import psutil
except ImportError:  # a bare GPU machine
    psutil = None

_PROC = Path("/proc")


def available_memory_bytes() -> int:
    """Memory of the host that can be had without swapping."""
    if psutil is not None:
        return int(psutil.virtual_memory().available)
    for line in _lines(_PROC / "meminfo"):
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


class ProcessFigures:
    """Counters of this process; 0 where the system does not tell."""

    def __init__(self) -> None:
        self._process: Any = None if psutil is None else psutil.Process()

    def counters(self) -> dict[str, int]:
        """Threads, those of libraries too; open files; resident memory."""
        if self._process is not None:
            return {
                "threads": self._process.num_threads(),
                "open_fds": self._process.num_fds(),
                "rss_bytes": self._process.memory_info().rss,
            }
        status = dict(line.split(":", 1) for line in _lines(_PROC / "self" / "status"))
        fds = _PROC / "self" / "fd"
        return {
            "threads": int(status.get("Threads", "0")),
            "open_fds": len(os.listdir(fds)) - 1 if fds.exists() else 0,  # less the one that lists them
            "rss_bytes": int(status.get("VmRSS", "0").split()[0]) * 1024,
        }


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text().splitlines()
    except OSError:
        return []
