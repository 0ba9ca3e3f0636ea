"""The autoscaler's shell without processes: a controller that is all up, over a backend that only keeps notes."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import pytest
from support.scaling import POLICY
from support.wanted import up

from biphase.cluster.backend import STATE, Backend, ProcessSpec
from biphase.cluster.controller import Controller
from biphase.cluster.deployment import Deployment, RolePlan
from biphase.planner.autoscaler_state import AskNode, StartInstance, WithdrawNode
from biphase.planner.policy import Policy
from biphase.protos.process import Announcer
from biphase.protos.values import Role

DEPLOYMENT = Deployment(model="m", prefill=RolePlan(replicas=1), decode=RolePlan(replicas=2))


@dataclass
class NotingBackend:
    """Keeps what it is told over lives of the controller. ``free``: hosts with room for one instance each."""

    free: set[str] = field(default_factory=set)
    requests: dict[Role, str] = field(default_factory=dict)
    """The host that each has got; empty: none yet."""
    kept: dict[str, str] = field(default_factory=dict)
    checked: list[set[str]] = field(default_factory=list)
    can_grow: bool = True
    kill_patience_s: float | None = None

    async def idle(self, spec: ProcessSpec) -> int:
        return len(self.free - set(spec.avoid_nodes))

    async def ask_node(self, spec: ProcessSpec) -> str:
        self.requests.setdefault(cast("Role", spec.kind), "")
        return ""

    async def withdraw_node(self, role: Role) -> None:
        host = self.requests.pop(role, "")
        self.free |= {host} - {""}

    async def node_came(self, spec: ProcessSpec) -> bool | None:
        host = self.requests.get(cast("Role", spec.kind))
        return None if host is None else bool(host)

    async def check(self, specs: Sequence[ProcessSpec]) -> None:
        self.checked.append(set(self.free))

    async def adopt(self) -> list[Any]:
        return []

    async def save_state(self, text: str, key: str = STATE) -> None:
        self.kept[key] = text

    async def load_state(self, key: str = STATE) -> str | None:
        return self.kept.get(key)


def make_controller(backend: NotingBackend, tmp_path: Path, deployment: Deployment = DEPLOYMENT) -> Controller:
    spec = ProcessSpec(
        name="controller",
        kind="controller",
        incarnation=1,
        deployment=deployment,
        run_dir=str(tmp_path),
        controller_address="",
    )
    controller = Controller(spec, cast("Backend", backend), cast("Announcer", None))
    controller.core.decide(0.0)
    for name in controller.core.slots:
        up(controller.core, name, 0.0)
    controller.autoscaling.policy = POLICY
    return controller


async def test_room_on_a_cordoned_host_is_no_room(tmp_path: Path) -> None:
    backend = NotingBackend(free={"a", "b"})
    controller = make_controller(backend, tmp_path)
    assert (await controller.autoscaling._room()).decode == 2
    controller.core.node_failures.cordon("a", "by hand")
    room = await controller.autoscaling._room()
    assert (room.prefill, room.decode) == (1, 1)


async def test_the_room_of_a_node_that_has_come_goes_to_the_instance_that_it_was_asked_for(tmp_path: Path) -> None:
    backend = NotingBackend()
    shell = make_controller(backend, tmp_path).autoscaling
    await shell._do(AskNode(role="prefill"))
    shell._state = shell._state.having("prefill", asked_s=1.0)
    assert backend.requests == {"prefill": ""}
    backend.requests["prefill"] = "new"
    room = await shell._room()
    assert (room.prefill, room.decode, room.came) == (1, 0, ("prefill",))
    backend.free.add("old")
    await shell._do(StartInstance(role="prefill"))
    assert backend.requests == {"prefill": "new"}, "a start on room that was there before leaves the request alone"
    await shell._do(StartInstance(role="prefill", on_new_node=True))
    assert backend.requests == {}
    assert backend.checked == [{"old"}, {"old", "new"}], "its room is free when the instance is placed"
    await shell._do(AskNode(role="decode"))
    await shell._do(WithdrawNode(role="decode"))
    assert backend.requests == {}


async def restart(backend: NotingBackend, tmp_path: Path, policy: Policy | None) -> Controller:
    controller = make_controller(backend, tmp_path)
    await controller._restore()
    controller.autoscaling.policy = policy
    await controller.autoscaling.keep_requests()
    return controller


@pytest.mark.parametrize("policy", [POLICY, None, replace(POLICY, dry_run=True)])
async def test_requests_that_the_state_knows_go_on_in_the_next_life_and_others_do_not(
    tmp_path: Path, policy: Policy | None
) -> None:
    backend = NotingBackend(requests={"prefill": "", "decode": ""})
    first = make_controller(backend, tmp_path)
    first.autoscaling._state = first.autoscaling._state.having("prefill", asked_s=123.0)
    first.autoscaler_state = json.loads(first.autoscaling._state.to_json())
    await first.save()
    again = (await restart(backend, tmp_path, policy)).autoscaling
    obeyed = policy is POLICY
    assert list(backend.requests) == (["prefill"] if obeyed else [])
    assert again._state.prefill.asked_s == (123.0 if obeyed else None)
    backend.requests.clear()  # as with a head that was lost
    await restart(backend, tmp_path, policy)
    assert list(backend.requests) == (["prefill"] if obeyed else [])
