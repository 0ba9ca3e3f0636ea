"""What a later life of the controller says to routers first."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import pytest
from support.fake_backend import FakeBackend
from support.scripted_worker import WITHIN_S, ScriptedWorker
from support.wanted import made, say

from biphase.cluster.backend import STATE, Kind, ProcessSpec
from biphase.cluster.broadcast import Broadcast
from biphase.cluster.controller import Controller
from biphase.cluster.controller_service import ControllerService
from biphase.cluster.controller_state import ControllerState, SlotState, restore, slots_of
from biphase.cluster.deployment import Deployment
from biphase.cluster.reconcile import Reconciler
from biphase.cluster.settling import until_settled
from biphase.protos import controller_pb2
from biphase.protos.process import Announcement, Announcer

NAMES = ("prefill-0", "decode-0", "decode-1")


def adopted() -> Reconciler:
    """What a controller's next life knows before anybody has spoken."""
    former = made(kill_patience_s=2.0)
    core = Reconciler((), 100.0, 2.0)
    restore(core, ControllerState(slots=slots_of(former), was_ready=True))
    for name in core.slots:
        core.adopt(name, 1, 0.0)
    return core


def test_it_is_settled_when_every_instance_that_runs_is_linked() -> None:
    core = adopted()
    for name in NAMES:
        assert not core.is_settled
        say(core, name, "ready", 0.1)
        assert not core.is_settled
        core.linked(name, 1, 0.2)
    assert core.is_settled and len(core.members) == 3, "nobody waits for the router"


@pytest.mark.parametrize("end", ["gone", "lost", "loading"])
def test_it_waits_for_nobody_who_serves_no_more(end: str) -> None:
    core = adopted()
    for name in NAMES[:2]:
        say(core, name, "ready", 0.1)
        core.linked(name, 1, 0.2)
    assert not core.is_settled
    if end == "gone":
        core.gone("decode-1", 1, "killed", 0.3)
        core.decide(0.3)
    elif end == "lost":
        core.lost("decode-1", 1, "no answer", 0.3)
    else:
        say(core, "decode-1", "loading", 0.3)
    assert core.is_settled


async def test_an_instance_that_does_not_answer_is_waited_for_so_long() -> None:
    core = adopted()
    await until_settled(core, Broadcast(lambda: None), within_s=0.0)
    assert not core.is_settled


async def test_a_life_that_begins_while_its_host_is_cut_off_waits_for_that_to_end() -> None:
    core, said = adopted(), asyncio.Event()

    class Changes:
        async def wait(self) -> None:
            said.set()
            await asyncio.sleep(0)

    core.looked({"a": False, "b": False}, 0.5)
    waits = asyncio.create_task(until_settled(core, cast("Any", Changes()), within_s=0.0))
    for _ in range(100):
        await asyncio.sleep(0)
    assert said.is_set() and not waits.done()
    core.looked({"a": True, "b": False}, 60.0)
    await asyncio.wait_for(waits, WITHIN_S)
    assert not core.is_settled, "who stays silent then is waited for as ever"


class Found:
    """A process that runs already, as the handle of the backend below."""

    end: str | None = None

    def __init__(self, worker: ScriptedWorker) -> None:
        self.name, self.kind, self.incarnation = worker.name, cast("Kind", worker.role), worker.incarnation
        self.pid, self.pids, self.worker = 4242, (4242,), worker
        self.speaks = asyncio.Event()

    async def ended(self) -> str:
        await asyncio.Event().wait()
        return ""


class FoundBackend(FakeBackend):
    """Has what it adopts."""

    def __init__(self, state: str, handles: list[Found]) -> None:
        super().__init__()
        self.kept[STATE] = state
        self.living = list(handles)

    async def watch(self, handle: Found) -> AsyncIterator[Announcement]:
        await handle.speaks.wait()
        yield Announcement(
            name=handle.name,
            kind=handle.kind,
            incarnation=handle.incarnation,
            pid=4242,
            state="ready",
            address=handle.worker.address,
            node="one",
        )


async def test_routers_hear_nothing_of_a_new_epoch_until_all_that_run_are_members(tmp_path: Path) -> None:
    async with ScriptedWorker("prefill") as p, ScriptedWorker("decode") as d:
        handles = [Found(p), Found(d)]
        slots = {found.name: SlotState(kind=found.kind, incarnation=7, life=7) for found in handles}
        backend = FoundBackend(ControllerState(epoch=4, was_ready=True, slots=slots).to_json(), handles)
        deployment = Deployment(model="m", port=1)
        spec = ProcessSpec(
            name="controller",
            kind="controller",
            incarnation=5,
            deployment=deployment,
            run_dir=str(tmp_path),
            controller_address="127.0.0.1:1",
        )
        announcer = Announcer(Announcement(name="controller", kind="controller", incarnation=5, pid=1), lambda _: None)
        controller = Controller(spec, backend, announcer)
        stop = asyncio.Event()
        service = ControllerService(controller)

        async def reports() -> AsyncIterator[controller_pb2.RouterReport]:
            yield controller_pb2.RouterReport(name="router-0", incarnation=1)
            await stop.wait()

        watch = service.WatchMembership(reports(), cast("Any", None))
        first = asyncio.ensure_future(anext(watch))
        running = asyncio.create_task(controller.run(stop))
        handles[0].speaks.set()
        async with asyncio.timeout(WITHIN_S):
            while not controller.core.slots["prefill-0"].linked:
                await controller.status.wait()
            assert "router-0" in controller.reports.newest, "what the router says is heard meanwhile"
            assert not first.done()
            handles[1].speaks.set()
            membership = await first
        assert (membership.epoch, [member.name for member in membership.members]) == (5, ["prefill-0", "decode-0"])
        assert json.loads(backend.kept[STATE])["epoch"] == 5
        stop.set()
        await running
        await watch.aclose()
