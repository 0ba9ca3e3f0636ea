"""The supervisor over a backend without processes: which controllers it starts, and what it does with what it finds."""

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from support.fake_backend import FakeBackend, FakeHandle

from biphase.cluster import controller_lives, supervisor
from biphase.cluster.backend import STATE, Handle, ProcessSpec
from biphase.cluster.controller_state import ControllerState, Pin, SlotState
from biphase.cluster.deployment import Deployment
from biphase.cluster.look_back import free_port
from biphase.cluster.run_dir import RunDir
from biphase.cluster.supervisor import StopRequests, Supervisor
from biphase.cluster.survivors import SERVED, Served
from biphase.protos.process import Announcement, ProcessState

DEPLOYMENT = Deployment(model="/models/a", name="x")
KEPT = ControllerState(
    epoch=3,
    was_ready=True,
    slots={
        "prefill-0": SlotState(kind="prefill", incarnation=4, life=4),
        "decode-0": SlotState(kind="decode", incarnation=2, life=2),
        "router-0": SlotState(kind="router", incarnation=1, life=1),
    },
    pin=Pin(text="prefill=1 decode=1", prefill=1, decode=1),
)
BAD = "cannot listen on 127.0.0.1:8701: Address already in use"
WITHIN_S = 10.0


class Scripted(FakeBackend):
    """``script``: the last words of the controllers, one after the other; None: it cannot even be started. The last one stays.

    ``closes``: whether the end of the supervisor was seen.
    """

    def __init__(self, script: Sequence[ProcessState | None] = ()) -> None:
        super().__init__()
        self.script = list(script)
        self.stays = asyncio.Event()
        self.closed = False

    async def start(self, spec: ProcessSpec) -> FakeHandle:
        if spec.kind == "controller" and self.script and self.script[0] is None:
            self.script.pop(0)
            self.started.append(spec)
            raise OSError(28, "No space left on device")
        return await super().start(spec)

    async def watch(self, handle: Handle) -> AsyncIterator[Announcement]:
        assert isinstance(handle, FakeHandle)
        word = self.script.pop(0) if self.script else "ready"
        assert word is not None
        yield Announcement(
            name=handle.name,
            kind=handle.kind,
            incarnation=handle.incarnation,
            pid=1,
            state=word,
            detail=BAD if word == "failed" else "",
            address="127.0.0.1:1",
        )
        if self.script:
            handle.die("ended with exit code 2")
        else:
            self.stays.set()
        await handle.ended()

    async def close(self) -> None:
        self.closed = True

    @property
    def controllers(self) -> list[int]:
        return [spec.incarnation for spec in self.started if spec.kind == "controller"]


