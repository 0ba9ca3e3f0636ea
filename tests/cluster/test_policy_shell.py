"""The autoscaler's shell and pins without processes: a controller that is all up, over a backend that only keeps notes."""

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
from support.fake_backend import FakeBackend, controller_over
from support.scaling import POLICY
from support.wanted import up

from biphase.cluster.autoscaling import MOST_UNWRITTEN
from biphase.cluster.backend import ProcessSpec
from biphase.cluster.controller import Controller
from biphase.cluster.deployment import Deployment, RolePlan
from biphase.cluster.life import Life
from biphase.cluster.rolling import RollingUpdate
from biphase.planner.autoscaler_state import AskNode, StartInstance, WithdrawNode
from biphase.planner.history import read_history
from biphase.planner.policy import BoundsChange, GpuBudget, Policy, RoleBounds, Schedule
from biphase.protos import worker_pb2
from biphase.protos.errors import InvalidRequest
from biphase.protos.values import Role

DEPLOYMENT = Deployment(model="m", prefill=RolePlan(replicas=1), decode=RolePlan(replicas=2))


class NotingBackend(FakeBackend):
    """Keeps what it is told over lives of the controller. ``free``: hosts with room for one instance each."""

    can_grow = True

    def __init__(self, *free: str) -> None:
        super().__init__()
        self.free = set(free)
        self.requests: dict[Role, str] = {}
        """The host that each has got; empty: none yet."""
        self.checked: list[set[str]] = []

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

    async def check(self, specs: Sequence[ProcessSpec], emptied: Mapping[str, Sequence[str]] | None = None) -> None:
        self.checked.append(set(self.free))


def make_controller(backend: NotingBackend, tmp_path: Path, deployment: Deployment = DEPLOYMENT) -> Controller:
    controller = controller_over(backend, tmp_path, deployment)
    controller.core.decide(0.0)
    for name in controller.core.slots:
        up(controller.core, name, 0.0)
    controller.autoscaling.policy = POLICY
    return controller


async def test_room_on_a_cordoned_host_is_no_room(tmp_path: Path) -> None:
    backend = NotingBackend("a", "b")
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
    backend = NotingBackend()
    backend.requests = {"prefill": "", "decode": ""}
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


def welcome(controller: Controller, name: str, num_blocks: int) -> None:
    """The instance's life says so of its KV blocks; 0: it says nothing yet."""
    life = SimpleNamespace(
        welcome=worker_pb2.Welcome(num_blocks=num_blocks, block_size=16) if num_blocks else None,
        signals=None,
        handle=SimpleNamespace(kind="decode"),
    )
    controller.lives[name] = cast("Life", life)


