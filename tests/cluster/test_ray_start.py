"""How instances get their places: on whom they start, and what they are moved away from. Hosts and groups are made up."""

import asyncio
from collections.abc import Callable
from typing import Any, cast

import pytest

from biphase.cluster.backend import Kind, ProcessSpec
from biphase.cluster.deployment import Deployment, Placement
from biphase.cluster.gpus import WHOLE
from biphase.cluster.ray_hosts import RayHost
from biphase.cluster.ray_room import Room
from biphase.cluster.wanted import spec_of

pytestmark = pytest.mark.ray


def spec(name: str, kind: Kind, placement: Placement = "spread") -> ProcessSpec:
    base = ProcessSpec(
        name="controller",
        kind="controller",
        incarnation=1,
        deployment=Deployment(model="m", device="cpu", placement=placement),
        run_dir="/r",
        controller_address="",
        cpus=1.0,
    )
    return spec_of(base, name, 1, kind=kind)


class Group:
    """The handle of a life."""

    def __init__(self, life: ProcessSpec) -> None:
        self.name, self.kind, self.incarnation = life.name, life.kind, life.incarnation
        self.end: str | None = None
        self.ranks: tuple[Any, ...] = ()
        self.is_ending = False
        self.said: list[str] = []

    def say_waiting(self, what: str) -> None:
        self.said.append(what)

    async def kill(self) -> None:
        self.is_ending = True


