"""A controller whose parts or writes fail, and lives that outlast it: the real controller over a backend without processes."""

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from support.fake_backend import FakeBackend, FakeHandle, controller_over
from support.scripted_worker import ScriptedWorker

from biphase.cluster import controller as controller_module
from biphase.cluster import reconcile
from biphase.cluster.backend import STATE, ProcessSpec
from biphase.cluster.controller import Controller
from biphase.cluster.controller_messages import status_of, warnings_of
from biphase.cluster.controller_state import AbandonedLife, ControllerState, SlotState
from biphase.cluster.deployment import Deployment
from biphase.cluster.keeping import Keeping
from biphase.cluster.retiring import GIVES_UP_S, MAX_LIVES, Retiring
from biphase.cluster.run_dir import RunDir
from biphase.cluster.slot import FlipTo
from biphase.cluster.worker_link import Told, retire

DEPLOYMENT = Deployment(model="/models/a", name="x")
SLOTS = {
    "prefill-0": SlotState(kind="prefill", incarnation=1, life=1),
    "decode-0": SlotState(kind="decode", incarnation=1, life=1),
    "router-0": SlotState(kind="router", incarnation=1, life=1),
}
AWAY = AbandonedLife(name="decode-0", kind="decode", life=2, incarnation=2, address="10.9.9.9:1")
WITHIN_S = 10.0


def made(backend: FakeBackend, run_dir: Path) -> Controller:
    return controller_over(backend, run_dir, DEPLOYMENT)


def served_before(backend: FakeBackend, **changes: object) -> None:
    """All ran, and none of it runs any more."""
    backend.kept[STATE] = ControllerState(**{"was_ready": True, "slots": SLOTS, **changes}).to_json()  # type: ignore[arg-type]


@contextlib.asynccontextmanager
async def running(controller: Controller) -> AsyncIterator["asyncio.Task[None]"]:
    stop = asyncio.Event()
    run = asyncio.create_task(controller.run(stop))
    try:
        yield run
    finally:
        stop.set()
        with contextlib.suppress(RuntimeError):
            await asyncio.wait_for(run, WITHIN_S)


async def until(controller: Controller, kind: str, text: str) -> None:
    """Wait for an event."""
    async with asyncio.timeout(WITHIN_S):
        async for event in controller.events.follow(0):
            if event.kind == kind and text in event.text:
                return


# -- parts -----------------------------------------------------------------------------------------------------------


async def test_a_part_that_fails_ends_the_controllers_life(tmp_path: Path) -> None:
    controller = made(FakeBackend(), tmp_path)

    async def part() -> None:
        raise ValueError("a bug")

    async with running(controller) as run:
        controller.spawn(part())
        with pytest.raises(RuntimeError, match="part of the controller") as caught:
            await asyncio.wait_for(asyncio.shield(run), WITHIN_S)
    assert isinstance(caught.value.__cause__, ValueError)


async def test_what_follows_a_process_is_a_part_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = FakeBackend()
    controller = made(backend, tmp_path)
    monkeypatch.setattr(controller, "on_gone", lambda life: 1 / 0)
    async with running(controller) as run:
        await asyncio.wait_for(backend.began.wait(), WITHIN_S)
        backend.living[0].die()  # type: ignore[attr-defined]
        with pytest.raises(RuntimeError):
            await asyncio.wait_for(asyncio.shield(run), WITHIN_S)


# -- writes ----------------------------------------------------------------------------------------------------------


async def test_while_the_state_cannot_be_written_nothing_starts_and_nothing_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(controller_module, "RETRY_S", 0.05)
    backend = FakeBackend()
    served_before(backend)
    backend.refuses = lambda text: '"life": 2' in text  # a next life's incarnation
    controller = made(backend, tmp_path)
    async with running(controller) as run:
        await until(controller, "warning", "state cannot be written, tried again: No space left on device")
        await until(controller, "warning", "decode-0#2 is not started: state cannot be written")
        assert any("No space left on device" in line for line in warnings_of(controller))
        assert not run.done()
        assert backend.started == []
        assert backend.refused < 20, "it does not spin"
        backend.refuses = lambda text: False
        await until(controller, "warning", "state is written again")
        await asyncio.wait_for(backend.began.wait(), WITHIN_S)
        assert warnings_of(controller) == []
    kept = ControllerState.from_json(backend.kept[STATE])
    first = backend.started[0]
    assert kept.slots[first.name].life == first.incarnation