async def test_the_history_keeps_what_was_before_a_restart_of_the_only_one_of_a_role_and_of_the_controller(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = itertools.count(1.8e9)
    monkeypatch.setattr(Controller, "now_s", lambda _: next(clock))
    backend, path = NotingBackend(), tmp_path / "signals.jsonl"
    path.write_text("of a deployment before\n")
    controller = make_controller(backend, tmp_path)
    await controller._restore()
    for num_blocks in (100, 100, 0, 90):
        welcome(controller, "decode-0", num_blocks)
        await controller.autoscaling.tick()
    again = make_controller(backend, tmp_path)
    await again._restore()
    for num_blocks in (0, 100):
        welcome(again, "decode-0", num_blocks)
        await again.autoscaling.tick()
    assert (tmp_path / "signals.jsonl.1").read_text() == "of a deployment before\n"
    setup, moments = read_history(path.read_text().splitlines(), source="x")
    assert [moment.setup.decode.kv_tokens if moment.setup else None for moment in moments] == [
        *(None, None, None, None),  # while nobody says it the last one holds
        *(0, 1600),  # the next life's first look, which has heard nobody
    ]
    assert setup.decode.kv_tokens == 1600


async def test_blocks_of_another_generation_are_no_measure(tmp_path: Path) -> None:
    controller = make_controller(NotingBackend(), tmp_path)
    await controller._restore()
    welcome(controller, "decode-0", 100)
    assert controller.autoscaling._setup().decode.kv_tokens == 1600
    controller.take("next", replace(DEPLOYMENT, max_model_len=64))
    assert controller.autoscaling._setup().decode.kv_tokens == 0
    controller.core.slots["decode-0"].generation = "next"
    welcome(controller, "decode-0", 50)
    assert controller.autoscaling._setup().decode.kv_tokens == 800


NIGHT = Schedule(cron="* * * * *", duration_s=3600, name="night", decode=BoundsChange(min_replicas=1, max_replicas=2))
BOUNDED = replace(
    POLICY,
    gpu_budget=GpuBudget(min=3, max=4),
    prefill=RoleBounds(min_replicas=1, max_replicas=2),
    decode=RoleBounds(min_replicas=1, max_replicas=3),
)


@pytest.mark.parametrize(
    ("policy", "wanted", "reason"),
    [
        (BOUNDED, {"prefill": 3}, "prefill is 3, more than prefill.max_replicas 2 of the policy"),
        (BOUNDED, {"decode": 4}, "decode is 4, more than decode.max_replicas 3 of the policy"),
        (BOUNDED, {"prefill": 2, "decode": 3}, "2P:3D takes 5 GPUs, more than gpu_budget.max 4 of the policy"),
        (BOUNDED, {"decode": 1}, "1P:1D takes 2 GPUs, less than gpu_budget.min 3 of the policy"),
        (BOUNDED, {"prefill": 0}, "prefill is 0, less than prefill.min_replicas 1 of the policy"),
        (
            replace(BOUNDED, schedules=(NIGHT,)),
            {"decode": 3},
            "decode is 3, more than decode.max_replicas 2 of the policy (schedule night is on)",
        ),
        (BOUNDED, {"decode": 3}, None),
        (replace(BOUNDED, dry_run=True), {"decode": 9}, None),
        (None, {"decode": 9}, None),
    ],
)
async def test_a_pin_outside_the_policy_is_refused_before_anything_changes(
    tmp_path: Path, policy: Policy | None, wanted: Mapping[Role, int], reason: str | None
) -> None:
    controller = make_controller(NotingBackend(), tmp_path)
    controller.autoscaling.policy = policy
    if reason is None:
        await controller.admin.scale(wanted, for_s=0.0)
        assert controller.pin is not None
        return
    with pytest.raises(InvalidRequest) as refused:
        await controller.admin.scale(wanted, for_s=0.0)
    assert str(refused.value) == reason
    assert controller.pin is None and controller.core.counts() == {"prefill": 1, "decode": 2}


async def test_status_does_not_call_a_pin_what_the_policy_wants(tmp_path: Path) -> None:
    controller = make_controller(NotingBackend(), tmp_path, replace(DEPLOYMENT, autoscale="policy.yaml"))
    await controller._restore()
    controller.autoscaling.policy = POLICY
    await controller.admin.scale({"prefill": 2, "decode": 2}, for_s=0.0)
    await controller.autoscaling.tick()
    assert controller.policy_line == "policy.yaml"
    controller.pin = None
    controller.autoscaling.policy = replace(POLICY, prefill=RoleBounds(min_replicas=3))
    await controller.autoscaling.tick()
    assert controller.policy_line.startswith("policy.yaml: ")


async def test_a_flip_is_held_to_the_bounds_of_its_roles_and_to_the_budget_only_where_gpus_change(
    tmp_path: Path,
) -> None:
    controller = make_controller(NotingBackend(), tmp_path)
    controller.autoscaling.policy = replace(BOUNDED, schedules=(NIGHT,), prefill=RoleBounds(min_replicas=0))
    with pytest.raises(InvalidRequest, match=r"^decode is 3, more than decode.max_replicas 2 of the policy .schedule"):
        await controller.admin.flip("prefill-0", grace_s=1.0, for_s=0.0)
    assert controller.core.counts() == {"prefill": 1, "decode": 2}
    controller.autoscaling.policy = replace(BOUNDED, gpu_budget=GpuBudget(max=2))
    await controller.admin.flip("decode-0", grace_s=1.0, for_s=0.0)
    assert controller.core.counts() == {"prefill": 2, "decode": 1}
    uneven = replace(DEPLOYMENT, prefill=RolePlan(replicas=1, tensor_parallel_size=2))
    controller = make_controller(NotingBackend(), tmp_path, uneven)
    controller.autoscaling.policy = BOUNDED
    with pytest.raises(InvalidRequest, match=r"^2P:1D takes 5 GPUs, more than gpu_budget.max 4 of the policy$"):
        await controller.admin.flip("decode-0", grace_s=1.0, for_s=0.0)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{interval_s: 5}", ""),
        ("{{ template }}", "policy refused, the old policy stays: "),
        ('{"interval_s": ', "policy refused, the old policy stays: "),
        ("interval_s: 0x" + "f" * 6000, "policy refused, the old policy stays: "),
        ("[" * 5000, "policy refused, the old policy stays: "),
    ],
)
async def test_whatever_is_in_the_file_the_controller_lives_on(tmp_path: Path, text: str, reason: str) -> None:
    file = tmp_path / "policy.yaml"
    file.write_text("interval_s: 7\n")
    controller = make_controller(NotingBackend(), tmp_path, replace(DEPLOYMENT, autoscale=str(file)))
    controller.autoscaling.look()
    file.write_text(text)
    controller.autoscaling.look()
    controller.autoscaling.look()
    assert controller.autoscaling.policy is not None
    assert controller.autoscaling.policy.interval_s == (7.0 if reason else 5.0)
    told = [event.text for event in controller.events.after(0) if event.kind == "policy"]
    assert len(told) == 2, "each once"
    assert told[1].startswith(reason) and len(told[1]) < 400 and "\n" not in told[1]


async def test_reports_that_no_moment_will_take_are_not_put_by(tmp_path: Path) -> None:
    controller = make_controller(NotingBackend(), tmp_path)
    shell = controller.autoscaling

    def hear(uptime_s: float) -> None:
        shell.heard_instance("decode-0", None, worker_pb2.WorkerSignals(uptime_s=uptime_s))

    hear(1.0)
    assert len(shell._unwritten) == 1
    controller.update_state = asdict(RollingUpdate(generation="b", previous="a", grace_s=1.0))
    hear(2.0)
    assert len(shell._unwritten) == 1, "nothing is decided during an update"
    controller.update_state = {}
    for second in range(3, MOST_UNWRITTEN + 10):
        hear(float(second))
    assert len(shell._unwritten) == MOST_UNWRITTEN
