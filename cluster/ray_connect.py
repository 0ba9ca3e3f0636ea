"""Joining a Ray cluster that somebody has started, or starting a lean local one of our own."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray._private import node as ray_node

from biphase.cluster.gpus import host_gpus
from biphase.protos.errors import SetupError, one_line

OBJECT_STORE_BYTES = 80 * 2**20
"""Nothing of ours goes through it; this is near the least that Ray takes."""
PROBE_S = 5.0
JOINED_VARIABLE = "BIPHASE_RAY_JOINED"
"""Tells processes inside the cluster that it is somebody else's, of any number of hosts."""


def is_joined() -> bool:
    """Whether the deployment runs on a cluster that it did not start: RAY_ADDRESS names it."""
    return bool(os.environ.get("RAY_ADDRESS") or os.environ.get(JOINED_VARIABLE))


def connect(namespace: str) -> None:
    """Join the cluster that RAY_ADDRESS names, else start one. Raises SetupError."""
    address = os.environ.get("RAY_ADDRESS", "")
    options: dict[str, Any] = {"namespace": namespace, "log_to_driver": False, "configure_logging": False}
    try:
        if address:
            _probe(address)
            ray.init(address=address, **options)
            os.environ[JOINED_VARIABLE] = "1"
            return
        with _lean_head():
            ray.init(
                address="local",
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                num_gpus=len(host_gpus()),
                **options,
            )
    except Exception as error:
        where = address or "a local cluster"
        raise SetupError(f"Ray ({where}) cannot be used: {one_line(error)}") from error


def _probe(address: str) -> None:
    """Raise OSError within seconds when nobody listens at ``address`` (host:port); Ray would try for many minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host, int(port)), timeout=PROBE_S).close()


@contextmanager
def _lean_head() -> Iterator[None]:
    """A local cluster without the processes that biphase has no use for; halves the start (docs/decisions).

    Ray has no options for the autoscaler's monitor, the log monitor (log_to_driver is off) and the dashboard's server
    (which ``include_dashboard=False`` only makes smaller). A Ray that starts them otherwise just starts them.
    """
    unused = ("start_monitor", "start_log_monitor", "start_api_server")
    before = {name: getattr(ray_node.Node, name) for name in unused if hasattr(ray_node.Node, name)}
    try:
        for name in before:
            setattr(ray_node.Node, name, lambda self, **options: None)
        yield
    finally:
        for name, method in before.items():
            setattr(ray_node.Node, name, method)
