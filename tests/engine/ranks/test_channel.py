"""The channel between real sockets: messages in order, who may join, and how soon a loss is known."""

import asyncio
import contextlib
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator

import pytest

from biphase.engine.ranks.channel import FindLeader, FollowerChannel, LeaderChannel
from biphase.engine.ranks.connection import SILENCE_S
from biphase.engine.ranks.greeting import Membership
from biphase.protos.errors import SetupError
from biphase.protos.parallel_plan import ParallelPlan

KEY = "0123456789abcdef" * 2
PLAN = ParallelPlan(tp=2, pp=1)


def member(rank: int, *, plan: ParallelPlan = PLAN, key: str = KEY, instance: str = "decode-0") -> Membership:
    return Membership(instance=instance, plan=plan, rank=rank, key=key)


@contextlib.asynccontextmanager
async def pair() -> AsyncIterator[tuple[LeaderChannel, FollowerChannel]]:
    leader = LeaderChannel(member(0), "127.0.0.1")
    gathering = asyncio.create_task(leader.gather(10))
    follower = await FollowerChannel.join(member(1), at(f"127.0.0.1:{leader.port}"), 10)
    await gathering
    try:
        yield leader, follower
    finally:
        follower.close()
        leader.close()
        names = {thread.name for thread in threading.enumerate()}
        assert not {name for name in names if name.startswith(("from rank", "rank beats"))}


def at(address: str) -> FindLeader:
    async def find() -> str:
        return address

    return find


async def lost(channel: LeaderChannel | FollowerChannel, within_s: float = 10.0) -> str:
    return await asyncio.wait_for(asyncio.wrap_future(channel.lost), within_s)


async def test_messages_of_a_kind_come_in_order_even_before_anybody_listens() -> None:
    async with pair() as (leader, follower):
        for number in range(500):
            leader.send(1, {"kind": "count", "number": number})
        seen: list[int] = []
        done = asyncio.Event()

        def count(message: dict[str, int]) -> None:
            seen.append(message["number"])
            if len(seen) == 1000:
                done.set()

        follower.subscribe("count", count)
        for number in range(500, 1000):
            leader.broadcast({"kind": "count", "number": number})
        await asyncio.wait_for(done.wait(), 10)
        assert seen == list(range(1000))


@pytest.mark.parametrize("keep", [False, True])
async def test_a_kind_can_be_listened_to_anew_and_what_came_meanwhile_is_dropped_or_kept(keep: bool) -> None:
    heard: list[tuple[str, int]] = []
    async with pair() as (leader, follower):
        leader.subscribe("kv", lambda rank, message: heard.append(("first", message["n"])))
        passed = [asyncio.Event() for _ in range(3)]
        leader.subscribe("mark", lambda rank, message: passed[message["n"]].set())

        async def send(number: int) -> None:
            follower.send({"kind": "kv", "n": number})
            follower.send({"kind": "mark", "n": number})
            await asyncio.wait_for(passed[number].wait(), 5)

        await send(0)
        leader.unsubscribe("kv", keep=keep)
        await send(1)
        leader.subscribe("kv", lambda rank, message: heard.append(("second", message["n"])))
        await send(2)
        with pytest.raises(ValueError, match="'kv' have a handler already"):
            leader.subscribe("kv", lambda rank, message: None)
    assert heard == [("first", 0), *([("second", 1)] if keep else []), ("second", 2)]


async def test_answers_say_which_rank_they_are_from_and_direct_ones_skip_the_loop() -> None:
    async with pair() as (leader, follower):
        heard: asyncio.Future[tuple[int, dict[str, object]]] = asyncio.get_running_loop().create_future()
        threads: list[str] = []
        leader.subscribe("answer", lambda rank, message: heard.set_result((rank, message)))
        follower.subscribe("ask", lambda message: threads.append(threading.current_thread().name), direct=True)
        follower.subscribe("then", lambda message: follower.send({"kind": "answer", "bytes": b"\0" * 300_000}))
        leader.send(1, {"kind": "ask"})
        leader.send(1, {"kind": "then"})
        rank, message = await asyncio.wait_for(heard, 10)
        assert (rank, message["bytes"]) == (1, b"\0" * 300_000)
        assert threads == ["from rank 0"]


async def test_a_closed_end_is_a_loss_at_once() -> None:
    async with pair() as (leader, follower):
        follower.close()
        assert await lost(leader, 1.0) == "rank 1 has closed its connection"
    async with pair() as (leader, follower):
        leader.close()
        assert await lost(follower, 1.0) == "rank 0 has closed its connection"


async def test_a_stop_is_no_loss() -> None:
    async with pair() as (leader, follower):
        stopping = asyncio.Event()
        follower.subscribe("stop", lambda message: stopping.set())
        telling = asyncio.create_task(leader.stop())
        await asyncio.wait_for(stopping.wait(), 10)
        follower.close()
        await telling
        assert not leader.lost.done() and not follower.lost.done()


async def test_an_excused_rank_may_go() -> None:
    async with pair() as (leader, follower):
        leader.subscribe("failed", lambda rank, message: leader.excuse(rank), direct=True)
        follower.send({"kind": "failed"})
        follower.close()
        await asyncio.to_thread(leader._connections[1].ended.wait, 10)
        assert not leader.lost.done()