async def test_starts_that_are_not_even_tried_end_no_deployment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reconcile, "PUT_OFF_S", 0.02)
    monkeypatch.setattr(controller_module, "RETRY_S", 0.05)
    backend = FakeBackend()
    backend.refuses = lambda text: '"life": ' in text and '"life": 0' not in text  # any life that begins
    controller = made(backend, tmp_path)
    async with running(controller) as run:
        while controller.core.slots["decode-0"].incarnation <= 2 * reconcile.MAX_FIRST_CRASHES:
            await asyncio.wait_for(controller.status.wait(), WITHIN_S)
        assert not run.done() and backend.started == []
        slot = controller.core.slots["decode-0"]
        assert (slot.failures, slot.no_room) == (0, False)
        told = [event for event in controller.events.after(0) if "decode-0" in event.text]
        assert len(told) <= 1, "said once"
        backend.refuses = lambda text: False
        await asyncio.wait_for(backend.began.wait(), WITHIN_S)


def test_the_same_trouble_in_other_words_is_one_trouble() -> None:
    told: list[str] = []
    controller = SimpleNamespace(
        warnings=["another"],
        events=SimpleNamespace(add=lambda kind, subject, text: told.append(text)),
        status=SimpleNamespace(changed=lambda: None),
    )
    keeping = Keeping(cast("Any", controller))

    async def write(problem: str) -> None:
        if problem:
            raise OSError(problem)

    for problem in ("no answer, try 1", "no answer, try 2", ""):
        asyncio.run(keeping.attempt("state", lambda problem=problem: write(problem)))  # type: ignore[misc]
        lines = [f"state cannot be written, tried again: {problem}"] if problem else []
        assert controller.warnings == ["another", *lines]
    assert told == ["state cannot be written, tried again: no answer, try 1", "state is written again"]


async def test_events_that_cannot_be_written_stay_and_are_written_later(tmp_path: Path) -> None:
    backend = FakeBackend()
    backend.refuses = lambda text: text.startswith("[") or text.isdigit()  # events and their head
    controller = made(backend, tmp_path)
    async with running(controller) as run:
        await asyncio.wait_for(backend.began.wait(), WITHIN_S)
        controller.events.add("scale", "", "something that happened")
        controller.changed()
        await until(controller, "warning", "events cannot be written")
        assert len(backend.started) == 3, "that stops no start"
        assert not run.done()
        backend.refuses = lambda text: False
        await until(controller, "warning", "events is written again")
        await controller.save()
    assert "something that happened" in backend.kept["events/0"]


async def test_a_life_whose_epoch_cannot_be_kept_does_not_begin(tmp_path: Path) -> None:
    backend = FakeBackend()
    backend.refuses = lambda text: True
    with pytest.raises(RuntimeError, match="No space left on device"):
        await made(backend, tmp_path).run(asyncio.Event())


async def test_a_host_that_takes_no_files_is_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = FakeBackend()
    served_before(backend)

    async def start(spec: ProcessSpec) -> FakeHandle:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(backend, "start", start)
    controller = made(backend, tmp_path)
    async with running(controller) as run:
        await until(controller, "end", "cannot be started")
        assert not run.done()


async def test_status_lists_the_pids_of_ranks_once_all_have_said_theirs(tmp_path: Path) -> None:
    backend = FakeBackend()
    controller = made(backend, tmp_path)
    async with running(controller):
        async with asyncio.timeout(WITHIN_S):
            while "decode-0" not in controller.lives:
                await asyncio.sleep(0)

        def pids_of(*pids: int) -> list[int]:
            cast("FakeHandle", controller.lives["decode-0"].handle).pids = pids
            return [pid for process in status_of(controller).processes for pid in process.rank_pids]

        assert pids_of(5, 0, 7) == []
        assert pids_of(5, 6, 7) == [5, 6, 7]
        assert pids_of(5) == [], "its only one is the process itself"


# -- what earlier lives left ------------------------------------------------------------------------------------------


async def test_the_deployment_that_is_served_is_noted(tmp_path: Path) -> None:
    backend, other = FakeBackend(), Deployment(model="/models/b", name="x")
    served_before(backend, generation="g", deployments={"g": other.to_json()})
    async with running(made(backend, tmp_path)):
        await asyncio.wait_for(backend.began.wait(), WITHIN_S)
    assert RunDir(tmp_path).deployment() == other


