"""Picks a backend by name. Ray is imported only when asked for."""

from pathlib import Path

from biphase.cluster.backend import Backend
from biphase.cluster.deployment import Deployment
from biphase.cluster.run_dir import RunDir


def make_backend(deployment: Deployment, run_dir: str, *, owner: bool) -> Backend:
    """``owner``: the supervisor's, whose close ends what still runs; else a view of what the owner has opened."""
    if deployment.backend == "process":
        from biphase.cluster.process_backend import ProcessBackend

        return ProcessBackend(RunDir(Path(run_dir)), owner=owner)
    from biphase.cluster.ray_backend import RayBackend

    return RayBackend(deployment.name, owner=owner)
