"""A real controller's fleet, of which a test says second by second how fast each instance is and whether it speaks.

The instances are scripted ones over real links. The controller has to look for stragglers at every turn of the event loop
(``straggler_watch.LOOK_S`` of 0): then a second has been judged when ``pass_s`` returns.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

from biphase.cluster.backend import Handle, ProcessSpec
from biphase.cluster.controller import Controller
from biphase.cluster.controller_service import ControllerService
from biphase.protos import controller_pb2
from biphase.protos.convert import signals_to_proto
from biphase.protos.process import Announcement
from biphase.protos.step_time import RecentSteps
from biphase.protos.values import WorkerSignals
from support.fake_backend import FakeBackend, FakeHandle
from support.scaling import DECODE_STEP
from support.scripted_worker import WITHIN_S, ScriptedWorker


class Host(FakeBackend):
    """Its instances are scripted workers; of its router there is only the word that it is ready."""

    def __init__(self, workers: Mapping[str, ScriptedWorker]) -> None:
        super().__init__()
        self.workers = workers

    async def start(self, spec: ProcessSpec) -> FakeHandle:
        worker = self.workers.get(spec.name)
        if worker is not None and spec.incarnation > 1:
            await worker.restart()
        return await super().start(spec)

    async def watch(self, handle: Handle) -> AsyncIterator[Announcement]:
        worker = self.workers.get(handle.name)
        yield Announcement(
            name=handle.name,
            kind=handle.kind,
            incarnation=handle.incarnation,
            pid=handle.pid,
            state="ready",
            address=worker.address if worker is not None else "127.0.0.1:1",
            node="one",
        )
        await handle.ended()


class Clock:
    now_s = 1000.0


@dataclass
class Doing:
    """What an instance tells of itself. ``factor``: how many times longer its steps take than they should."""

    batch: int
    factor: float = 1.0
    running: int = 3
    hangs_since_s: float | None = None
    is_silent: bool = False

    def signals(self, now_s: float) -> WorkerSignals:
        work = RecentSteps(num_steps=50, tokens=50 * self.batch, context_tokens=50 * self.batch * 200)
        hangs_s = 0.0 if self.hangs_since_s is None else now_s - self.hangs_since_s
        return WorkerSignals(
            uptime_s=now_s,
            running=self.running,
            decode_step=DECODE_STEP,
            recent=replace(work, seconds=self.factor * work.expected_s(DECODE_STEP)),
            step_s=hangs_s,
            step_expected_s=0.05 if hangs_s else 0.0,
        )


class Fleet:
    """A prefill and three decode instances, of which ``doing`` tells what they say, with one who watches as a router does
    and one who watches as people do."""

    def __init__(self, controller: Controller, host: Host, clock: Clock) -> None:
        self.controller, self.host, self.clock = controller, host, clock
        # the instance that is slow has the least work: only equal work may be compared
        self.doing = {name: Doing(batch=4 if name == "decode-2" else 16) for name in host.workers}
        self.reports: asyncio.Queue[controller_pb2.RouterReport] = asyncio.Queue()
        self.membership = controller_pb2.Membership()
        self.status = controller_pb2.ClusterStatus()

    async def watch_membership(self) -> None:
        async def reports() -> AsyncIterator[controller_pb2.RouterReport]:
            while True:
                yield await self.reports.get()

        watch = ControllerService(self.controller).WatchMembership(reports(), cast("Any", None))
        async with contextlib.aclosing(cast("Any", watch)):
            async for self.membership in watch:
                pass

    async def watch_status(self) -> None:
        request = controller_pb2.WatchStatusRequest()
        watch = ControllerService(self.controller).WatchStatus(request, cast("Any", None))
        async for self.status in watch:
            pass

    async def pass_s(self, seconds: int) -> None:
        """Seconds in each of which all say a word, the router too, but for those that are silent."""
        for _ in range(seconds):
            self.clock.now_s += 1.0
            now_s = self.clock.now_s
            self.reports.put_nowait(controller_pb2.RouterReport(name="router-0", incarnation=1, uptime_s=now_s))
            speaking = [name for name, doing in self.doing.items() if not doing.is_silent]
            for name in speaking:
                self.host.workers[name].send(signals=signals_to_proto(self.doing[name].signals(now_s)))
            await until(partial(self._are_heard, speaking))
            for _ in range(20):
                await asyncio.sleep(0)

    def _are_heard(self, names: Iterable[str]) -> bool:
        """Whether their words of this second are there."""
        newest = [self.controller.lives[name].signals for name in names]
        return all(signals is not None and signals[2].uptime_s == self.clock.now_s for signals in newest)

    @property
    def members(self) -> dict[str, bool]:
        """By name and incarnation: whether routers may give it new work."""
        return {f"{it.name}#{it.incarnation}": not it.draining for it in self.membership.members}

    @property
    def out(self) -> list[str]:
        return [name for name, may_work in self.members.items() if not may_work]

    @property
    def health(self) -> dict[str, str]:
        return {process.name: process.health for process in self.status.processes if process.health}

    @property
    def said(self) -> list[str]:
        """Events of stragglers."""
        events = [event for event in self.controller.events.after(0) if event.kind == "warning"]
        return [event.text for event in events if event.subject in self.host.workers]

    @property
    def killed(self) -> list[str]:
        handles = [cast("FakeHandle", handle) for handle in self.host.living]
        return [f"{handle.name}#{handle.incarnation}" for handle in handles if handle.kills]


async def until(is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(WITHIN_S):
        while not is_so():
            await asyncio.sleep(0.001)
