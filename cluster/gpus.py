"""Which GPU an instance computes on, and how much of it is its own. Pure but for ``host_gpus``; no torch, no Ray."""

import math
import os
from collections.abc import Mapping
from pathlib import Path


def share_of(asked: float | None, *, device: str, num_instances: int, num_gpus: int) -> float:
    """The part of one GPU that an instance gets, 0 to 1; 0: it computes on the CPU.

    ``asked``: the plan's ``gpus``. None: a GPU of its own where there are enough, else as many share one as must; 0 where
    there is none. ``num_gpus``: of the host, or of the Ray cluster.
    """
    if device == "cpu":
        return 0.0
    if asked is not None:
        return asked
    return 1 / math.ceil(num_instances / num_gpus) if num_gpus else 0.0


def gpu_for(ordinal: int, share: float, gpus: tuple[str, ...]) -> str:
    """The GPU of the ``ordinal``-th instance of a host, for CUDA_VISIBLE_DEVICES: filled one after the other, round."""
    return gpus[ordinal // max(1, int(1 / share + 1e-6)) % len(gpus)]


def host_gpus(environment: Mapping[str, str] = os.environ, devices: Path = Path("/dev")) -> tuple[str, ...]:
    """GPUs that processes of this host may use, as CUDA_VISIBLE_DEVICES names them, else as the driver shows them."""
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return tuple(name.strip() for name in visible.split(",") if name.strip() not in ("", "-1", "NoDevFiles"))
    found = (path.name.removeprefix("nvidia") for path in devices.glob("nvidia[0-9]*"))
    return tuple(str(index) for index in sorted(int(name) for name in found if name.isdecimal()))
