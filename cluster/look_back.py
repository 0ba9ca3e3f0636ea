"""What a supervisor finds of an earlier one, and the end of what must not go on: the shell around ``survivors``."""

import asyncio
import contextlib
import logging
import socket
import time
from collections.abc import Sequence

from biphase.cluster.backend import CONTROLLER, STATE, Backend, Handle
from biphase.cluster.deployment import Deployment
from biphase.cluster.survivors import SERVED, Plan, plan

CONTROLLER_END_S = 5.0
PORT_FREE_S = 2.0
logger = logging.getLogger("biphase.cluster.supervisor")


async def look_back(backend: Backend, deployment: Deployment) -> Plan:
    """What to do with what is there. Only where a cluster outlives supervisors is there anything. Ends former controllers."""
    controllers = [handle for handle in await backend.adopt() if handle.kind == CONTROLLER]
    await kill(backend, [(handle, "a former controller") for handle in controllers], CONTROLLER_END_S)
    # what it wanted is read only now that it wants no more
    served, state = await backend.load_state(SERVED), await backend.load_state(STATE)
    found = plan(served, deployment, state, [*controllers, *await backend.adopt()])
    if found.reason:
        logger.warning("%s", found.reason)
    return found


async def kill(backend: Backend, former: Sequence[tuple[Handle, str]], within_s: float | None) -> list[Handle]:
    """End them; returns those that are not seen gone in time, on hosts that cannot be reached."""
    for handle, why in former:
        logger.warning("killing %s#%d: %s", handle.name, handle.incarnation, why)
        await backend.kill(handle)
    for handle, _ in former:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(handle.ended(), within_s)
    return [handle for handle, _ in former if handle.end is None]


def free_port(host: str = "127.0.0.1") -> int:
    """A port for the controller, the same in all its lives, so that routers find it again."""
    with _probe(host) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def is_free(address: str) -> bool:
    """Whether a controller could listen at ``address``."""
    host, _, port = address.rpartition(":")
    with _probe(host) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with contextlib.suppress(OSError, ValueError):
            probe.bind((host, int(port)))
            return True
    return False


async def comes_free(address: str, within_s: float = PORT_FREE_S) -> bool:
    """Whether a controller can listen there by then: one that was killed is seen gone a moment before its port is free."""
    begun_s = time.monotonic()
    while not is_free(address):
        if time.monotonic() - begun_s >= within_s:
            return False
        await asyncio.sleep(0.02)
    return True


def _probe(host: str) -> socket.socket:
    return socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