async def test_what_was_under_way_with_a_life_that_is_gone_is_over(tmp_path: Path) -> None:
    backend = FakeBackend()
    turning = SlotState(kind="prefill", incarnation=3, life=3, flip=FlipTo(kind="decode", incarnation=4))
    renewed = SlotState(kind="decode", incarnation=2, life=2, ending="again", next_generation="new")
    deployments = {"old": DEPLOYMENT.to_json(), "new": DEPLOYMENT.to_json()}
    served_before(
        backend,
        slots={**SLOTS, "prefill-0": turning, "decode-0": renewed},
        generation="new",
        deployments=deployments,
    )
    controller = made(backend, tmp_path)
    async with running(controller):
        async with asyncio.timeout(WITHIN_S):
            while len(backend.started) < 3:
                await controller.status.wait()
        begun = {spec.name: (spec.kind, spec.incarnation) for spec in backend.started}
        assert begun == {"prefill-0": ("decode", 5), "decode-0": ("decode", 3), "router-0": ("router", 2)}
        slot = controller.core.slots["decode-0"]
        assert (slot.ending, slot.generation) == ("", "new")


async def test_lives_given_away_before_are_retired_on(tmp_path: Path) -> None:
    backend = FakeBackend()
    served_before(backend, abandoned=(AWAY,))
    old = FakeHandle("decode-0", "decode", 2, obeys=False)
    backend.living.append(old)
    controller = made(backend, tmp_path)
    controller.retiring = Retiring(controller, tell=silent, every_s=0.01)
    async with running(controller):
        async with asyncio.timeout(WITHIN_S):
            while old.kills < 2:
                await asyncio.sleep(0.01)
        assert "decode-0" in {spec.name for spec in backend.started}, "its place is another's"
        assert json.loads(backend.kept[STATE])["abandoned"][0]["life"] == 2
        old.die("its node is gone")
        async with asyncio.timeout(WITHIN_S):
            while controller.retiring.lives or json.loads(backend.kept[STATE])["abandoned"]:
                await asyncio.sleep(0.01)


async def silent(address: str, incarnation: int, epoch: int, reason: str, within_s: float) -> Told:
    return "silent"


@pytest.mark.parametrize("answer", ["told", "refused"])
async def test_a_life_that_nothing_lists_is_told_by_its_address(tmp_path: Path, answer: Told) -> None:
    asked: list[tuple[str, int]] = []

    async def tell(address: str, incarnation: int, epoch: int, reason: str, within_s: float) -> Told:
        asked.append((address, incarnation))
        return answer if len(asked) == 3 else "silent"

    controller = made(FakeBackend(), tmp_path)
    retiring = Retiring(controller, tell=tell, every_s=0.0)
    retiring.restore([AbandonedLife(name="d", kind="decode", life=1, incarnation=2, address="h:1", since_s=2e10)], {})
    async with asyncio.timeout(WITHIN_S):
        while retiring.lives:
            await asyncio.sleep(0)
    assert asked == [("h:1", 2)] * 3


async def test_what_is_kept_of_lives_given_away_is_bounded(tmp_path: Path) -> None:
    controller = made(FakeBackend(), tmp_path)
    retiring = Retiring(controller, tell=silent, every_s=WITHIN_S)
    now_s = controller.now_s()
    for number in range(MAX_LIVES + 5):
        retiring.begin(
            AbandonedLife(name="d", kind="decode", life=number, incarnation=1, address="h:1", since_s=now_s), None
        )
    assert len(retiring.lives) == MAX_LIVES
    assert ("d", 4) not in retiring.lives
    old = AbandonedLife(name="o", kind="decode", life=1, incarnation=1, address="h:1", since_s=now_s - GIVES_UP_S)
    retiring.begin(old, None)
    retiring.begin(AbandonedLife(name="unheard", kind="decode", life=1, incarnation=1, since_s=now_s), None)
    async with asyncio.timeout(WITHIN_S):
        while {"o", "unheard"} & {name for name, _ in retiring.lives}:
            await asyncio.sleep(0)


async def test_a_word_to_a_former_life_says_what_came_of_it() -> None:
    async with ScriptedWorker("decode", incarnation=7) as worker:
        assert await retire(worker.address, 6, 1, "over", WITHIN_S) == "refused"
        told = asyncio.create_task(retire(worker.address, 7, 1, "over", 0.5))
        while (await asyncio.wait_for(worker.commands.get(), WITHIN_S)).WhichOneof("command") != "retire":
            pass
        assert await told == "told"
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        port = bound.getsockname()[1]
        assert await retire(f"127.0.0.1:{port}", 7, 1, "over", WITHIN_S) == "refused"
        bound.listen()  # takes the connection, and says nothing
        assert await retire(f"127.0.0.1:{port}", 7, 1, "over", 0.3) == "silent"
