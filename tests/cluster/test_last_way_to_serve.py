"""What people may not take away, without processes: drains, flips and counts while the other role is just away."""

from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
from support.fake_backend import FakeBackend
from support.wanted import up

from biphase.cluster import wanted_set
from biphase.cluster.admin import Admin
from biphase.cluster.backend import ProcessSpec
from biphase.cluster.controller import Controller
from biphase.cluster.deployment import Deployment, RolePlan
from biphase.protos.errors import InvalidRequest
from biphase.protos.process import Announcer
from biphase.protos.values import Mode

DEPLOYMENT = Deployment(model="m", prefill=RolePlan(replicas=1), decode=RolePlan(replicas=1))


def make_controller(tmp_path: Path, mode: Mode, decode: int = 1) -> Controller:
    """All up, every instance on a host called as it is."""
    spec = ProcessSpec(
        name="controller",
        kind="controller",
        incarnation=1,
        deployment=replace(DEPLOYMENT, mode=mode, decode=RolePlan(replicas=decode)),
        run_dir=str(tmp_path),
        controller_address="",
    )
    controller = Controller(spec, FakeBackend(), cast("Announcer", None))
    controller.core.decide(0.0)
    for slot in controller.core.slots.values():
        slot.generation = controller.generation
        up(controller.core, slot.name, 0.0)
    return controller


@pytest.mark.parametrize(
    ("mode", "gone", "asked", "reason"),
    [
        ("strict", "prefill-0", lambda admin: admin.drain("decode-0", grace_s=1.0), "a drain of decode-0 is refused"),
        (
            "strict",
            "prefill-0",
            lambda admin: admin.flip("decode-0", grace_s=1.0, for_s=0.0),
            "a flip of decode-0 is refused: no decode instance",
        ),
        ("auto", "decode-0", lambda admin: admin.drain("decode-0", grace_s=1.0), "a drain of decode-0 is refused"),
        ("auto", "decode-0", lambda admin: admin.drain("prefill-0", grace_s=1.0), None),
        ("auto", "decode-0", lambda admin: admin.flip("prefill-0", grace_s=1.0, for_s=0.0), None),
        ("auto", "decode-0", lambda admin: admin.scale({"decode": 2}, for_s=0.0), None),
        ("strict", "prefill-0", lambda admin: admin.drain_node("decode-0", grace_s=1.0), None),
    ],
)
async def test_the_last_way_to_serve_is_kept_while_the_other_role_is_just_away(
    tmp_path: Path, mode: Mode, gone: str, asked: Callable[[Admin], Awaitable[str]], reason: str | None
) -> None:
    controller = make_controller(tmp_path, mode)
    controller.core.gone(gone, 1, "boom", 5.0)
    if reason is None:
        await asked(controller.admin)
        return
    with pytest.raises(InvalidRequest, match=reason):
        await asked(controller.admin)
    assert controller.pin is None
    assert not any(slot.is_leaving for slot in controller.core.slots.values())


async def test_what_an_update_has_left_behind_does_not_take_work_again(tmp_path: Path) -> None:
    """A drain of its host that is taken back once the others serve the new generation."""
    for generation, stays in ((None, True), ("old", False)):
        controller = make_controller(tmp_path, "auto", decode=2)
        core = controller.core
        await controller.admin.drain_node("decode-1", grace_s=1.0)
        core.slots["decode-1"].generation = generation or controller.generation
        await controller.admin.uncordon("decode-1")
        assert (core.slots["decode-1"].ending == "") is stays
        names = {slot.name for slot in wanted_set.instances(core)}
        assert names == {"prefill-0", "decode-0", "decode-1" if stays else "decode-2"}
