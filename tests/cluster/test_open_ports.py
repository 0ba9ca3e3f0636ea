"""The warning that names every port that others of the network reach."""

from types import SimpleNamespace
from typing import Any, cast

from support.wanted import made, say

from biphase.cluster.controller_messages import warnings_of
from biphase.cluster.deployment import Deployment
from biphase.cluster.router_places import RouterPlace
from biphase.protos import worker_pb2


def controller(node: str, *, kv_transport: str = "auto", ranks: bool = False) -> Any:
    core = made(decode=1)
    for name in core.slots:
        say(core, name, "ready", 1.0, node=node)
        said = core.slots[name].announcement
        assert said is not None
        if ranks and name == "decode-0":
            object.__setattr__(said, "rank_address", f"{node}:9")
    places = (RouterPlace(name="router-0", host=node, port=1),)
    lives = {
        "prefill-0": SimpleNamespace(welcome=worker_pb2.Welcome(kv_address=f"{node}:7")),
        "decode-0": SimpleNamespace(welcome=worker_pb2.Welcome()),
        "router-0": SimpleNamespace(welcome=None),
    }
    return SimpleNamespace(
        core=core,
        lives=lives,
        warnings=[],
        deployment=Deployment(model="m", port=1, routers=places, kv_transport=cast("Any", kv_transport)),
        announcer=SimpleNamespace(current=SimpleNamespace(address=f"{node}:2")),
        reports=SimpleNamespace(broken_pairs=list),
    )


def test_ports_of_kv_and_of_ranks_are_named_with_the_others() -> None:
    (warning,) = warnings_of(controller("10.0.0.2", ranks=True))
    assert warning == (
        "not on loopback and without protection: prefill-0 at 10.0.0.2:1, decode-0 at 10.0.0.2:1,"
        " router-0 at 10.0.0.2:1, controller at 10.0.0.2:2, KV of prefill-0 at 10.0.0.2:7 and free ports,"
        " ranks of decode-0 at 10.0.0.2:9"
    )


def test_one_rank_and_the_grpc_wire_have_one_port() -> None:
    (warning,) = warnings_of(controller("10.0.0.2", kv_transport="grpc"))
    assert warning.endswith("KV of prefill-0 at 10.0.0.2:7")


def test_on_loopback_nothing_is_said() -> None:
    assert warnings_of(controller("127.0.0.1", ranks=True)) == []