@contextlib.asynccontextmanager
async def supervised(
    backend: Scripted, path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[tuple[RunDir, "asyncio.Task[int]"]]:
    run_dir = RunDir(path)
    run_dir.prepare(DEPLOYMENT)
    monkeypatch.setattr(supervisor, "make_backend", lambda *args, **options: backend)
    monkeypatch.setattr(controller_lives, "BACKOFF_S", (0.0, 0.01, 0.01))
    stops = StopRequests(foreground=False)
    run = asyncio.create_task(Supervisor(run_dir, 0.0, stops).run())
    try:
        yield run_dir, run
    finally:
        stops.ask_now()
        await asyncio.wait_for(run, WITHIN_S)


async def test_later_controllers_are_started_until_one_is_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend, said = Scripted(["ready", "failed", None, "failed", "ready"]), []
    write = RunDir.write_record
    monkeypatch.setattr(
        RunDir, "write_record", lambda self, record: (said.append(record.detail), write(self, record))[1]
    )
    async with supervised(backend, tmp_path, monkeypatch) as (_, run):
        await asyncio.wait_for(backend.stays.wait(), WITHIN_S)
        assert not run.done()
        assert backend.controllers == [1, 2, 3, 4, 5]
        assert {spec.incarnation for spec in backend.started if spec.kind != "controller"} == {1}
    told = "\n".join(said)
    assert f"controller#2 ended with exit code 2: {BAD}, starting it again" in told
    assert "controller#3 could not be started: [Errno 28] No space left on device" in told


async def test_the_first_controllers_failed_set_up_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = Scripted(["failed", "ready"])
    async with supervised(backend, tmp_path, monkeypatch) as (run_dir, run):
        assert await asyncio.wait_for(asyncio.shield(run), WITHIN_S) == supervisor.EXIT_SETUP
        record = run_dir.record()
    assert record is not None and (record.state, record.detail) == ("failed", BAD)
    assert backend.closed


async def test_a_full_disk_ends_no_supervisor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: RunDir, record: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(RunDir, "write_record", refuse)
    backend = Scripted()
    async with supervised(backend, tmp_path, monkeypatch) as (_, run):
        await asyncio.wait_for(backend.stays.wait(), WITHIN_S)
        assert not run.done()


def served_before(backend: Scripted, deployment: Deployment) -> list[FakeHandle]:
    backend.hosts_may_join = True  # type: ignore[misc]
    backend.kept[STATE] = KEPT.to_json()
    address = f"127.0.0.1:{free_port()}"
    last = Served(deployment=deployment.to_json(), controller_address=address, controller_incarnation=6)
    backend.kept[SERVED] = last.to_json()
    living = [FakeHandle("prefill-0", "prefill", 4), FakeHandle("decode-0", "decode", 2)]
    living += [FakeHandle("router-0", "router", 1), FakeHandle("controller", "controller", 6)]
    backend.living += living
    return living


async def test_what_survived_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = Scripted()
    living = served_before(backend, DEPLOYMENT)
    address = json.loads(backend.kept[SERVED])["controller_address"]
    async with supervised(backend, tmp_path, monkeypatch):
        await asyncio.wait_for(backend.stays.wait(), WITHIN_S)
        assert [handle.end for handle in living] == [None, None, None, "killed"], "but for the former controller"
        (controller,) = backend.started
        assert (controller.incarnation, controller.controller_address) == (7, address)
        assert ControllerState.from_json(backend.kept[STATE]) == KEPT
        assert Served.from_json(backend.kept[SERVED]).controller_incarnation == 7


async def test_the_port_of_a_controller_that_was_just_killed_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = Scripted()
    served_before(backend, DEPLOYMENT)
    address = json.loads(backend.kept[SERVED])["controller_address"]
    with socket.create_server(("127.0.0.1", int(address.rpartition(":")[2]))) as dying:
        asyncio.get_running_loop().call_later(0.2, dying.close)
        async with supervised(backend, tmp_path, monkeypatch):
            await asyncio.wait_for(backend.stays.wait(), WITHIN_S)
            assert [started.controller_address for started in backend.started] == [address]


async def test_routers_that_cannot_find_the_controller_start_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = Scripted()
    living = served_before(backend, DEPLOYMENT)
    elsewhere = json.loads(backend.kept[SERVED]) | {"controller_address": "10.0.0.9:8701"}
    backend.kept[SERVED] = json.dumps(elsewhere)
    async with supervised(backend, tmp_path, monkeypatch):
        await asyncio.wait_for(backend.stays.wait(), WITHIN_S)
        assert [handle.end for handle in living[:3]] == [None] * 3, "they drain first"
        kept = ControllerState.from_json(backend.kept[STATE])
        assert [name for name, slot in kept.slots.items() if slot.ending] == ["router-0"]
        assert kept.pin == KEPT.pin


async def test_another_deployment_begins_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = Scripted()
    living = served_before(backend, replace(DEPLOYMENT, max_model_len=64))
    backend.kill_patience_s = 0.05
    living[0].obeys = False  # its host cannot be reached
    async with supervised(backend, tmp_path, monkeypatch):
        await asyncio.wait_for(backend.stays.wait(), WITHIN_S)
        assert [handle.end for handle in living] == [None, "killed", "killed", "killed"]
        kept = ControllerState.from_json(backend.kept[STATE])
        assert (kept.pin, kept.was_ready, kept.epoch) == (None, False, 3)
        assert kept.former == {"prefill-0": 4, "decode-0": 2, "router-0": 1}
        assert [(life.name, life.life) for life in kept.abandoned] == [("prefill-0", 4)]
        assert backend.controllers == [7]
