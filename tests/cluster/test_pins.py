"""How a pin ends, without processes: what would follow is checked before anything changes, and refused it stays."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import cast

import pytest
from support.fake_backend import FakeBackend
from support.scaling import POLICY
from support.wanted import up

from biphase.cluster import controller as controller_module
from biphase.cluster.backend import ProcessSpec
from biphase.cluster.controller import Controller
from biphase.cluster.controller_state import Pin
from biphase.cluster.deployment import Deployment, RolePlan
from biphase.cluster.rolling import RollingUpdate
from biphase.protos.errors import InvalidRequest, SetupError
from biphase.protos.process import Announcer

DEPLOYMENT = Deployment(model="m", prefill=RolePlan(replicas=1), decode=RolePlan(replicas=3))
UPDATE = asdict(RollingUpdate(generation="new", previous="old", grace_s=1.0))


class FullBackend(FakeBackend):
    """``full``: nothing more fits. ``at_check``: what happens while it looks."""

    full = False
    at_check: Callable[[], None] | None = None

    async def check(self, specs: Sequence[ProcessSpec], emptied: Mapping[str, Sequence[str]] | None = None) -> None:
        if self.at_check is not None:
            self.at_check()
        if self.full:
            raise SetupError("no room for decode-2")


class World:
    """A controller that is all up, two of its three decode instances kept by a pin."""

    def __init__(self, tmp_path: Path, *, until_s: float | None = None) -> None:
        self.backend = FullBackend()
        spec = ProcessSpec(
            name="controller",
            kind="controller",
            incarnation=1,
            deployment=DEPLOYMENT,
            run_dir=str(tmp_path),
            controller_address="",
        )
        self.controller = Controller(spec, self.backend, cast("Announcer", None))
        self.core = self.controller.core
        del self.core.slots["decode-2"]
        self.core.decide(0.0)
        for name in self.core.slots:
            up(self.core, name, 0.0)
        self.controller.pin = self.pin = Pin(text="scaled by hand to decode 2", prefill=1, decode=2, until_s=until_s)

    @property
    def decode(self) -> int:
        return self.core.counts()["decode"]

    def said(self, kind: str) -> list[str]:
        return [event.text for event in self.controller.events.after(0) if event.kind == kind]

    async def turns(self) -> None:
        for _ in range(50):
            await asyncio.sleep(0)


async def test_a_pin_ends_with_the_deployments_own_counts(tmp_path: Path) -> None:
    world = World(tmp_path)
    assert await world.controller.admin.unpin("by hand") == (
        "there is no policy, the deployment's own counts are wanted: a new decode instance starts"
    )
    assert (world.controller.pin, world.decode) == (None, 3)


async def test_where_the_counts_are_refused_the_pin_stays(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.backend.full = True
    with pytest.raises(InvalidRequest, match="no room for decode-2"):
        await world.controller.admin.unpin("by hand")
    assert (world.controller.pin, world.decode) == (world.pin, 2)


async def test_an_update_in_its_middle_keeps_its_counts(tmp_path: Path) -> None:
    world = World(tmp_path)

    def begin() -> None:
        world.controller.update_state = UPDATE

    world.backend.at_check = begin  # even one that begins while room is looked for
    with pytest.raises(InvalidRequest, match="an update is under way"):
        await world.controller.admin.unpin("by hand")
    assert (world.controller.pin, world.decode) == (world.pin, 2)


async def test_another_pin_that_comes_meanwhile_is_not_dropped(tmp_path: Path) -> None:
    world = World(tmp_path)
    another = Pin(text="another", prefill=1, decode=2, until_s=None)

    def pin() -> None:
        world.controller.pin = another

    world.backend.at_check = pin
    with pytest.raises(InvalidRequest, match="pinned anew meanwhile"):
        await world.controller.admin.unpin("by hand")
    assert (world.controller.pin, world.decode) == (another, 2)


async def test_a_policy_decides_whatever_has_room(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.controller.autoscaling.policy, world.backend.full = POLICY, True
    assert await world.controller.admin.unpin("by hand") == "the policy decides"
    assert (world.controller.pin, world.decode) == (None, 2)


async def test_the_end_of_its_time_waits_for_an_update_is_said_once_where_refused_and_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(controller_module, "PIN_RETRY_S", 0.0)
    world = World(tmp_path, until_s=1.0)  # long over
    world.controller.update_state, world.backend.full = UPDATE, True
    keeping = asyncio.create_task(world.controller._keep_pin())
    await world.turns()
    assert (world.controller.pin, world.said("refused")) == (world.pin, []), "an update goes first"
    world.controller.update_state = {}
    await world.turns()
    assert (world.controller.pin, world.decode) == (world.pin, 2)
    assert world.said("refused") == ["end of the pin, tried again: no room for decode-2"]
    world.backend.full = False
    await world.turns()
    assert (world.controller.pin, world.decode) == (None, 3)
    (said,) = world.said("scale")
    assert said.startswith("the time of the pin is over: there is no policy, the deployment's own counts are wanted")
    keeping.cancel()
