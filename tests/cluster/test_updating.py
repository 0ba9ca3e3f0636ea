"""An update's shell around `rolling`: what is refused before anything changes, what is taken over, what goes back.

The real controller, which is not run: what it would see of processes the test says. The backend is memory.
"""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest
from support.fake_backend import FakeBackend, controller_over
from support.wanted import idle, up

from biphase.cluster import rolling, wanted_set
from biphase.cluster.backend import ProcessSpec
from biphase.cluster.deployment import Deployment, RolePlan
from biphase.cluster.generation import generation_of
from biphase.cluster.router_places import RouterPlace
from biphase.cluster.updating import FIXED, TAKEN_OVER
from biphase.protos.errors import InvalidRequest, SetupError
from biphase.protos.step_time import StepTime
from biphase.router.config import RequestLimits

OLD = Deployment(model="m", prefill=RolePlan(replicas=2), decode=RolePlan(replicas=2))
NEW = replace(OLD, model="m2")


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The controller notes the deployment in its run directory, ``run``."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()


class MemoryBackend(FakeBackend):
    """Has room for whatever it is not told to refuse."""

    def __init__(self) -> None:
        super().__init__()
        self.full = ""
        self.unfit: list[str] = []
        self.checked: list[tuple[list[tuple[str, str]], dict[str, list[str]]]] = []
        self.asked: list[str] = []
        self.checks_for: list[str] = []

    async def check(self, specs: Sequence[ProcessSpec], emptied: Mapping[str, Sequence[str]] | None = None) -> None:
        names = {name: list(lives) for name, lives in (emptied or {}).items()}
        self.checked.append(([(spec.name, spec.kind) for spec in specs], names))
        if self.full:
            raise SetupError(self.full)

    async def check_nodes(self, deployment: Deployment) -> list[str]:
        self.asked.append(deployment.model)
        return self.unfit

    def check_for(self, deployments: Sequence[Deployment]) -> None:
        self.checks_for = list(dict.fromkeys(deployment.model for deployment in deployments))


class World:
    """A deployment that is up, and one update of it."""

    def __init__(self, deployment: Deployment = OLD) -> None:
        self.backend = MemoryBackend()
        self.controller = controller_over(self.backend, Path("run"), deployment)
        self.core = self.controller.core
        self.core.decide(0.0)
        for slot in self.core.slots.values():
            slot.generation = self.controller.generation
            up(self.core, slot.name, 0.0)
        self.core.decide(0.0)
        self.controller.settled.set()
        self.lines: list[str] = []

    async def update(self, wanted: Deployment, **options: Any) -> list[str]:
        """Its lines to the end."""
        chosen = {"dry_run": False, "allow_downtime": False, "grace_s": 5.0, **options}
        async for text, _ in self.controller.updating.run(wanted.to_json(), **chosen):
            self.lines.append(text)
        return self.lines

    async def refusal(self, wanted: Deployment) -> str:
        """Why it is refused; nothing has changed by then."""
        before = self.state()
        with pytest.raises(InvalidRequest) as refused:
            await self.update(wanted)
        assert self.state() == before
        assert self.lines == []
        return str(refused.value)

    def state(self) -> object:
        slots = {name: (slot.generation, slot.ending, slot.kind) for name, slot in self.core.slots.items()}
        it = self.controller
        return slots, it.deployment, it.generation, it.update_state, self.backend.checks_for, self.core.start_timeout_s

    async def follow(self) -> None:
        """Let whoever waits for the controller see what has changed."""
        self.controller.changed()
        for _ in range(20):
            await asyncio.sleep(0)

    async def end_life(self, name: str) -> None:
        now_s = self.controller.now_s()
        self.core.decide(now_s)
        idle(self.core, name)
        self.core.decide(now_s)
        self.core.gone(name, self.core.slots[name].life, "ended", now_s)
        self.core.decide(now_s)
        await self.follow()

    async def renew(self) -> str:
        """Carry out what is asked for now; returns whose new life it was."""
        (name,) = [slot.name for slot in self.core.slots.values() if slot.ending == "again"]
        await self.end_life(name)
        up(self.core, name, self.controller.now_s())
        await self.follow()
        return name


def with_another(key: str) -> Deployment:
    """What differs in that key alone."""
    given: dict[str, Any] = {
        "routers": (RouterPlace(name="r", host="h", port=1, node=""),),
        "limits": RequestLimits(max_queued_requests=1),
        "prefill": RolePlan(replicas=2, threads=3),
        "decode": RolePlan(replicas=2, threads=3),
    }
    was = getattr(OLD, key)
    other = not was if isinstance(was, bool) else was + 1 if isinstance(was, int | float) else "another"
    return replace(OLD, **{key: given.get(key, other)})


