"""The hosts of a joined Ray cluster, followed: the list is read every few seconds, whoever joins is checked.

Owned by the backend of the controller. Instances wait here until the hosts that the cluster begins with are there, so that
prefill and decode are not packed on the first one to come; who is refused or gone gets nothing.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import ray
from ray._private import state as ray_state
from ray.experimental import internal_kv
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from biphase.cluster.backend import Kind, NodeView
from biphase.cluster.deployment import Deployment
from biphase.cluster.host_checks import HostChecks
from biphase.cluster.ray_growth import Growth, find_growth
from biphase.cluster.ray_hosts import HostsSeen, RayHost, hosts_of
from biphase.cluster.ray_node_check import has_answered, installed, reason_against, reason_of_failure
from biphase.protos.errors import one_line

LOOK_EVERY_S = 3.0
CHECK_S = 120.0
"""How long a check may take, and how long instances wait at the beginning until more is known of a host."""
SOON_S = 5.0
"""How long, later on, an instance that finds no room waits until more is known of a host that has just joined."""
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
        """Those that run."""
        self._known: HostChecks[str] = HostChecks()
        self._began_s = time.monotonic()
        self._settled = False
        self._watch: asyncio.Task[None] | None = None
        self.growth: Growth | None = None
        self.changed = asyncio.Condition()
        self.on_look: Callable[[], Awaitable[None]] | None = None

    @property
    def hosts(self) -> list[RayHost]:
        return list(self._seen.hosts.values())

    @property
    def refused(self) -> dict[str, str]:
        """Why hosts get nothing, by their ids."""
        return self._known.refused

    @property
    def shunned(self) -> set[str]:
        """Ids of hosts that get nothing: refused, or not checked yet."""
        return self._known.barred

    @property
    def unknown(self) -> set[str]:
        """Ids of hosts that are being checked, for the first time or because that failed."""
        return self._known.unknown(time.monotonic())

    def find(self, name: str) -> RayHost | None:
        return next((host for host in self.hosts if host.is_called(name)), None)

    def views(self, takes: Mapping[str, tuple[Kind, ...]], remarks: Mapping[str, str]) -> list[NodeView]:
        """``takes``, ``remarks``: of hosts by their ids."""
        return [
            NodeView(
                name=host.address,
                refused=self.refused.get(host.node_id, ""),
                what=str(host),
                takes=takes.get(host.node_id, ()),
                remark=remarks.get(host.node_id, ""),
            )
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
            self._known.leave(host.node_id)
        for host in joined:
            logger.info("%s is there", host)
            if check and host.node_id != ray.get_runtime_context().get_node_id():
                self._known.join(host.node_id, time.monotonic())
        for key in self._known.due(time.monotonic()):
            self._checks[key] = asyncio.create_task(self._check(self._seen.hosts[key]))
        await self._tell()

    def reason_to_hold(self) -> str:
        """Why no instance is placed yet; empty: it is time to."""
        if self._settled:
            return ""
        workers = sum(not host.is_head for host in self.hosts)
        least = self.growth.least_workers if self.growth is not None else 0
        if workers < least and time.monotonic() - self._began_s < JOIN_S:
            return f"waits for the nodes that the cluster begins with: {workers} of {least} workers have joined"
        return self.reason_to_wait_for_checks(CHECK_S)

    def reason_to_wait_for_checks(self, within_s: float) -> str:
        """Which hosts are still being checked, for less than ``within_s``; empty: none."""
        unknown = self._known.unknown(time.monotonic(), within_s)
        checked = [host.address for host in self.hosts if host.node_id in unknown]
        return f"waits until it is known what is installed on {', '.join(checked)}" if checked else ""

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
        before = self.refused.get(host.node_id, "")
        try:
            there = await asyncio.wait_for(
                asyncio.wrap_future(await self._call(lambda: _ask(host.node_id, self._deployment))), CHECK_S
            )
            self._known.answered(host.node_id, reason_against(host.address, there, here), time.monotonic())
        except Exception as error:  # noqa: BLE001 -- Ray's many, each of them a reason to give it nothing
            note = self._known.answered if has_answered(error) else self._known.failed
            note(host.node_id, reason_of_failure(host.address, error, here), time.monotonic())
        reason = self.refused.get(host.node_id, "")
        if reason and reason != before:
            logger.error("%s", reason)
        self._checks.pop(host.node_id, None)
        await self._tell()

    async def _tell(self) -> None:
        async with self.changed:
            self.changed.notify_all()


def _ask(node_id: str, deployment: Deployment) -> Any:
    """A future of what is installed on a host."""
    there = NodeAffinitySchedulingStrategy(node_id, soft=False)
    once = ray.remote(max_calls=1)(installed)  # a process used again would not see what was installed since
    task = once.options(num_cpus=0, max_retries=0, scheduling_strategy=there)
    return task.remote(deployment.model, deployment.load_format == "dummy").future()
