"""A share of the processors for each instance, by cgroup quota, so that one's idle time does not flow to another.

Works with cgroup v1 (the `cpu` hierarchy) and v2, as root. The processes join by themselves: ``netns_site``.
"""

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")
PERIOD_US = 10_000
"""A process that has used up its share waits for the next period with whatever it does, with its end after a kill too."""


def _base() -> Path | None:
    """Where groups with a quota can be made; None where they cannot."""
    if (_ROOT / "cpu" / "cpu.cfs_quota_us").exists() or (_ROOT / "cpu" / "cgroup.procs").exists():
        return _ROOT / "cpu"
    if (_ROOT / "cgroup.controllers").exists() and "cpu" in (_ROOT / "cgroup.controllers").read_text().split():
        return _ROOT
    return None


def lacking() -> str:
    """What this machine lacks; empty where it has all."""
    if os.geteuid() != 0:
        return "not root"
    if _base() is None:
        return "no cgroup hierarchy with the cpu controller under /sys/fs/cgroup"
    try:
        with cpu_shares(0.5):
            return ""
    except OSError as error:
        return f"cgroups with a cpu quota cannot be made: {error}"


@contextlib.contextmanager
def cpu_shares(cores: float) -> Iterator[dict[str, str]]:
    """The environment for `biphase serve`: each instance in a group of its own of ``cores``. Nothing is left afterwards."""
    base = _base()
    assert base is not None
    root = base / f"biphase-{os.getpid()}"
    root.mkdir()
    try:
        if base == _ROOT:
            for folder in (_ROOT, root):
                with contextlib.suppress(OSError):
                    (folder / "cgroup.subtree_control").write_text("+cpu")
        probe = root / "probe"
        probe.mkdir()
        set_quota(probe, cores)
        probe.rmdir()
        yield {"BIPHASE_CGROUP": str(root), "BIPHASE_CGROUP_CORES": str(cores)}
    finally:
        for _ in range(50):  # a group goes once its last process has been collected
            with contextlib.suppress(OSError):
                for group in root.iterdir():
                    if group.is_dir():
                        group.rmdir()
                root.rmdir()
                break
            time.sleep(0.1)


def set_quota(group: Path, cores: float) -> None:
    quota_us = int(cores * PERIOD_US)
    if (group / "cpu.max").exists():
        (group / "cpu.max").write_text(f"{quota_us} {PERIOD_US}")
        return
    (group / "cpu.cfs_period_us").write_text(str(PERIOD_US))
    (group / "cpu.cfs_quota_us").write_text(str(quota_us))