@pytest.mark.parametrize("key", [item.name for item in fields(Deployment)])
def test_every_key_is_fixed_or_taken_over_or_renews_instances(key: str) -> None:
    renews = generation_of(with_another(key)) != generation_of(OLD)
    assert [key in FIXED, key in TAKEN_OVER, renews].count(True) == 1


@pytest.mark.parametrize("key", [item.name for item in fields(RolePlan)])
def test_all_of_a_role_but_what_the_controller_alone_looks_at_renews_instances(key: str) -> None:
    was = getattr(OLD.prefill, key)
    other: Any = StepTime(fixed_s=1.0, num_steps=1) if key == "step_time" else 0.5 if was is None else was + 1
    changed = replace(OLD, prefill=replace(OLD.prefill, **{key: other}))
    assert (generation_of(changed) == generation_of(OLD)) == (key in ("replicas", "step_time"))


@pytest.mark.parametrize("key", FIXED)
async def test_what_others_were_started_with_is_refused(key: str) -> None:
    assert "an update cannot change it" in await World().refusal(with_another(key))


@pytest.mark.parametrize("key", TAKEN_OVER)
async def test_what_is_taken_over_renews_nobody(key: str) -> None:
    world, wanted = World(), with_another(key)
    await asyncio.wait_for(world.update(wanted), 10.0)
    assert world.controller.deployment == wanted
    assert world.core.start_timeout_s == wanted.start_timeout_s


async def test_no_room_is_refused_before_anything_changes() -> None:
    world = World()
    world.backend.full = "prefill-0: 1 instance asks Ray for 9 CPUs, 2 are free"
    assert await world.refusal(NEW) == "prefill-0: 1 instance asks Ray for 9 CPUs, 2 are free"
    order = ["prefill-0", "decode-0", "prefill-1", "decode-1"]
    ((specs, emptied),) = world.backend.checked
    assert specs == [(name, name.partition("-")[0]) for name in order]
    assert emptied == {name: [name] for name in order}, "each in the room of its own former life"
    assert world.backend.asked == ["m2"]


async def test_counts_that_come_after_are_checked_before() -> None:
    def counts(prefill: int, decode: int) -> Deployment:
        return replace(NEW, prefill=replace(OLD.prefill, replicas=prefill), decode=replace(OLD.decode, replicas=decode))

    world = World()
    assert (await world.refusal(counts(2, 0))).startswith("decode is 0: at least 1 decode instance")
    world.backend.full = "decode-2: no room"
    assert await world.refusal(counts(2, 3)) == "decode-2: no room"
    assert world.backend.checked[-1][0][-1] == ("decode-2", "decode")
    # where the roles are cut differently a prefill instance ends so that a decode instance may start
    world.backend.full = ""
    cut = counts(1, 3)
    await world.update(replace(cut, decode=replace(cut.decode, tensor_parallel_size=2)), dry_run=True)
    specs, emptied = world.backend.checked[-1]
    assert specs[-1] == ("decode-2", "decode")
    assert emptied["decode-2"] == ["prefill-1"]


async def test_a_dry_run_says_who_swaps_and_changes_nothing() -> None:
    world = World(replace(OLD, prefill=RolePlan(replicas=1), decode=RolePlan(replicas=1)))
    world.backend.unfit = ["10.0.0.3 has no weights: m2: no such file"]
    before = world.state()
    wanted = replace(world.controller.deployment, model="m2")
    generation = generation_of(wanted)
    assert await world.update(wanted, dry_run=True) == [
        f"prefill-0 drains and starts anew in generation {generation}",
        "prefill-0 turns to decode, to serve alone meanwhile",
        f"decode-0 drains and starts anew in generation {generation} as prefill",
        "10.0.0.3 has no weights: m2: no such file: it gets no new instance",
    ]
    assert world.state() == before


async def test_all_are_renewed_and_hosts_are_checked_for_the_new_weights() -> None:
    world = World()
    update = asyncio.create_task(world.update(replace(NEW, start_timeout_s=7.0)))
    await world.follow()
    assert world.core.start_timeout_s == 7.0
    assert world.backend.checks_for == ["m2", "m"], "while generations are mixed"
    assert [await world.renew() for _ in range(4)] == ["prefill-0", "decode-0", "prefill-1", "decode-1"]
    await asyncio.wait_for(update, 10.0)
    assert world.lines[-1].startswith("update is done")
    await world.controller.save()
    assert world.backend.checks_for == ["m2"]
    again = controller_over(world.backend, Path("run"), OLD)
    await again._restore()
    assert (again.deployment.model, again.core.start_timeout_s) == ("m2", 7.0)


