"""Where instances go, how far a cluster may grow, and what has joined and gone: values only, no Ray."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from biphase.cluster.backend import Kind
from biphase.cluster.deployment import Placement
from biphase.cluster.gpus import WHOLE
from biphase.cluster.ray_growth import (
    LEAST_VARIABLE,
    MAX_WORKERS,
    WORKERS_VARIABLE,
    Growth,
    NodeType,
    config_named_by,
    find_growth,
    growth_of,
    growth_said,
)
from biphase.cluster.ray_hosts import HostsSeen, RayHost, hosts_of
from biphase.cluster.ray_place import choose, choose_each, given_back, is_better, is_outdated, missed, on_granted
from biphase.cluster.ray_room import Room
from biphase.protos.errors import SetupError

ONE_CPU = Room(0, WHOLE)


def host(number: int, *, cpus: float = 4.0, gpus: float = 0.0, is_head: bool = False) -> RayHost:
    room = Room(int(gpus * WHOLE), int(cpus * WHOLE))
    address = f"10.0.0.{number}"
    return RayHost(node_id=f"n{number}", address=address, hostname="h", is_head=is_head, total=room, free=room)


@pytest.mark.parametrize(
    ("placement", "kind", "chosen"),
    [
        ("pack", "decode", "n2"),
        ("spread", "decode", "n3"),
        ("spread", "prefill", "n3"),
        ("near", "decode", "n2"),
        ("near", "prefill", "n2"),
    ],
)
def test_the_placement_chooses_the_host(placement: Placement, kind: Kind, chosen: str) -> None:
    tenants: dict[str, list[Kind]] = {"n2": ["prefill"]}
    found = choose(placement, kind, ONE_CPU, [host(1, is_head=True), host(2), host(3)], tenants)
    assert found is not None and found.node_id == chosen


def test_prefill_and_decode_share_a_host_only_where_no_other_has_room() -> None:
    tenants: dict[str, list[Kind]] = {"n2": ["prefill"], "n3": ["decode", "decode"]}
    hosts = [host(2), host(3)]
    apart = choose("spread", "decode", ONE_CPU, hosts, tenants)
    assert apart is not None and apart.node_id == "n3"
    together = choose("spread", "decode", ONE_CPU, [host(2), host(3, cpus=0.5)], tenants)
    assert together is not None and together.node_id == "n2"


def test_a_host_without_room_or_that_is_shunned_gets_nothing() -> None:
    assert choose("pack", "decode", ONE_CPU, [host(1, cpus=0.5)], {}) is None
    assert choose("pack", "decode", Room(WHOLE, 0), [host(1, gpus=0.5)], {}) is None
    assert choose("pack", "decode", ONE_CPU, [host(1)], {}, shunned={"n1"}) is None


@pytest.mark.parametrize(
    ("placement", "kind", "chosen"),
    [
        ("spread", "decode", ["n3", "n4"]),
        ("near", "decode", ["n2", "n3"]),
        ("pack", "decode", ["n1", "n1"]),
        ("spread", "prefill", ["n3", "n4"]),
    ],
)
def test_every_stage_goes_where_the_placement_wants_it(placement: Placement, kind: Kind, chosen: list[str]) -> None:
    tenants: dict[str, list[Kind]] = {"n2": ["prefill"], "n1": ["prefill", "decode"]}
    hosts = [host(1, cpus=2.5, is_head=True), host(2, cpus=1.5), host(3, cpus=1.5), host(4, cpus=1.5)]
    found = choose_each(placement, kind, [ONE_CPU] * 2, hosts, tenants, shunned=() if placement == "pack" else ("n1",))
    assert [one.node_id for one in found] == chosen


def test_stages_stay_together_where_one_host_takes_all_of_them() -> None:
    hosts = [host(2, cpus=1.5), host(3, cpus=2.0), host(4, cpus=2.0)]
    for placement in ("spread", "near", "pack"):
        found = choose_each(placement, "decode", [ONE_CPU] * 2, hosts, {})  # type: ignore[arg-type]
        assert [one.node_id for one in found] == ["n3", "n3"]


def test_stages_that_do_not_all_find_room_are_wished_nowhere() -> None:
    assert choose_each("spread", "decode", [ONE_CPU] * 3, [host(1, cpus=2.0)], {}) == []
    assert choose_each("spread", "decode", [Room(0, 0)] * 2, [host(1)], {}) == [host(1)] * 2, "they ask for nothing"
    found = choose_each("spread", "decode", [Room(WHOLE, WHOLE)] * 2, [host(1, gpus=1.0), host(2, gpus=1.0)], {})
    assert [one.node_id for one in found] == ["n1", "n2"]


def test_what_the_placement_does_not_have_its_way_with_is_told() -> None:
    mixed: dict[str, list[Kind]] = {"n1": ["decode", "prefill"], "n2": ["decode"]}
    assert missed("pack", mixed) == {}
    assert list(missed("spread", mixed)) == ["n1"]
    assert list(missed("near", mixed)) == ["n2"] and "only decode is there" in missed("near", mixed)["n2"]
    assert missed("near", {"n1": ["decode"], "n2": ["decode"]}) == {}, "there is no other role to be near"


def test_a_group_that_waits_is_made_anew_when_it_may_go_to_other_hosts() -> None:
    hosts = {"head", "a", "b"}
    assert is_outdated({"a", "b"}, {"b"}, {"b"}, hosts), "a has passed its check"
    assert is_outdated({"a"}, set(), set(), hosts), "a gets instances again"
    assert is_outdated(set(), {"b"}, set(), hosts), "b is refused, and Ray does not know"
    assert not is_outdated({"a", "b"}, {"a", "b"}, {"a", "b"}, hosts), "both are still being checked"
    assert not is_outdated({"gone"}, set(), set(), hosts), "who is gone is nowhere to go to"
    assert not is_outdated(set(), {"b"}, {"b"}, hosts), "b has just joined: its check tells soon"


def test_what_has_room_starts_only_on_hosts_that_have_passed() -> None:
    hosts = {"a", "b", "c"}
    assert on_granted(["a", "a"], {"b", "c"}, {"c"}, hosts) == "start"
    assert on_granted(["a", "c"], {"b", "c"}, {"c"}, hosts) == "wait", "c is being checked"
    assert on_granted(["a", "new"], {"b"}, set(), hosts) == "wait", "nobody has seen it yet"
    assert on_granted(["b"], {"b", "c"}, {"c"}, hosts) == "anew"
    assert on_granted(["b", "c"], {"b", "c"}, {"c"}, hosts) == "anew", "whatever c's check says"


@pytest.mark.parametrize(
    ("placement", "better"), [("spread", (False, True)), ("near", (True, False)), ("pack", (False,) * 2)]
)
def test_only_what_the_placement_wants_is_better(placement: Placement, better: tuple[bool, bool]) -> None:
    tenants: dict[str, list[Kind]] = {"n1": ["prefill"], "n2": ["decode"]}
    assert is_better(placement, "decode", ["n1"], ["n2"], tenants) == better[0]
    assert is_better(placement, "decode", ["n2", "n3"], ["n1", "n1"], tenants) == better[1]
    assert not is_better(placement, "decode", ["n3"], ["n2"], tenants), "as good as it is"


def test_a_host_is_seen_as_without_the_instance_and_never_as_more_than_it_has() -> None:
    full = replace(host(1, cpus=2.0), free=Room(0, 0))
    stages = [ONE_CPU] * 3
    (one, other) = given_back([full, host(2, cpus=2.0)], ["n1", "n2", "gone"], stages)
    assert (one.free, other.free) == (ONE_CPU, Room(0, 2 * WHOLE))
    assert given_back([full], ["n1", "n1", "n1"], stages)[0].free == Room(0, 2 * WHOLE)


def test_joined_and_gone() -> None:
    seen = HostsSeen()
    assert seen.look([host(1), host(2)]) == ([host(1), host(2)], [])
    assert seen.look([host(2), host(3)]) == ([host(3)], [host(1)])


def test_the_dead_are_no_hosts() -> None:
    node = {"NodeManagerAddress": "a", "NodeManagerHostname": "h", "Resources": {"CPU": 2.0, "GPU": 1.0}}
    found = hosts_of(
        [{**node, "NodeID": "x", "Alive": True}, {**node, "NodeID": "y", "Alive": False}], {"x": {"CPU": 1.0}}
    )
    assert [(one.node_id, one.free, one.total) for one in found] == [("x", Room(0, WHOLE), Room(WHOLE, 2 * WHOLE))]


LOCAL: dict[str, Any] = {
    "provider": {"type": "local", "head_ip": "a", "worker_ips": ["b", "c"]},
    "head_node_type": "local.cluster.node",
    "max_workers": 5,
    "min_workers": 2,
    "available_node_types": {"local.cluster.node": {"min_workers": 2, "max_workers": 2, "resources": {}}},
}
CLOUD: dict[str, Any] = {
    "provider": {"type": "aws"},
    "head_node_type": "head",
    "max_workers": 3,
    "available_node_types": {
        "head": {"resources": {"CPU": 8}},
        "small": {"resources": {"CPU": 4, "GPU": 1}, "min_workers": 1, "max_workers": 2},
        "large": {"resources": {"CPU": 4, "GPU": 4}, "min_workers": 0, "max_workers": 2},
    },
}


def test_hosts_of_provider_local_do_not_say_what_they_have() -> None:
    growth = growth_of(LOCAL)
    assert (growth.most_workers, growth.least_workers, growth.num_gpus(3)) == (2, 2, 3)
    assert growth.takes([Room(64 * WHOLE, 0)] * 2, [])


def test_a_plan_fits_the_cluster_at_its_largest_or_not() -> None:
    growth = growth_of(CLOUD)
    assert (growth.most_workers, growth.least_workers, growth.num_gpus(0)) == (3, 1, 9)
    four = Room(4 * WHOLE, 4 * WHOLE)
    assert growth.takes([four, four, Room(WHOLE, WHOLE)], [])
    assert not growth.takes([four, four, four], [])
    assert growth.takes([Room(0, 8 * WHOLE)], [Room(0, 8 * WHOLE)])
    assert Growth(most_workers=0, types=(NodeType(room=None, least=0, most=4),)).rooms() == []


def test_the_monitors_command_line_names_the_file() -> None:
    line = (
        "python\0/x/ray/autoscaler/_private/monitor.py\0--autoscaling-config=/r/c.yaml\0--gcs-address=10.0.0.1:6379\0"
    )
    assert config_named_by(["other\0--autoscaling-config=/no\0", line], "10.0.0.1:6379") == Path("/r/c.yaml")
    assert config_named_by([line], "10.0.0.1:6380") is None


def test_where_the_autoscaler_cannot_be_seen_a_variable_says_how_many_workers_there_may_be() -> None:
    growth = growth_said("4")
    assert growth is not None
    assert (growth.most_workers, growth.least_workers, growth.num_gpus(3), len(growth.rooms())) == (4, 0, 3, 4)
    assert growth_said("") is None
    for least in ("0", "2", "4"):
        growth = growth_said("4", least)
        assert growth is not None and (growth.most_workers, growth.least_workers) == (4, int(least))


@pytest.mark.parametrize(
    ("most", "least", "line"),
    [
        ("4", "5", "BIPHASE_MIN_WORKERS is '5': a number of worker hosts, 0 to BIPHASE_MAX_WORKERS, 4"),
        ("4", "two", "BIPHASE_MIN_WORKERS is 'two': a number of worker hosts, 0 to BIPHASE_MAX_WORKERS, 4"),
        (
            "",
            "2",
            f"BIPHASE_MAX_WORKERS is '' beside BIPHASE_MIN_WORKERS: a number of worker hosts, 1 to {MAX_WORKERS}",
        ),
    ],
)
def test_a_bad_least_number_of_workers_is_refused_in_one_line(
    most: str, least: str, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(WORKERS_VARIABLE, most)
    monkeypatch.setenv(LEAST_VARIABLE, least)
    with pytest.raises(SetupError) as refused:
        find_growth("10.0.0.1:6379")
    assert str(refused.value) == line


@pytest.mark.parametrize("text", ["0", "-1", "four", "1.5", " 4", "10001", "²"])
def test_a_bad_number_of_workers_is_refused_in_one_line(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(WORKERS_VARIABLE, text)
    with pytest.raises(SetupError) as refused:
        find_growth("10.0.0.1:6379")
    assert str(refused.value) == f"BIPHASE_MAX_WORKERS is {text!r}: a number of worker hosts, 1 to {MAX_WORKERS}"