class Cluster:
    """A node book, Ray's placement groups, and who was started where. ``then``: what happens at each look at a group."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *lives: ProcessSpec) -> None:
        from biphase.cluster import ray_placement, ray_start

        self.hosts: list[RayHost] = []
        self.checked: set[str] = set()
        self.refused: set[str] = set()
        self.made: list[dict[str, Any]] = []
        self.there: list[str] | None = []
        self.then: list[Callable[[], None]] = []
        self.looks = 0
        self.removed: list[str] = []
        self.started: list[str] = []
        self.groups = {(life.name, life.incarnation): Group(life) for life in lives}
        monkeypatch.setattr(ray_placement, "placement_group", self.make)
        monkeypatch.setattr(ray_start, "lies_on", self.look_at)
        monkeypatch.setattr(ray_start, "remove_groups", self.removed.extend)
        for name in ("FIRST_LOOK_S", "MAX_LOOK_S", "CHECKED_LOOK_S"):
            monkeypatch.setattr(ray_start, name, 0.0)
        self.placement = ray_placement.RayPlacement("space", cast("Any", self), cast("Any", self.groups), joined=True)
        self.start = ray_start.RayStart(
            cast("Any", self.call), "space", cast("Any", self), self.placement, lambda spec: 0.0, self.create
        )

    def join(self, *names: str, cpus: float = 1.0) -> None:
        room = Room(0, int(cpus * WHOLE))
        self.hosts += [RayHost(node_id=n, address=n, hostname=n, total=room, free=room) for n in names]

    async def call(self, function: Callable[[], Any]) -> Any:
        return function()

    def make(self, bundles: Any, **options: Any) -> str:
        self.made.append(options)
        return f"group {len(self.made)}"

    def look_at(self, made: Any) -> list[str] | None:
        if self.then:
            self.then.pop(0)()
        return self.there

    def create(self, life: ProcessSpec, options: Any) -> list[Any]:
        assert self.there
        self.started += self.there
        return ["actor"]

    async def run(self, life: ProcessSpec) -> "asyncio.Future[Any]":
        coming: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        group = cast("Any", self.groups[life.name, life.incarnation])
        await asyncio.wait_for(self.start.run(life, group, [coming]), 10.0)
        return coming

    # Of the node book.

    def unknown(self, deployment: Deployment) -> set[str]:
        return self.checked

    def shunned(self, deployment: Deployment | None = None) -> set[str]:
        return self.checked | self.refused

    def reason_to_hold(self, deployment: Deployment) -> str:
        return ""

    def reason_to_wait_for_checks(self, deployment: Deployment, within_s: float) -> str:
        return f"checks {', '.join(sorted(self.checked))}" if self.checked and self.made else ""

    async def settle(self) -> None: ...

    async def look(self, *, check: bool) -> None:
        self.looks += 1


LIFE = spec("decode-0", "decode")


def set_to(cluster: Cluster, **values: Any) -> Callable[[], None]:
    return lambda: vars(cluster).update(values)


async def test_room_on_a_host_that_nobody_has_checked_is_not_used_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster(monkeypatch, LIFE)
    cluster.join("new")
    cluster.checked = {"new"}
    started: list[list[str]] = []
    cluster.then = [
        set_to(cluster, there=["new"]),
        lambda: started.append(list(cluster.started)),
        set_to(cluster, checked=set()),
    ]
    assert (await cluster.run(LIFE)).result() == "actor"
    assert (started, cluster.started, cluster.removed) == ([[]], ["new"], [])
    assert set(cluster.groups["decode-0", 1].said) == {"checks new"}


async def test_a_host_that_no_list_names_yet_is_looked_at_first(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster(monkeypatch, LIFE)
    cluster.there = ["new"]
    cluster.then = [lambda: None, lambda: cluster.join("new")]
    await cluster.run(LIFE)
    assert cluster.started == ["new"]
    assert cluster.looks == 2, "before all, and when it was granted"


async def test_a_group_on_a_host_that_is_refused_is_made_anew_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster(monkeypatch, LIFE)
    cluster.join("bad")
    cluster.checked = {"bad"}
    cluster.there = ["bad"]
    cluster.then = [
        lambda: None,
        set_to(cluster, checked=set(), refused={"bad"}),
        set_to(cluster, there=[]),
        lambda: cluster.join("good"),
        set_to(cluster, there=["good"]),
    ]
    await cluster.run(LIFE)
    assert cluster.started == ["good"]
    assert cluster.removed == ["space/decode-0#1"]
    assert cluster.made[1]["bundle_label_selector"] == [{"ray.io/node-id": "!in(bad)"}]


async def test_who_has_passed_and_has_room_is_preferred_to_one_that_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster(monkeypatch, LIFE)
    cluster.join("old", cpus=0.0)
    cluster.there = ["new"]
    cluster.checked = {"new"}
    cluster.then = [
        lambda: cluster.join("new"),
        lambda: cluster.join("other"),
        set_to(cluster, there=["other"]),
    ]
    await cluster.run(LIFE)
    assert cluster.started == ["other"], "the check of the new one may take long"


@pytest.mark.parametrize(("placement", "expected"), [("spread", "b"), ("near", "a"), ("pack", "a")])
async def test_what_had_to_wait_is_placed_by_the_wish_once_several_hosts_are_there(
    placement: Placement, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefill, decode = spec("prefill-0", "prefill", placement), spec("decode-0", "decode", placement)
    cluster = Cluster(monkeypatch, prefill, decode)
    cluster.placement.make(prefill, 0.0)
    cluster.placement.make(decode, 0.0)
    cluster.join("a", cpus=2.0)
    cluster.join("b", cpus=2.0)
    verdicts = [cluster.placement.verdict(life, 0.0, ["a"]) for life in (prefill, decode)]
    if expected == "a":
        assert verdicts == ["start", "start"]
        return
    # the first one that is looked at knows nothing of the other
    assert verdicts == ["start", "anew"]
    cluster.placement.make(decode, 0.0)
    assert cluster.made[-1]["_soft_target_node_id"] == "b"
    assert cluster.placement.verdict(decode, 0.0, ["a"]) == "start", "Ray did not"


async def test_nobody_is_moved_twice_for_the_wish(monkeypatch: pytest.MonkeyPatch) -> None:
    prefill, decode = spec("prefill-0", "prefill"), spec("decode-0", "decode")
    cluster = Cluster(monkeypatch, prefill, decode)
    for life in (prefill, decode):
        cluster.placement.make(life, 0.0)
    cluster.join("a", "b", cpus=2.0)
    assert [cluster.placement.verdict(life, 0.0, ["a"]) for life in (prefill, decode)] == ["start", "anew"]
    roomy, cluster.hosts = cluster.hosts, []
    cluster.placement.make(decode, 0.0)
    cluster.hosts = roomy
    assert cluster.placement.verdict(decode, 0.0, ["a"]) == "start", "others took the room meanwhile"


async def test_two_on_one_host_do_not_both_leave_it(monkeypatch: pytest.MonkeyPatch) -> None:
    prefill, decode = spec("prefill-0", "prefill"), spec("decode-0", "decode")
    cluster = Cluster(monkeypatch, prefill, decode)
    for life in (prefill, decode):
        cluster.placement.make(life, 0.0)
    cluster.join("a", cpus=2.0)
    cluster.checked = {"a"}
    assert [cluster.placement.verdict(life, 0.0, ["a"]) for life in (prefill, decode)] == ["wait", "wait"]
    cluster.join("b", cpus=2.0)
    cluster.checked = set()
    assert [cluster.placement.verdict(life, 0.0, ["a"]) for life in (prefill, decode)] == ["anew", "start"]


async def test_a_life_that_ends_meanwhile_leaves_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster(monkeypatch, LIFE)
    group = cluster.groups["decode-0", 1]
    cluster.then = [lambda: None, lambda: setattr(group, "is_ending", True)]
    assert (await cluster.run(LIFE)).cancelled()
    assert (cluster.started, set(cluster.removed)) == ([], {"space/decode-0#1"})


async def test_a_head_that_is_away_does_not_end_what_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster(monkeypatch, LIFE)
    cluster.join("a")
    cluster.there = ["a"]

    def fail() -> None:
        raise RuntimeError("RpcError: unavailable")

    cluster.then = [fail, set_to(cluster, there=None), set_to(cluster, there=["a"])]
    assert (await cluster.run(LIFE)).result() == "actor"
    assert len(cluster.made) == 2, "and one that comes back with nothing is asked anew"
