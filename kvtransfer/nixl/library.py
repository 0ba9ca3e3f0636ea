"""The NIXL library, where it is installed, and how it is set before its first use.

Taken by its bindings: the Python layer above them pickles descriptors, which no message of ours may hold, and has its
progress thread turn without a pause, two thirds of a core in an idle process. Ours waits for events.
"""

import importlib
import importlib.util
import os
import socket
from functools import cache
from pathlib import Path
from typing import Any

_BUILDS = ("nixl_cu12", "nixl_cu13", "nixl_rocm")
_PROGRESS_WAIT_US = 100_000


@cache
def why_not() -> str | None:
    """Why there is no nixl here, None where there is."""
    if not any(importlib.util.find_spec(build) for build in _BUILDS):
        return "nixl is not installed: pip install 'biphase[nixl]'"
    try:
        bindings()
    except ImportError as error:
        return f"nixl cannot be loaded: {error}"
    return None


@cache
def bindings() -> Any:
    """Raises ImportError."""
    for build in _BUILDS:
        if importlib.util.find_spec(build):
            return importlib.import_module(f"{build}._bindings")
    raise ImportError("nixl is not installed")


@cache
def errors() -> tuple[type[Exception], ...]:
    """What the bindings raise: their exceptions have no class in common."""
    library = bindings()
    own = (value for name, value in vars(library).items() if name.startswith("nixl") and name.endswith("Error"))
    return (RuntimeError, ValueError, *own)


def new_agent(name: str, host: str) -> tuple[Any, Any]:
    """An agent and its UCX backend, which listens where ``host`` is an address of this machine. Raises ConnectionError."""
    reason = why_not()
    if reason is not None:
        raise ConnectionError(reason)
    os.environ.setdefault("NIXL_LOG_LEVEL", "FATAL")  # what it says in error we say ourselves, in one line
    os.environ.setdefault("UCX_LOG_LEVEL", "fatal")
    devices = net_devices(host)
    if devices:
        os.environ.setdefault("UCX_NET_DEVICES", devices)
    library = bindings()
    config = library.nixlAgentConfig()
    config.useProgThread = True
    config.useListenThread = False
    config.syncMode = library.NIXL_THREAD_SYNC_NONE
    config.pthrDelay = _PROGRESS_WAIT_US
    config.lthrDelay = _PROGRESS_WAIT_US
    config.captureTelemetry = False
    try:
        agent = library.nixlAgent(name, config)
        return agent, agent.createBackend("UCX", {})
    except errors() as error:
        raise ConnectionError(f"nixl has no UCX: {error}") from None


_INFINIBAND = Path("/sys/class/infiniband")


def rdma_ports(infiniband: Path = _INFINIBAND) -> list[str]:
    """Those of this machine that are in use, in UCX's words."""
    return [f"{port.parents[1].name}:{port.name}" for port in sorted(infiniband.glob("*/ports/*")) if _is_active(port)]


def _is_active(port: Path) -> bool:
    try:
        return "ACTIVE" in (port / "state").read_text()
    except OSError:
        return False


def net_devices(host: str, infiniband: Path = _INFINIBAND) -> str:
    """The interface that has the address ``host``, and every RDMA port in use, in UCX's words; empty where any will do.

    UCX listens on all interfaces that it may use, so it may use the cluster's only.
    """
    try:
        address = socket.getaddrinfo(host, None)[0][4][0]
    except OSError:
        return ""
    import psutil  # not for those who only ask for RDMA ports: a GPU machine need not have it

    names = [
        name
        for name, addresses in psutil.net_if_addrs().items()
        if any(each.address.partition("%")[0] == address for each in addresses)
    ]
    if not names:
        return ""
    return ",".join([*rdma_ports(infiniband), *names])
