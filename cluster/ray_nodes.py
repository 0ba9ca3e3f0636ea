"""The hosts of a joined Ray cluster, followed: the list is read every few seconds, whoever joins is checked once.

Owned by the backend of the controller. Instances wait here until the hosts that the cluster begins with are there, so that
prefill and decode are not packed on the first one to come; who is refused or gone gets nothing.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

import ray
from ray._private import state as ray_state
from ray.experimental import internal_kv
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from biphase.cluster.backend import NodeView
from biphase.cluster.deployment import Deployment
from biphase.cluster.ray_growth import Growth, find_growth
from biphase.cluster.ray_hosts import HostsSeen, RayHost, hosts_of
from biphase.cluster.ray_node_check import installed, reason_against, reason_of_failure
from biphase.protos.errors import one_line

LOOK_EVERY_S = 3.0
CHECK_S = 120.0
"""A hub name's files may have to come first."""
JOIN_S = 300.0
"""How long instances wait for the hosts that the cluster begins with."""
logger = logging.getLogger("biphase.cluster.nodes")
CallRay = Callable[[Callable[[], Any]], Awaitable[Any]]


def hosts_now() -> list[RayHost]:
    return hosts_of(ray.nodes(), ray_state.available_resources_per_node())


def growth_now() -> Growth | None:
    return find_growth(ray.get_runtime_context().gcs_address)


class NodeBook:
    """``changed`` is set after every look; ``on_look`` is awaited there."""

    def __init__(self, call: CallRay, deployment: Deployment, namespace: str) -> None:
        self._call, self._deployment = call, deployment
        self._settled_key = f"{namespace}:settled".encode()
        self._seen = HostsSeen()
        self._checks: dict[str, asyncio.Task[None]] = {}
        self._began_s = time.monotonic()
        self._settled = False
        self._watch: asyncio.Task[None] | None = None
        self.growth: Growth | None = None
        self.refused: dict[str, str] = {}
        self.changed = asyncio.Condition()
        self.on_look: Callable[[], Awaitable[None]] | None = None

    @property
    def hosts(self) -> list[RayHost]:
        return list(self._seen.hosts.values())

    @property
    def shunned(self) -> set[str]:
        """Ids of hosts that get nothing: refused, or not checked yet."""
        return {key for key in self._seen.hosts if key in self.refused or key in self._checks}

    @property
    def being_checked(self) -> set[str]:
        """Ids of hosts that may get something in a moment."""
        return set(self._checks) - set(self.refused)

    def find(self, name: str) -> RayHost | None:
        return next((host for host in self.hosts if host.is_called(name)), None)

    def views(self) -> list[NodeView]:
        return [
            NodeView(name=host.address, refused=self.refused.get(host.node_id, ""), what=str(host))
            for host in self.hosts
        ]

    async def open(self, *, follow: bool) -> None:
        """``follow``: go on looking, and check who joins."""
        self.growth = await self._call(growth_now)
        self._settled = bool(await self._call(lambda: internal_kv._internal_kv_get(self._settled_key)))
        await self.look(check=follow)
        if follow:
            self._watch = asyncio.create_task(self._follow())

    async def close(self) -> None:
        for task in (self._watch, *self._checks.values()):
            if task is not None:
                task.cancel()

    async def look(self, *, check: bool) -> None:
        joined, gone = self._seen.look(await self._call(hosts_now))
        for host in gone:
            logger.warning("%s is gone", host.address)
            self.refused.pop(host.node_id, None)
        for host in joined:
            logger.info("%s is there", host)
            if check and host.node_id != ray.get_runtime_context().get_node_id():
                self._checks[host.node_id] = asyncio.create_task(self._check(host))
        await self._tell()

    def reason_to_hold(self) -> str:
        """Why no instance is placed yet; empty: it is time to."""
        if self._settled:
            return ""
        workers = sum(not host.is_head for host in self.hosts)
        least = self.growth.least_workers if self.growth is not None else 0
        if workers < least and time.monotonic() - self._began_s < JOIN_S:
            return f"waits for the nodes that the cluster begins with: {workers} of {least} workers have joined"
        if self._checks:
            checked = [host.address for host in self.hosts if host.node_id in self._checks]
            return f"waits until it is known what is installed on {', '.join(checked)}"
        return ""

    async def settle(self) -> None:
        """From now on instances go to what is there."""
        if not self._settled:
            self._settled = True
            await self._call(lambda: internal_kv._internal_kv_put(self._settled_key, b"1", overwrite=True))

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            try:
                await self.look(check=True)
                if self.on_look is not None:
                    await self.on_look()
            except Exception as error:  # noqa: BLE001 -- whatever Ray raises while its head is away; the next look tells
                logger.warning("the list of nodes cannot be read: %s", one_line(error))

    async def _check(self, host: RayHost) -> None:
        here = installed(self._deployment.model, True)
        try:
            there = await asyncio.wait_for(
                asyncio.wrap_future(await self._call(lambda: _ask(host.node_id, self._deployment))), CHECK_S
            )
            reason = reason_against(host.address, there, here)
        except Exception as error:  # noqa: BLE001 -- Ray's many, each of them a reason to give it nothing
            reason = reason_of_failure(host.address, error, here)
        if reason and host.node_id in self._seen.hosts:
            logger.error("%s", reason)
            self.refused[host.node_id] = reason
        self._checks.pop(host.node_id, None)
        await self._tell()

    async def _tell(self) -> None:
        async with self.changed:
            self.changed.notify_all()


def _ask(node_id: str, deployment: Deployment) -> Any:
    """A future of what is installed on a host."""
    there = NodeAffinitySchedulingStrategy(node_id, soft=False)
    task = ray.remote(installed).options(num_cpus=0, max_retries=0, scheduling_strategy=there)
    return task.remote(deployment.model, deployment.load_format == "dummy").future()