async def test_a_handler_that_raises_loses_the_instance() -> None:
    def no(message: dict[str, object]) -> None:
        raise KeyError("tokens")

    for direct in (False, True):
        async with pair() as (leader, follower):
            follower.subscribe("step", no, direct=direct)
            leader.send(1, {"kind": "step"})
            assert "KeyError: 'tokens'" in await lost(follower)


async def test_bytes_that_are_no_message_lose_the_rank() -> None:
    async with pair() as (leader, follower):
        follower._connection._socket.sendall(b"\xff\xff\xff\xff")
        assert "message of 4294967295 bytes" in await lost(leader)
    async with pair() as (leader, follower):
        follower._connection._socket.sendall(b"\0\0\0\1\xc1")
        assert "could not be followed" in await lost(leader)


@pytest.mark.parametrize(
    ("us", "told"),
    [
        (member(1, key="f" * 32), "the rank keys differ"),
        (member(1, plan=ParallelPlan(tp=1, pp=2)), "its tp is '1', rank 0 has '2'"),
        (member(1, instance="decode-1"), "its instance is 'decode-1', rank 0 has 'decode-0'"),
    ],
)
async def test_who_does_not_belong_is_told_why(us: Membership, told: str) -> None:
    leader = LeaderChannel(member(0), "127.0.0.1")
    gathering = asyncio.create_task(leader.gather(10))
    with pytest.raises(SetupError, match=f"rank 1 of {us.instance} cannot join rank 0 at .*: rank 0 refuses: {told}"):
        await FollowerChannel.join(us, at(f"127.0.0.1:{leader.port}"), 10)
    follower = await FollowerChannel.join(member(1), at(f"127.0.0.1:{leader.port}"), 10)  # the right one still may
    await gathering
    follower.close()
    leader.close()


async def test_strangers_are_closed_and_a_rank_comes_once() -> None:
    leader = LeaderChannel(member(0, plan=ParallelPlan(tp=3)), "127.0.0.1")
    joined: list[int] = []
    gathering = asyncio.create_task(leader.gather(1.0, joined.append))
    loop = asyncio.get_running_loop()
    with socket.create_connection(("127.0.0.1", leader.port)) as stranger:
        stranger.setblocking(False)
        await loop.sock_sendall(stranger, b"GET / HTTP/1.1\r\n\r\n")
        with contextlib.suppress(ConnectionResetError):
            assert await loop.sock_recv(stranger, 1) == b""
    us = member(2, plan=ParallelPlan(tp=3))
    first = await FollowerChannel.join(us, at(f"127.0.0.1:{leader.port}"), 10)
    second = await FollowerChannel.join(us, at(f"127.0.0.1:{leader.port}"), 10)
    assert await lost(second) == "rank 0 has closed its connection"
    with pytest.raises(SetupError, match="rank 1 of decode-0 did not join within 1 s"):
        await gathering
    assert joined == [1, 2] and not leader.lost.done()
    for channel in (first, second, leader):
        channel.close()


async def test_nobody_there_is_told_in_time() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(SetupError, match=f"rank 1 of decode-0 cannot join rank 0 at {address}: Connect"):
            await FollowerChannel.join(member(1), at(address), 0.3)
    with pytest.raises(SetupError, match="at nowhere: no host:port"):
        await FollowerChannel.join(member(1), at("nowhere"), 0.3)


FOLLOWER = f"""
import asyncio, sys
from biphase.engine.ranks.channel import FollowerChannel
from biphase.engine.ranks.greeting import Membership
from biphase.protos.parallel_plan import ParallelPlan

async def find():
    return sys.argv[1]

async def main():
    us = Membership(instance="decode-0", plan=ParallelPlan(tp=2, pp=1), rank=1, key="{KEY}")
    channel = await FollowerChannel.join(us, find, 10)
    channel.expect_steady_beats()
    print(await asyncio.wrap_future(channel.lost), flush=True)

asyncio.run(main())
"""


def follower_process(address: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", FOLLOWER, address], stdout=subprocess.PIPE)


async def test_a_stopped_process_is_lost_by_its_silence_and_a_killed_one_at_once() -> None:
    for number, most_s in ((signal.SIGSTOP, SILENCE_S + 1.0), (signal.SIGKILL, 0.5)):
        leader = LeaderChannel(member(0), "127.0.0.1")
        process = follower_process(f"127.0.0.1:{leader.port}")
        try:
            await leader.gather(30)
            leader.expect_steady_beats()
            start_s = time.monotonic()
            process.send_signal(number)
            reason = await lost(leader)
            assert time.monotonic() - start_s < most_s
            if number is signal.SIGSTOP:
                assert reason == "rank 1 has been silent for 1.5 s"
                process.send_signal(signal.SIGCONT)
                out, _ = await asyncio.to_thread(process.communicate, timeout=10)
                assert out == b"rank 0 has closed its connection\n"
            else:
                assert "closed" in reason or "reset" in reason
        finally:
            process.kill()
            process.communicate()
            leader.close()


async def test_a_connection_that_cannot_be_taken_does_not_keep_the_others_out(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = asyncio.get_running_loop()
    take, refusals = loop.sock_accept, [OSError(24, "Too many open files"), ConnectionAbortedError(103, "aborted")]

    async def accept(listener: socket.socket) -> object:
        if refusals:
            raise refusals.pop()
        return await take(listener)

    monkeypatch.setattr(loop, "sock_accept", accept)
    async with pair() as (leader, follower):
        assert not refusals and not leader.lost.done() and not follower.lost.done()
