"""What the controller does about hosts: says who joined, who is gone and who is refused. Where instances go the backend decides."""

import asyncio
import logging
from typing import TYPE_CHECKING

from biphase.cluster.backend import NodeView
from biphase.protos.errors import one_line

if TYPE_CHECKING:
    from biphase.cluster.controller import Controller

LOOK_EVERY_S = 3.0
logger = logging.getLogger("biphase.cluster.controller")


class NodeWatch:
    """Owned by the controller."""

    def __init__(self, controller: "Controller") -> None:
        self._controller = controller
        self._seen: dict[str, NodeView] = {}

    async def run(self) -> None:
        while True:
            try:
                self.look(await self._controller.backend.nodes())
            except Exception as error:  # noqa: BLE001 -- a cluster whose head is away; the next look tells
                logger.warning("the list of nodes cannot be read: %s", one_line(error))
            await asyncio.sleep(LOOK_EVERY_S)

    def look(self, views: list[NodeView]) -> None:
        controller, now = self._controller, {view.name: view for view in views}
        for name, view in now.items():
            before = self._seen.get(name)
            controller.core.node_failures.seen(name)
            if before is None and self._seen:
                controller.events.add("node", name, f"{view.what or name} has joined")
                controller.core.reached(name)
            if view.refused and (before is None or before.refused != view.refused):
                controller.events.add("node", name, f"refused: {view.refused}")
            if before is not None and before.refused and not view.refused:
                controller.events.add("node", name, f"{name} passes the check now, and is refused no more")
            if view.remark and (before is None or before.remark != view.remark):
                controller.events.add("node", name, view.remark)
        controller.core.node_failures.takers = {name: view.takes for name, view in now.items()} or None
        for name in self._seen.keys() - now.keys():
            controller.core.node_failures.left(name)
            controller.events.add("node", name, f"{name} is gone")
        refused = [view.refused for view in now.values() if view.refused]
        others = [line for line in controller.warnings if line not in {view.refused for view in self._seen.values()}]
        controller.warnings[:] = [*others, *refused]
        if now != self._seen:
            self._seen = now
            controller.changed()
