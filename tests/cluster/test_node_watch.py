"""What the controller says of hosts, and whom it refuses."""

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from biphase.cluster.backend import NodeView
from biphase.cluster.node_watch import NodeWatch
from biphase.cluster.ray_node_check import has_answered, installed, reason_against, reason_of_failure
from biphase.cluster.reconcile import Reconciler
from biphase.cluster.start_failures import MAX_FAILED_STARTS


def made() -> tuple[NodeWatch, list[tuple[str, str]], Any]:
    told: list[tuple[str, str]] = []
    controller = SimpleNamespace(
        core=Reconciler([], 100.0),
        events=SimpleNamespace(add=lambda kind, subject, text: told.append((subject, text))),
        warnings=["another"],
        changed=lambda: None,
    )
    return NodeWatch(cast("Any", controller)), told, controller


def test_who_joins_is_gone_or_refused_is_told_once() -> None:
    watch, told, controller = made()
    watch.look([NodeView(name="a")])
    assert told == [], "those of the start are no news"
    bad = NodeView(name="b", refused="b has biphase 2, the head has 1", what="b (2 CPUs)")
    watch.look([NodeView(name="a"), bad])
    watch.look([NodeView(name="a"), bad])
    assert told == [("b", "b (2 CPUs) has joined"), ("b", "refused: b has biphase 2, the head has 1")]
    assert controller.warnings == ["another", "b has biphase 2, the head has 1"]
    assert controller.core.node_failures.known == {"a", "b"}
    watch.look([bad])
    assert told[-1] == ("a", "a is gone")
    assert controller.core.node_failures.known == {"b"}
    watch.look([])
    assert controller.warnings == ["another"]


def test_a_refusal_that_is_taken_back_is_told() -> None:
    watch, told, controller = made()
    watch.look([NodeView(name="b", refused="b has no weights")])
    assert controller.warnings == ["another", "b has no weights"]
    watch.look([NodeView(name="b", takes=("decode",))])
    assert told[-1] == ("b", "b passes the check now, and is refused no more")
    assert controller.warnings == ["another"]


def test_what_the_placement_does_not_have_its_way_with_is_told_once() -> None:
    watch, told, _ = made()
    for _ in range(2):
        watch.look([NodeView(name="a"), NodeView(name="b", remark="prefill and decode are both there")])
    assert told == [("b", "prefill and decode are both there")]


def test_a_head_that_takes_nothing_and_hosts_that_are_gone_or_refused_are_no_others() -> None:
    watch, _, controller = made()
    failures = controller.core.node_failures
    head, last = NodeView(name="head"), NodeView(name="last", takes=("prefill", "decode"))
    gone, refused = NodeView(name="gone", takes=("prefill", "decode")), NodeView(name="refused", refused="no weights")
    small = NodeView(name="small", takes=("prefill",))
    watch.look([head, last, gone, refused, small])
    watch.look([head, last, refused, small])
    for _ in range(2 * MAX_FAILED_STARTS):
        told = failures.failed("last", "decode", name="decode-0", at_s=0.0)
        assert told is None, "nothing else takes a decode instance"
    told = failures.failed("last", "prefill", name="prefill-0", at_s=0.0)
    assert "last is cordoned" in str(told), "small takes prefill instances"


def test_a_host_that_has_joined_anew_is_avoided_no_more() -> None:
    watch, _, controller = made()
    watch.look([NodeView(name="a"), NodeView(name="b")])
    controller.core.unreachable.avoid("b", 0.0, "b:1")
    watch.look([NodeView(name="a")])
    assert "b" in controller.core.unreachable
    watch.look([NodeView(name="a"), NodeView(name="b")])
    assert not controller.core.unreachable and not controller.core.unreachable.silent


async def test_it_goes_on_when_the_list_cannot_be_read() -> None:
    watch, _, controller = made()
    asked = asyncio.Event()

    async def nodes() -> list[NodeView]:
        asked.set()
        raise OSError("the head is away")

    controller.backend = SimpleNamespace(nodes=nodes)
    task = asyncio.create_task(watch.run())
    await asyncio.wait_for(asked.wait(), 10.0)
    assert not task.done()
    task.cancel()


def test_a_host_is_refused_in_one_line_that_names_both() -> None:
    here = {"biphase": "0.1.0", "ray": "2.60.0", "python": "3.11.4", "weights": ""}
    assert reason_against("b", here | {"python": "3.11.9"}, here) == ""
    line = "b has biphase 0.2.0, the head has 0.1.0: install the same on every node"
    assert reason_against("b", here | {"biphase": "0.2.0"}, here) == line
    assert "Ray 2.59.0" in reason_against("b", here | {"ray": "2.59.0"}, here)
    assert "Python 3.12, the head has 3.11" in reason_against("b", here | {"python": "3.12.1"}, here)
    assert reason_against("b", here | {"weights": "/m: no such file"}, here).startswith("b has no weights: /m: no such")
    gone = reason_of_failure("b", ModuleNotFoundError("No module named 'biphase'"), here)
    assert gone == "b has no biphase, the head has 0.1.0: install the same on every node"


def test_a_host_without_biphase_has_answered() -> None:
    assert has_answered(ModuleNotFoundError("No module named 'biphase.cluster'"))
    assert not has_answered(TimeoutError())


@pytest.mark.ray
def test_a_folder_without_weights_will_do_for_dummy_ones_only(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert "no weights there" in installed(str(tmp_path), False)["weights"]
    assert installed(str(tmp_path), True)["weights"] == ""


@pytest.mark.ray
@pytest.mark.model
def test_what_this_host_has() -> None:
    assert installed("smollm2", False)["weights"] == ""
    assert "no such file" in installed("/nowhere/model.gguf", False)["weights"]
