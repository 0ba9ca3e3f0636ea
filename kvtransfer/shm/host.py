"""Which processes can share memory: those with an equal ``host_id``."""

import os
from functools import cache
from pathlib import Path

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@cache
def host_id() -> str:
    """Of this process's kernel, process namespace and user; empty where nothing is known.

    A reader opens a source's memory through /proc/PID/fd, which takes the same namespace of process numbers and the
    same user.
    """
    try:
        boot = _BOOT_ID.read_text().strip()
        namespace = os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return ""
    return f"{boot}/{namespace}/{os.getuid()}"
