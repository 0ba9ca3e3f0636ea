"""Requests for hosts: when one has come, and what becomes of one whose host may not be used. Ray's list is made up."""

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest

from biphase.cluster.backend import ProcessSpec
from biphase.cluster.deployment import Deployment
from biphase.cluster.ray_growth import Growth, NodeType
from biphase.cluster.ray_names import group_name, is_request, request_name
from biphase.cluster.wanted import spec_of

pytestmark = pytest.mark.ray
BASE = ProcessSpec(
    name="controller",
    kind="controller",
    incarnation=1,
    deployment=Deployment(model="m", device="cpu"),
    run_dir="/r",
    controller_address="",
)
SPEC = spec_of(BASE, "decode-wish", 0, kind="decode")
NAME = "space/node-for-decode"


class MadeUp:
    """Placement groups by name, and a cluster that may grow."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from biphase.cluster import ray_requests

        self.groups: dict[str, dict[str, Any]] = {}
        self.refused: set[str] = set()
        self.checked: set[str] = set()
        self.avoided: set[str] = set()
        self.growth = Growth(most_workers=2, types=(NodeType(room=None, least=0, most=2),))
        self.hosts: list[Any] = []
        self.joining: list[Any] = []
        monkeypatch.setattr(ray_requests, "placement_group_table", lambda: dict(self.groups))
        monkeypatch.setattr(ray_requests, "placement_group", self.make)
        monkeypatch.setattr(ray_requests, "remove_groups", self.remove)
        self.requests = ray_requests.NodeRequests(
            self.call, "space", cast("Any", self), cast("Any", self), lambda spec: 0.0, joined=True
        )

    async def call(self, function: Callable[[], Any]) -> Any:
        return function()

    def make(self, bundles: list[dict[str, float]], *, name: str, **options: Any) -> None:
        assert name not in self.groups
        self.groups[name] = {"name": name, "state": "PENDING", "bundles_to_node_id": {0: None}, **options}

    def remove(self, names: set[str]) -> None:
        self.groups = {name: group for name, group in self.groups.items() if name not in names}

    def put(self, node: str) -> None:
        self.groups[NAME] |= {"state": "CREATED", "bundles_to_node_id": {0: node}}

    # Of the node book and the placement.

    follows = True

    async def look(self, *, check: bool) -> None:
        assert check
        self.hosts = [*self.joining]

    def unknown(self) -> set[str]:
        return self.checked

    def shunned(self, spec: ProcessSpec) -> set[str]:
        return self.refused | self.checked | set(spec.avoid_nodes)


async def test_a_request_comes_once_its_host_is_there_and_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    there = MadeUp(monkeypatch)
    assert await there.requests.came(SPEC) is None
    assert await there.requests.ask(SPEC) == ""
    assert await there.requests.ask(SPEC) == "", "twice is once"
    assert await there.requests.came(SPEC) is False
    there.put("new")
    assert await there.requests.came(SPEC) is False, "no list has named it yet"
    there.joining, there.checked = [SimpleNamespace(node_id="new")], {"new"}
    assert await there.requests.came(SPEC) is False
    assert there.groups[NAME]["state"] == "CREATED", "it is not known yet what is installed there"
    there.checked = set()
    assert await there.requests.came(SPEC) is True
    await there.requests.withdraw("prefill")
    assert await there.requests.came(SPEC) is True
    await there.requests.withdraw("decode")
    assert there.groups == {}


@pytest.mark.parametrize("why", ["refused", "cordoned"])
async def test_a_request_on_a_host_that_may_not_be_used_is_made_anew(monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    there = MadeUp(monkeypatch)
    await there.requests.ask(SPEC)
    assert "bundle_label_selector" not in there.groups[NAME]
    there.put("bad")
    there.refused = {"bad"} if why == "refused" else set()
    spec = replace(SPEC, avoid_nodes=() if why == "refused" else ("bad",))
    assert await there.requests.came(spec) is False
    assert there.groups[NAME]["state"] == "PENDING"
    assert there.groups[NAME]["bundle_label_selector"] == [{"ray.io/node-id": "!in(bad)"}]


async def test_room_counts_without_hosts_that_may_not_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    from biphase.cluster.ray_room import Room

    there = MadeUp(monkeypatch)
    there.hosts = [SimpleNamespace(node_id=name, is_head=False, free=Room(0, 20_000)) for name in ("a", "b")]
    assert await there.requests.idle(SPEC) == 4
    assert await there.requests.idle(replace(SPEC, avoid_nodes=("a",))) == 2
    assert not there.requests.can_grow
    there.growth = replace(there.growth, most_workers=3)
    assert there.requests.can_grow


def test_no_process_is_called_like_a_request() -> None:
    assert is_request(request_name("space", "prefill"))
    assert not is_request(group_name("space", "prefill-0", 3))
