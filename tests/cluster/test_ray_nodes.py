"""Whom a controller's book of Ray hosts takes for what: the hosts and what they have are the test's, no cluster."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from biphase.cluster.deployment import Deployment
from biphase.protos.errors import SetupError

pytestmark = pytest.mark.ray
OLD, NEW = Deployment(model="old"), Deployment(model="new")
SAME = {"biphase": "1", "ray": "2", "python": "3.11.1"}


class Cluster:
    """Hosts by address, each with the models that it has; the first is the head."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **hosts: set[str]) -> None:
        from biphase.cluster import ray_nodes
        from biphase.cluster.ray_hosts import RayHost

        self.models = hosts
        self.asked: list[tuple[str, str]] = []

        def installed(node: str, model: str) -> dict[str, str]:
            self.asked.append((node, model))
            return {**SAME, "weights": "" if model in self.models[node] else f"{model}: no such file"}

        def ask(node: str, weights: Any) -> "asyncio.Future[Any]":
            future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
            future.set_result(installed(node, weights.model))
            return future

        monkeypatch.setattr(ray_nodes, "_ask", ask)
        monkeypatch.setattr(ray_nodes.asyncio, "wrap_future", lambda future: future)
        monkeypatch.setattr(ray_nodes, "installed", lambda model, dummy: installed("head", model))
        monkeypatch.setattr(ray_nodes, "growth_now", lambda: None)
        monkeypatch.setattr(ray_nodes.internal_kv, "_internal_kv_get", lambda key: b"1")
        context = SimpleNamespace(get_node_id=lambda: "head")
        monkeypatch.setattr(ray_nodes.ray, "get_runtime_context", lambda: context)
        monkeypatch.setattr(
            ray_nodes,
            "hosts_now",
            lambda: [
                RayHost(node_id=name, address=name, hostname=name, is_head=name == "head") for name in self.models
            ],
        )

        async def call(function: Callable[[], Any]) -> Any:
            return function()

        self.book = ray_nodes.NodeBook(call, OLD, "space")

    async def open(self) -> None:
        await self.book.open(follow=True)
        await self.settled()

    async def settled(self) -> None:
        """Until no host is waited for."""
        async with asyncio.timeout(10.0), self.book.changed:
            while self.book._checks:
                await self.book.changed.wait()

    async def join(self, name: str, *models: str) -> None:
        self.models[name] = set(models)
        await self.book.look(check=True)
        await self.settled()


async def test_hosts_are_asked_for_the_new_weights_before_an_update(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster(monkeypatch, head={"old", "new"}, b={"old"}, c={"old", "new"})
    await cluster.open()
    assert cluster.book.shunned(OLD) == set()
    assert cluster.book.shunned(NEW) == {"head", "b", "c"}, "nobody has been asked yet"
    line = "b has no weights: new: no such file; the head has them"
    assert await cluster.book.check_now(NEW) == [line]
    assert cluster.book.shunned(NEW) == {"b"}
    assert cluster.book.shunned(OLD) == set(), "those that run go on as they are"
    assert [view.refused for view in cluster.book.views({}, {})] == ["", "", ""], "nothing is taken over yet"
    cluster.models["b"].add("new")
    assert await cluster.book.check_now(NEW) == [], "looked at anew every time"
    for models in cluster.models.values():
        models.discard("new")
    with pytest.raises(SetupError, match="head has no weights: new: no such file; b has no weights"):
        await cluster.book.check_now(NEW)
    await cluster.book.close()


async def test_hosts_that_join_later_are_asked_for_what_is_served_then(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster(monkeypatch, head={"old", "new"})
    await cluster.open()
    await cluster.book.check_now(NEW)
    cluster.book.check_for([NEW, OLD])
    await cluster.join("b", "old")
    assert (cluster.book.shunned(OLD), cluster.book.shunned(NEW)) == (set(), {"b"}), "each for its own generation"
    assert list(cluster.book.refused()) == ["b"], "of the one that is wanted"
    cluster.book.check_for([NEW])
    await cluster.join("c", "new")
    assert cluster.book.shunned() == {"b"}
    assert ("c", "old") not in cluster.asked
    await cluster.book.close()


async def test_the_next_life_of_a_controller_waits_for_its_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster(monkeypatch, head={"new"}, b={"new"})
    await cluster.open()
    assert cluster.book.shunned() == {"head", "b"}, "the deployment that it was started with is long gone"
    cluster.book.check_for([NEW])
    assert cluster.book.reason_to_wait_for_checks(NEW, 5.0) == "waits until it is known what is installed on head, b"
    await cluster.settled()
    assert cluster.book.reason_to_wait_for_checks(NEW, 5.0) == ""
    assert cluster.book.shunned() == set()
    await cluster.book.close()


async def test_a_check_that_fails_on_the_head_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    from biphase.cluster import ray_nodes

    cluster = Cluster(monkeypatch, head={"old"}, b={"old"})
    works = ray_nodes.installed

    def fails(model: str, dummy: bool) -> dict[str, str]:
        raise OSError("[Errno 116] Stale file handle")

    monkeypatch.setattr(ray_nodes, "installed", fails)
    await cluster.open()
    assert cluster.book.unknown() == {"head", "b"}, "one that fails says little"
    with pytest.raises(SetupError, match="does not say what is installed"):
        await cluster.book.check_now(OLD)
    monkeypatch.setattr(ray_nodes, "installed", works)
    assert await cluster.book.check_now(OLD) == []
    assert cluster.book.shunned() == set()
    await cluster.book.close()


@pytest.mark.parametrize("dummy", [True, False])
def test_weights_that_cannot_be_read_are_lacking_in_one_line(dummy: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from biphase.cluster import ray_node_check

    def fails(path: Path, **options: object) -> bool:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "exists", fails)
    monkeypatch.setattr(Path, "is_dir", fails)
    monkeypatch.setattr(Path, "is_file", fails)
    lack = ray_node_check.weights_lack(ray_node_check.Weights("/far/model.json" if dummy else "/far/model", dummy))
    assert "Permission denied" in lack and "\n" not in lack
