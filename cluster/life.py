"""One running process as the controller holds it: its handle, its announcements, and its link where it is an instance."""

import asyncio
import logging
from typing import TYPE_CHECKING

from biphase.cluster.backend import Handle
from biphase.cluster.slot import Work
from biphase.cluster.worker_link import SECOND_OPINION_S, WorkerLink
from biphase.protos import worker_pb2

if TYPE_CHECKING:
    from biphase.cluster.controller import Controller

ASK_AGAIN_S = 0.3
"""Between two attempts to reach a silent instance while the controller's host may be the one that is cut off."""
logger = logging.getLogger("biphase.cluster.controller")


class Life:
    """Feeds the reconciler with what is seen of one process until it is gone. Owned by the controller."""

    def __init__(self, controller: "Controller", handle: Handle) -> None:
        self._controller, self.handle = controller, handle
        self.address = ""
        self.link: WorkerLink | None = None
        self.welcome: worker_pb2.Welcome | None = None
        self.signals: tuple[int, float, worker_pb2.WorkerSignals] | None = None
        """(incarnation, when they came, what they say)."""
        self.watch: asyncio.Task[None] | None = None
        self._is_linked = False
        self._holding: asyncio.Task[None] | None = None

    async def follow(self) -> None:
        """Follow the process to its end; its last word is heard before its end is."""
        controller, handle = self._controller, self.handle
        async for announcement in controller.backend.watch(handle):
            controller.core.announced(announcement, controller.now_s())
            if announcement.state in ("ready", "draining") and announcement.address:
                self.address = announcement.address
                if handle.kind != "router" and self.link is None:
                    self.link = WorkerLink(name=handle.name, address=self.address, epoch=controller.epoch, sink=self)
                    self._holding = controller.spawn(self._hold_link(self.link))
            controller.changed()
        await handle.ended()
        logger.info("%s#%d is gone: %s", handle.name, handle.incarnation, handle.end)
        if self._holding is not None:
            self._holding.cancel()
        controller.on_gone(self)

    def let_go(self) -> None:
        for task in (self.watch, self._holding):
            if task is not None:
                task.cancel()

    async def _hold_link(self, link: WorkerLink) -> None:
        controller, name = self._controller, self.handle.name
        reach, reason = controller.reach_watch, await link.hold()
        while not (link.superseded or link.refused or controller.stopping):
            if await reach.may_be_lost(link.address):
                break
            await asyncio.sleep(ASK_AGAIN_S)
            reason = await link.hold(SECOND_OPINION_S)
        if link.superseded:
            controller.superseded()
        elif not controller.stopping:
            slot = controller.core.slots.get(name)
            if slot is not None and slot.stop_asked_s is None:
                logger.warning("%s#%d is lost: %s", name, slot.incarnation, reason)
                unreached = not link.refused and reach.is_silent(link.address)
                why, now_s = f"link lost: {reason}", controller.now_s()
                controller.core.lost(name, slot.incarnation, why, now_s, by_itself=True, unreached=unreached)
                controller.changed()

    @property
    def is_silent_as_idle(self) -> bool:
        """It has nothing to do by its last words, and then it says nothing."""
        slot = self._controller.core.slots.get(self.handle.name)
        if slot is None or not self._is_linked or self.signals is None or self.signals[0] != slot.incarnation:
            return False
        said = self.signals[2]
        return not (said.queued or said.running) and (slot.work is None or slot.work.is_idle)

    # -- what comes up the link (LinkSink) ----------------------------------------------------------------------------

    def expected(self) -> tuple[int, ...]:
        slot = self._controller.core.slots.get(self.handle.name)
        if slot is None:
            return ()
        return (slot.incarnation,) if slot.flip is None else (slot.incarnation, slot.flip.incarnation)

    def welcomed(self, incarnation: int, welcome: worker_pb2.Welcome) -> None:
        self.welcome, self._is_linked = welcome, True
        self._controller.reach_watch.heard(self.address)
        self._controller.core.linked(self.handle.name, incarnation, self._controller.now_s())
        self._controller.changed()

    def broken(self, incarnation: int) -> None:
        self._is_linked = False
        self._controller.reach_watch.suspect()
        self._controller.core.unlinked(self.handle.name, incarnation, self._controller.now_s())
        self._controller.changed()

    def loaded(self, incarnation: int, load: worker_pb2.Load) -> None:
        held = self.signals[2].running_tokens if self.signals is not None and self.signals[0] == incarnation else 0
        work = Work(
            queued=load.queued,
            queued_tokens=load.queued_tokens,
            running=load.running,
            running_tokens=held,
            free_blocks=load.free_blocks,
            room_blocks=load.room_blocks,
            draining=load.draining,
            legs=load.legs,
        )
        slot = self._controller.core.slots.get(self.handle.name)
        before = slot.work if slot is not None else None
        self._controller.core.worked(self.handle.name, incarnation, work)
        if load.draining and work.is_idle:
            self._controller.changed()  # it may be asked to stop
        elif load.draining and (before is None or before.legs != work.legs):
            self._controller.status.changed()  # somebody may wait for the rest

    def signalled(self, incarnation: int, signals: worker_pb2.WorkerSignals) -> None:
        self.signals = incarnation, self._controller.now_s(), signals
        self._controller.autoscaling.heard_instance(self.handle.name, self.welcome, signals)

    def refused(self, incarnation: int, command: str, detail: str) -> None:
        logger.warning("%s#%d refuses %s: %s", self.handle.name, incarnation, command, detail)
        if command == "flip":
            self._controller.core.flip_refused(self.handle.name, incarnation, detail, self._controller.now_s())
            self._controller.changed()