async def test_it_goes_back_when_the_first_new_one_fails() -> None:
    world = World()
    update = asyncio.create_task(world.update(replace(NEW, start_timeout_s=7.0)))
    await world.follow()
    await world.end_life("prefill-0")
    world.core.gone("prefill-0", 2, "no such model", world.controller.now_s())
    await world.follow()
    await asyncio.wait_for(update, 10.0)
    assert "no such model; it goes back to generation" in world.lines[-1]
    assert world.controller.deployment == OLD
    assert world.core.slots["prefill-0"].generation == generation_of(OLD)
    assert world.core.start_timeout_s == OLD.start_timeout_s
    assert world.backend.checks_for[0] == "m"


async def test_the_last_one_goes_back_to_a_generation_that_nobody_else_serves() -> None:
    world = World(replace(OLD, prefill=RolePlan(replicas=0), decode=RolePlan(replicas=2)))
    was = world.controller.deployment
    update = asyncio.create_task(world.update(replace(was, model="m2")))
    await world.follow()
    assert await world.renew() == "decode-0"
    await world.end_life("decode-1")
    await world.controller.save()
    world.core.gone("decode-1", 2, "boom", world.controller.now_s())
    await world.follow()
    await asyncio.wait_for(update, 10.0)
    assert world.core.slots["decode-1"].generation == generation_of(was)
    await world.controller.save()
    assert world.controller.deployments[generation_of(was)] == was
    assert world.controller.deployment.model == "m2", "decode-0 serves it"


async def test_who_drains_for_it_takes_work_again_when_it_is_paused() -> None:
    world = World()
    update = asyncio.create_task(world.update(NEW))
    await world.follow()
    assert await world.renew() == "prefill-0"
    assert world.core.slots["decode-0"].ending == "again"
    world.core.decide(world.controller.now_s())
    crashed = world.core.slots["prefill-0"]
    for _ in range(3):
        now_s = crashed.not_before_s + 1.0
        world.core.decide(now_s)
        world.core.gone("prefill-0", crashed.life, "out of memory", now_s)
    await world.follow()
    await asyncio.wait_for(update, 10.0)
    assert world.lines[-1].endswith(f"it goes back to generation {generation_of(OLD)}, decode-0 takes work again")
    assert (world.core.slots["decode-0"].ending, world.core.slots["decode-0"].generation) == ("", generation_of(OLD))
    assert crashed.generation == generation_of(OLD)


async def test_an_update_is_driven_once_at_a_time() -> None:
    world = World()
    it = world.controller
    it.take("new", NEW)
    it.update_state = asdict(rolling.RollingUpdate(generation="new", previous="old", grace_s=1.0))
    first, second = asyncio.create_task(it.updating.drive()), asyncio.create_task(it.updating.drive())
    await asyncio.wait({second}, timeout=10.0)
    assert second.done() and not first.done()
    it.update_state = {}
    await world.follow()
    await asyncio.wait_for(first, 10.0)
    await asyncio.wait_for(it.updating.drive(), 10.0)  # nothing is under way


async def test_the_next_life_goes_on_with_it_once_it_has_heard_who_runs() -> None:
    """Whose link is still being made serves; it is not renewed for being down."""
    world = World()
    it = world.controller
    it.settled.clear()
    it.take("new", NEW)
    it.update_state = asdict(rolling.RollingUpdate(generation="new", previous="old", grace_s=1.0))
    driving = asyncio.create_task(it.updating.drive())
    await world.follow()
    assert [slot.name for slot in world.core.slots.values() if slot.ending] == []
    it.settled.set()
    await world.follow()
    assert [slot.name for slot in world.core.slots.values() if slot.ending] == ["prefill-0"]
    it.update_state = {}
    await world.follow()
    await asyncio.wait_for(driving, 10.0)


async def test_what_it_waits_for_without_end_is_said_once() -> None:
    none = RolePlan(replicas=0)
    world = World(replace(OLD, prefill=none))
    updating = asyncio.create_task(world.update(replace(NEW, prefill=none)))
    await world.follow()
    await world.end_life("decode-0")
    wanted_set.hold(world.core, "decode-0", 5.0, world.controller.now_s())
    up(world.core, "decode-0", world.controller.now_s())
    for _ in range(3):
        await world.follow()
    waits = [line for line in world.lines if line.startswith("update waits")]
    assert waits == ["update waits: nobody would serve without decode-1: decode-0 is drained by hand"]
    wanted_set.resume(world.core, "decode-0", world.controller.now_s())
    await world.follow()
    assert await world.renew() == "decode-1"
    await asyncio.wait_for(updating, 10.0)
    assert world.lines[-1].startswith("update is done")
