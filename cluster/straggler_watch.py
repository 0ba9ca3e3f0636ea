"""Slow and stopped instances: the shell around ``planner.stragglers``. Out: routers give them nothing new; stopped: replaced."""

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING

from biphase.cluster.planner_view import role_of
from biphase.cluster.signal_reports import instance_report
from biphase.planner.stragglers import Heard, Rules, StragglerState, judge
from biphase.protos.step_time import RecentSteps

if TYPE_CHECKING:
    from biphase.cluster.controller import Controller

LOOK_S = 1.0
RECENT_S = 10.0
"""Of so long back are the steps that an instance tells of. One that is idle says nothing more, and has none after that."""


class StragglerWatch:
    """Looks at the newest signals of all instances that serve. Its memory ends with the controller's life: who is slow
    is found slow again."""

    def __init__(self, controller: "Controller") -> None:
        self._controller = controller
        self._state = StragglerState()

    async def run(self) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            core = self._controller.core
            if core.was_ready and not core.reach.is_cut_off and not self._controller.stopping:
                self.look()
                self._controller.admin.rescue()

    def look(self) -> None:
        controller = self._controller
        core, now_s = controller.core, controller.now_s()
        heard = []
        for name, life in controller.lives.items():
            slot = core.slots.get(name)
            if slot is None or not slot.is_up or slot.phase != "ready" or slot.is_leaving or life.signals is None:
                continue
            incarnation, at_s, message = life.signals
            if incarnation != slot.incarnation:
                continue
            report = instance_report(name, role_of(slot), incarnation, message)
            is_idle = life.is_silent_as_idle  # its link stands, which says enough of one that has nothing to tell
            if is_idle and now_s - at_s >= RECENT_S:
                report = replace(report, recent=RecentSteps())
            heard.append(Heard(report=report, at_s=at_s, is_idle=is_idle))
        rules = Rules(replace_after_s=controller.deployment.replace_after_s)
        verdict, self._state = judge(heard, self._state, now_s, rules)
        changed = bool(verdict.reasons)
        for slot in core.slots.values():
            found = slot.name in verdict.out, verdict.health.get(slot.name, "")
            changed = changed or found != (slot.slow, slot.health)
            slot.slow, slot.health = found
        for reason in verdict.reasons:
            controller.events.add("warning", reason.split(" ")[0], reason)
        for name in verdict.kill:
            core.lost(name, core.slots[name].incarnation, "it had stopped with work aboard", now_s)
        if changed:
            core.refresh(now_s)
            controller.changed()
