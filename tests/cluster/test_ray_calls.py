"""Calls of Ray that do not return: whoever bounds them goes on, and they are made when their turn comes."""

import asyncio
import threading
from typing import Any

import pytest

from biphase.cluster.ray_calls import RayCalls


class Head:
    """Away until ``back`` is set."""

    def __init__(self) -> None:
        self.calls, self.back = RayCalls(), threading.Event()
        self.done: list[str] = []

    async def lose(self) -> "asyncio.Task[Any]":
        hangs = asyncio.create_task(self.calls(lambda: self.back.wait(60.0)))
        await asyncio.sleep(0)
        return hangs

    def write(self, text: str) -> str:
        self.done.append(text)
        return text


async def test_a_bounded_call_gives_up_and_is_made_later() -> None:
    head = Head()
    assert await head.calls.within(lambda: head.write("first")) == "first"
    hangs = await head.lose()
    with pytest.raises(OSError, match=r"Ray does not answer within 0\.01 s"):
        await head.calls.within(lambda: head.write("second"), 0.01)
    with pytest.raises(OSError, match="Ray does not answer within 60 s"):  # which it is not given a second time
        await asyncio.wait_for(head.calls.within(lambda: head.write("third"), 60.0), 10.0)
    assert head.done == ["first"]
    head.back.set()
    await hangs
    await head.calls(lambda: None)  # after those that were late
    await asyncio.sleep(0)
    assert await head.calls.within(lambda: head.write("fourth"), 30.0) == "fourth"
    assert head.done == ["first", "second", "third", "fourth"], "in their order"
    head.calls.close()


async def test_what_fails_late_is_told(caplog: pytest.LogCaptureFixture) -> None:
    head = Head()
    hangs = await head.lose()
    with pytest.raises(OSError, match="does not answer"):
        await head.calls.within(lambda: int("late"), 0.01)
    head.back.set()
    await hangs
    await head.calls(lambda: None)
    await asyncio.sleep(0)
    assert "a call that was late has failed" in caplog.text
    head.calls.close()


@pytest.mark.ray
async def test_a_kill_and_a_save_hold_nobody(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    from biphase.cluster import ray_backend, ray_calls, ray_rank
    from biphase.cluster.deployment import Deployment

    monkeypatch.setattr(ray_backend, "is_joined", lambda: False)
    monkeypatch.setattr(ray_rank.RayRank, "_follow_actor", lambda self: asyncio.sleep(0))
    killed: list[Any] = []
    monkeypatch.setattr(ray_rank.ray, "kill", lambda actor, no_restart: killed.append(actor))
    kept: dict[bytes, bytes] = {}
    monkeypatch.setattr(
        ray_backend.internal_kv, "_internal_kv_put", lambda key, value, overwrite: kept.update({key: value})
    )
    monkeypatch.setattr(ray_calls.RayCalls.within, "__defaults__", (0.01,))
    backend = ray_backend.RayBackend(Deployment(model="m"), owner=False)
    back = threading.Event()
    hangs = asyncio.create_task(backend._call(lambda: back.wait(60.0)))
    await asyncio.sleep(0)
    rank = ray_rank.RayRank("actor", asyncio.Event(), backend._call.within)
    await asyncio.wait_for(rank.kill(), 30.0)
    with pytest.raises(OSError, match="Ray does not answer"):
        await asyncio.wait_for(backend.save_state("{}"), 30.0)
    assert (killed, kept) == ([], {})
    assert "an actor is killed later" in caplog.text
    back.set()
    await hangs
    await backend._call(lambda: None)
    assert (killed, list(kept.values())) == (["actor"], [b"{}"])
    backend._call.close()
