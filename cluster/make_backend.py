"""Picks a backend by name. Ray is imported only when asked for."""

import os
import secrets
from pathlib import Path

from biphase.cluster.backend import Backend
from biphase.cluster.deployment import Deployment
from biphase.cluster.run_dir import RunDir


def set_ray_environment() -> None:
    """Before Ray is imported: no usage reports, and for a cluster of our own full priority and a token of its own.

    Ray runs its workers at niceness 15; an instance that starves beside other work is taken for a stopped one.
    Left alone, Ray 2.60 writes a token below the user's home, and another `ray start` there would then ask for it.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")
    if not os.environ.get("RAY_ADDRESS") and "RAY_AUTH_MODE" not in os.environ:
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def make_backend(deployment: Deployment, run_dir: str, *, owner: bool) -> Backend:
    """``owner``: the supervisor's, whose close ends what still runs; else a view of what the owner has opened."""
    if deployment.backend == "process":
        from biphase.cluster.process_backend import ProcessBackend

        return ProcessBackend(RunDir(Path(run_dir)), owner=owner)
    if owner:
        set_ray_environment()  # Ray reads it when it is imported
    from biphase.cluster.ray_backend import RayBackend

    return RayBackend(deployment, owner=owner)
