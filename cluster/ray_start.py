"""How an instance gets its place in a joined cluster: when it is time to, room, and hosts that have passed their check.

Its actors are made last. Until then Ray may give it room on hosts that nobody has checked, or that have joined since, and
nothing has run there.
"""

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any

from ray.util.placement_group import PlacementGroup

from biphase.cluster.backend import ProcessSpec
from biphase.cluster.ray_calls import RayCalls
from biphase.cluster.ray_group import RayGroup
from biphase.cluster.ray_names import group_name
from biphase.cluster.ray_nodes import NodeBook
from biphase.cluster.ray_placement import RayPlacement, inside, lies_on, remove_groups
from biphase.protos.errors import SetupError, one_line

FIRST_LOOK_S, MAX_LOOK_S = 0.02, 1.0
"""Between looks at a group that waits for room: doubled from one to the next."""
CHECKED_LOOK_S = 0.2
"""Between looks at one that has room, while its hosts are checked."""
logger = logging.getLogger("biphase.cluster.nodes")
Options = Callable[[int], dict[str, Any]]


class RayStart:
    """Of the instances of one deployment. ``create`` makes the actors of a life with the options of each stage's."""

    def __init__(
        self,
        call: RayCalls,
        namespace: str,
        book: NodeBook,
        placement: RayPlacement,
        share: Callable[[ProcessSpec], float],
        create: Callable[[ProcessSpec, Options], list[Any]],
    ) -> None:
        self._call, self._namespace, self._book, self._placement = call, namespace, book, placement
        self._share, self._create = share, create

    async def run(self, spec: ProcessSpec, group: RayGroup, coming: Sequence["asyncio.Future[Any]"]) -> None:
        """Ends with the actors, or an error, in ``coming``; with neither where the life is wanted no more."""
        mine = {group_name(self._namespace, spec.name, spec.incarnation)}
        try:
            share = await self._call(partial(self._share, spec))
            await self._wait_for_its_time(spec, share, group)
            if not group.is_ending:
                await self._book.settle()
                await self._book.look(check=True)
            made = await self._find_place(spec, share, group, partial(self._call, partial(remove_groups, mine)))
            actors = await self._call(partial(self._create, spec, inside(made))) if made is not None else []
        except Exception as error:  # noqa: BLE001 -- whatever it was, the life ends by it and another one begins
            for rank in coming:
                rank.set_exception(SetupError(one_line(error)))
            return
        for rank, actor in zip(coming, actors or [None] * len(coming), strict=True):
            if actor is not None:
                rank.set_result(actor)
            else:
                rank.cancel()
        if group.is_ending:
            await group.kill()
            await self._call(partial(remove_groups, mine))

    async def _wait_for_its_time(self, spec: ProcessSpec, share: float, group: RayGroup) -> None:
        while not group.is_ending:
            reason = self._book.reason_to_hold(spec.deployment) or self._placement.reason_to_wait(spec, share)
            if not reason:
                return
            group.say_waiting(reason)
            async with self._book.changed:
                await self._book.changed.wait()

    async def _find_place(
        self, spec: ProcessSpec, share: float, group: RayGroup, remove: Callable[[], Awaitable[None]]
    ) -> PlacementGroup | None:
        """The placement group that it may start in; None: it is wanted no more."""
        while not group.is_ending:
            made = await self._call(partial(self._placement.make, spec, share))
            if await self._may_start(spec, share, group, made):
                return made
            await remove()
        return None

    async def _may_start(self, spec: ProcessSpec, share: float, group: RayGroup, made: PlacementGroup) -> bool:
        """Whether it starts in that group, once this is known."""
        look_s = FIRST_LOOK_S
        while not group.is_ending:
            try:
                nodes = await self._call(partial(lies_on, made))
                if nodes is None:  # a head that has forgotten it
                    return False
                if set(nodes) - {host.node_id for host in self._book.hosts}:
                    await self._book.look(check=True)
            except Exception as error:  # noqa: BLE001 -- whatever Ray raises while its head is away; the next look tells
                logger.warning("where %s may start cannot be read: %s", spec.name, one_line(error))
                await asyncio.sleep(MAX_LOOK_S)
                continue
            verdict = await self._call(partial(self._placement.verdict, spec, share, nodes))
            if verdict != "wait":
                return verdict == "start"
            if nodes:
                group.say_waiting(self._book.reason_to_wait_for_checks(spec.deployment, math.inf))
            await asyncio.sleep(CHECKED_LOOK_S if nodes else look_s)
            look_s = min(2.0 * look_s, MAX_LOOK_S)
        return False
