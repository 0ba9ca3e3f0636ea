"""Hosts that a Ray cluster's autoscaler may bring: one request per role, and how much room there is without any.

A request is a placement group of an instance's shape that waits until a host has room for it, then holds that room until it
is withdrawn: for the instance that it was made for, or because it is needed no more. It belongs to the deployment and not to
a life of its controller.
"""

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from ray._private import state as ray_state
from ray.util import placement_group, placement_group_table

from biphase.cluster.backend import ProcessSpec
from biphase.cluster.gpus import GpuPart
from biphase.cluster.ray_names import request_name
from biphase.cluster.ray_nodes import NodeBook
from biphase.cluster.ray_place import on_granted
from biphase.cluster.ray_placement import RayPlacement, avoiding, remove_groups
from biphase.cluster.ray_room import NOTHING, Room, bundles_of, how_many, room_of, rooms_asked
from biphase.protos.values import Role

MAX_IDLE = 64
"""Instances that would find room are counted no further."""
CallRay = Callable[[Callable[[], Any]], Awaitable[Any]]


class NodeRequests:
    """Of one deployment. ``share``: the GPU share of each rank of a spec, a blocking Ray call."""

    def __init__(
        self,
        call: CallRay,
        namespace: str,
        book: NodeBook,
        placement: RayPlacement,
        share: Callable[[ProcessSpec], float],
        *,
        joined: bool,
    ) -> None:
        self._call, self._namespace, self._book, self._placement = call, namespace, book, placement
        self._share, self._joined = share, joined

    @property
    def can_grow(self) -> bool:
        growth = self._book.growth
        workers = sum(not host.is_head for host in self._book.hosts)
        return growth is not None and workers < growth.most_workers

    async def ask(self, spec: ProcessSpec) -> str:
        """Returns why that is no use, or nothing. What is asked for already is not asked for twice."""
        if not self._joined or self._book.growth is None:
            return "this cluster has no autoscaler that could add a node"
        if await self._find(spec) is None:
            await self._make(spec)
        return ""

    async def withdraw(self, role: Role) -> None:
        """What it holds is free again, or the autoscaler stops bringing a host for it."""
        await self._call(partial(remove_groups, {request_name(self._namespace, role)}))

    async def came(self, spec: ProcessSpec) -> bool | None:
        """Whether the host that was asked for is there; None: none is asked for.

        A request that lies where the instance may not go (a host that was refused or cordoned since) is made anew.
        """
        found = await self._find(spec)
        if found is None:
            return None
        if found["state"] != "CREATED":
            return False
        nodes = set(found["bundles_to_node_id"].values())
        if nodes - {host.node_id for host in self._book.hosts}:  # it has joined since the last look
            await self._book.look(check=self._book.follows)
        there = {host.node_id for host in self._book.hosts}
        verdict = on_granted(nodes, self._placement.shunned(spec), self._book.unknown(), there)
        if verdict == "anew":
            await self._call(partial(remove_groups, {found["name"]}))
            await self._make(spec)
        return verdict == "start"

    async def idle(self, spec: ProcessSpec) -> int:
        share = await self._call(partial(self._share, spec))
        each = rooms_asked([spec], {spec.name: GpuPart(share=share)})
        if not self._joined:
            return how_many(each, await self._call(all_free), MAX_IDLE)
        hosts = [host for host in self._book.hosts if host.node_id not in self._placement.shunned(spec)]
        return how_many(each, [host.free for host in hosts], MAX_IDLE)

    async def _find(self, spec: ProcessSpec) -> dict[str, Any] | None:
        assert spec.kind == "prefill" or spec.kind == "decode"
        name = request_name(self._namespace, spec.kind)
        groups = (await self._call(placement_group_table)).values()
        return next((group for group in groups if group["name"] == name and group["state"] != "REMOVED"), None)

    async def _make(self, spec: ProcessSpec) -> None:
        assert spec.kind == "prefill" or spec.kind == "decode"
        name = request_name(self._namespace, spec.kind)
        bundles = bundles_of(spec, await self._call(partial(self._share, spec)))
        options = avoiding(self._placement.shunned(spec), len(bundles))
        await self._call(lambda: placement_group(bundles, strategy="PACK", name=name, lifetime="detached", **options))


def all_free() -> list[Room]:
    """What is free, host by host."""
    return [room_of(resources) for resources in ray_state.available_resources_per_node().values()] or [NOTHING]
