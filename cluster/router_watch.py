"""Silent routers: the shell around ``router_silence``. They are named to nobody, and in the end killed and started anew."""

import asyncio
from typing import TYPE_CHECKING

from biphase.cluster.reach import PAUSE_S
from biphase.cluster.router_silence import Heard, Verdict, judge
from biphase.protos import controller_pb2

if TYPE_CHECKING:
    from biphase.cluster.controller import Controller

LOOK_S = 1.0


class RouterWatch:
    """Owned by the controller. What a new life of it finds silent it finds anew."""

    def __init__(self, controller: "Controller") -> None:
        self._controller = controller
        self._verdict = Verdict()
        self._listens_since_s = self._looked_s = controller.now_s()
        controller.reports.listeners.append(self._heard)

    async def run(self) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            if not self._controller.stopping:
                self.look()

    def look(self) -> None:
        controller, now_s = self._controller, self._controller.now_s()
        if now_s - self._looked_s > PAUSE_S:
            self._listens_since_s = now_s
        self._looked_s = now_s
        verdict = judge(
            self._routers(),
            self._instances(now_s),
            self._verdict.silent,
            own_node=controller.announcer.current.node,
            replace_after_s=controller.deployment.replace_after_s,
            now_s=now_s,
        )
        before, self._verdict = self._verdict, verdict
        for name in verdict.silent.keys() - before.silent.keys():
            controller.events.add("warning", name, f"{name} is silent, clients are not sent to it")
        for slot in controller.core.slots.values():
            slot.silent = slot.name in verdict.silent
        for name in verdict.kill:
            incarnation, silent_s = controller.core.slots[name].incarnation, now_s - verdict.silent[name]
            controller.core.lost(name, incarnation, f"it was silent for {silent_s:.0f} s", now_s)
        if verdict.kill or verdict.silent.keys() != before.silent.keys():
            controller.changed()

    def _heard(self, at_s: float, report: controller_pb2.RouterReport) -> None:
        """One that is back is back at once."""
        if report.name in self._verdict.silent:
            self.look()

    def _routers(self) -> list[Heard]:
        found = []
        for slot in self._controller.core.slots.values():
            up = slot.kind == "router" and slot.phase in ("ready", "draining") and slot.stop_asked_s is None
            if not up or slot.ready_since_s is None:
                continue
            heard_s = max(slot.ready_since_s, self._listens_since_s)
            word = self._controller.reports.newest.get(slot.name)
            if word is not None and word.report.incarnation == slot.incarnation:
                heard_s = max(heard_s, word.at_s)
            found.append(Heard(name=slot.name, node=slot.node, heard_s=heard_s))
        return found

    def _instances(self, now_s: float) -> list[Heard]:
        """Those with signals on their links; one that is idle says nothing, and is there as long as its link stands."""
        found = []
        for name, life in self._controller.lives.items():
            slot = self._controller.core.slots.get(name)
            if slot is not None and slot.is_up and life.signals is not None:
                heard_s = now_s if life.is_silent_as_idle else life.signals[1]
                found.append(Heard(name=name, node=slot.node, heard_s=heard_s))
        return found
