"""The hosts of a joined Ray cluster, followed: the list is read every few seconds, whoever joins is checked.

Owned by the backend of the controller. Instances wait here until the hosts that the cluster begins with are there, so that
prefill and decode are not packed on the first one to come; who is refused or gone gets nothing.
"""

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
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
from biphase.cluster.ray_node_check import (
    Installed,
    Weights,
    has_answered,
    installed,
    reason_against,
    reason_of_failure,
    weights_of,
)
from biphase.protos.errors import SetupError, one_line

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
        self._call = call
        self._served = [weights_of(deployment)]
        """Of the deployment that is wanted, and of others that instances still start in."""
        self._follows = False
        self._settled_key = f"{namespace}:settled".encode()
        self._seen = HostsSeen()
        self._checks: dict[tuple[str, Weights], asyncio.Task[None]] = {}
        """Those that run."""
        self._known: HostChecks[tuple[str, Weights]] = HostChecks()
        self._began_s = time.monotonic()
        self._settled = False
        self._watch: asyncio.Task[None] | None = None
        self.growth: Growth | None = None
        self.changed = asyncio.Condition()
        self.on_look: Callable[[], Awaitable[None]] | None = None

    @property
    def follows(self) -> bool:
        """Whether it looks by itself and checks who joins."""
        return self._follows

    @property
    def hosts(self) -> list[RayHost]:
        return list(self._seen.hosts.values())

    def refused(self, deployment: Deployment | None = None) -> dict[str, str]:
        """Why hosts get no instance of ``deployment``, by their ids; None: of the one that is wanted."""
        weights = self._weights(deployment)
        return {node: reason for (node, of), reason in self._known.refused.items() if of == weights}

    def shunned(self, deployment: Deployment | None = None) -> set[str]:
        """Ids of hosts that get nothing of ``deployment``: refused, or not checked yet. None: of the one that is wanted."""
        weights = self._weights(deployment)
        unfit = {node for node in self._seen.hosts if not self._known.passes((node, weights))}
        return unfit if self._follows else set()

    def unknown(self, deployment: Deployment | None = None) -> set[str]:
        """Ids of hosts that are being checked, for the first time or because that failed. None: for the one wanted."""
        return self._unknown(self._weights(deployment))

    def _unknown(self, weights: Weights, within_s: float = math.inf) -> set[str]:
        return {node for node, of in self._known.unknown(time.monotonic(), within_s) if of == weights}

    def _weights(self, deployment: Deployment | None) -> Weights:
        return weights_of(deployment) if deployment is not None else self._served[0]

    def find(self, name: str) -> RayHost | None:
        return next((host for host in self.hosts if host.is_called(name)), None)

    def views(self, takes: Mapping[str, tuple[Kind, ...]], remarks: Mapping[str, str]) -> list[NodeView]:
        """``takes``, ``remarks``: of hosts by their ids."""
        refused = self.refused()
        return [
            NodeView(
                name=host.address,
                refused=refused.get(host.node_id, ""),
                what=str(host),
                takes=takes.get(host.node_id, ()),
                remark=remarks.get(host.node_id, ""),
            )
            for host in self.hosts
        ]

    async def open(self, *, follow: bool) -> None:
        """``follow``: go on looking, and check who joins."""
        self._follows = follow
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
        self._known.keep(lambda key: key[0] in self._seen.hosts)
        for host in joined:
            logger.info("%s is there", host)
            for weights in self._served if check else ():
                self._known.join((host.node_id, weights), time.monotonic())
        self._begin_due()
        await self._tell()

    def check_for(self, deployments: Sequence[Deployment]) -> None:
        """Have the hosts checked for these, the wanted one first, and for no others any more."""
        self._served = list(dict.fromkeys(map(weights_of, deployments)))
        self._known.keep(lambda key: key[1] in self._served)
        for host in self.hosts if self._follows else ():
            for weights in self._served:
                self._known.join((host.node_id, weights), time.monotonic())
        self._begin_due()

    async def check_now(self, deployment: Deployment) -> list[str]:
        """Why hosts that are there cannot serve ``deployment``, looked at anew: one line each. SetupError: none can."""
        weights, hosts = weights_of(deployment), self.hosts
        for host in hosts:
            self._known.join((host.node_id, weights), time.monotonic())
        await asyncio.gather(*(self._begin_check(host, weights) for host in hosts))
        refused = self.refused(deployment)
        reasons = [
            refused.get(host.node_id, f"{host.address} does not say what is installed there")
            for host in hosts
            if not self._known.passes((host.node_id, weights))
        ]
        if reasons and len(reasons) == len(hosts):
            raise SetupError("; ".join(reasons))
        return reasons

    def _begin_due(self) -> None:
        for node, weights in self._known.due(time.monotonic()):
            self._begin_check(self._seen.hosts[node], weights)

    def _begin_check(self, host: RayHost, weights: Weights) -> "asyncio.Task[None]":
        key = host.node_id, weights
        if key not in self._checks:
            self._checks[key] = asyncio.create_task(self._check(host, weights))
        return self._checks[key]

    def reason_to_hold(self, deployment: Deployment) -> str:
        """Why no instance of ``deployment`` is placed yet; empty: it is time to."""
        if self._settled:
            return ""
        workers = sum(not host.is_head for host in self.hosts)
        least = self.growth.least_workers if self.growth is not None else 0
        if workers < least and time.monotonic() - self._began_s < JOIN_S:
            return f"waits for the nodes that the cluster begins with: {workers} of {least} workers have joined"
        return self.reason_to_wait_for_checks(deployment, CHECK_S)

    def reason_to_wait_for_checks(self, deployment: Deployment, within_s: float) -> str:
        """Which hosts are still being checked, for less than ``within_s``; empty: none."""
        unknown = self._unknown(weights_of(deployment), within_s)
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

    async def _check(self, host: RayHost, weights: Weights) -> None:
        key = host.node_id, weights
        before = self._known.refused.get(key, "")
        here: Installed = {}
        try:
            there = here = await asyncio.to_thread(installed, *weights)
            if host.node_id != ray.get_runtime_context().get_node_id():
                asked = await self._call(lambda: _ask(host.node_id, weights))
                there = await asyncio.wait_for(asyncio.wrap_future(asked), CHECK_S)
            self._known.answered(key, reason_against(host.address, there, here), time.monotonic())
        except Exception as error:  # noqa: BLE001 -- Ray's many, each of them a reason to give it nothing
            note = self._known.answered if has_answered(error) else self._known.failed
            note(key, reason_of_failure(host.address, error, here), time.monotonic())
        finally:
            self._checks.pop(key, None)
        reason = self._known.refused.get(key, "")
        if reason and reason != before:
            logger.error("%s", reason)
        await self._tell()

    async def _tell(self) -> None:
        async with self.changed:
            self.changed.notify_all()


def _ask(node_id: str, weights: Weights) -> Any:
    """A future of what is installed on a host."""
    there = NodeAffinitySchedulingStrategy(node_id, soft=False)
    once = ray.remote(max_calls=1)(installed)  # a process used again would not see what was installed since
    task = once.options(num_cpus=0, max_retries=0, scheduling_strategy=there)
    return task.remote(*weights).future()
