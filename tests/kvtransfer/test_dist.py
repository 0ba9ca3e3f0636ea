"""Pair groups between real processes: order across pulls, ends of peers, bounds."""

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator

import msgpack
import pytest
import torch
from support.payload_peer import Peer, fetch_all, serving_peer

from biphase.kvtransfer.pair_groups.plane import DistPlane
from biphase.kvtransfer.pair_groups.rendezvous import Rendezvous

SIZES = (1, 4096, 100_001, 1 << 20)
DEADLINE_S = 1.5

NewPlane = Callable[..., DistPlane]


@pytest.fixture(scope="module")
def peers() -> Iterator[tuple[Peer, Peer]]:
    """Two processes: importing torch is what takes long here."""
    arguments = ("biphase.kvtransfer.pair_groups.plane:DistPlane", "host=127.0.0.1", f"deadline_s={DEADLINE_S}")
    torch.set_num_threads(1)
    with serving_peer(*arguments) as first, serving_peer(*arguments) as second:
        yield first, second


@pytest.fixture
def peer(peers: tuple[Peer, Peer]) -> Peer:
    return peers[0]


@pytest.fixture
async def new_plane() -> AsyncIterator[NewPlane]:
    planes: list[DistPlane] = []

    def new(*, patience_s: float = 10.0, deadline_s: float = 5.0, max_pairs: int = 8) -> DistPlane:
        planes.append(DistPlane("127.0.0.1", patience_s=patience_s, deadline_s=deadline_s, max_pairs=max_pairs))
        return planes[-1]

    yield new
    for plane in planes:
        await plane.close()


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="this machine has no IPv6")
def test_ends_meet_at_an_address_of_either_kind() -> None:
    ours = Rendezvous("::1", timeout_s=5.0)
    ours.theirs(ours.address, "pair").set("a", "b")
    assert ours.ours("pair").get("a") == b"b"


def packed(said: dict[str, object], name: str, value: object) -> bytes:
    return bytes(msgpack.packb({**said, name: value}))


def payloads(first_seed: int, count: int = 8) -> list[tuple[int, int]]:
    return [(first_seed + at, SIZES[at % len(SIZES)]) for at in range(count)]


async def test_many_pulls_share_one_pair_group(peer: Peer, new_plane: NewPlane) -> None:
    plane = new_plane()

    async def one(number: int) -> None:
        async with peer.pull(plane, payloads=payloads(100 * number, 20)) as pull:
            await fetch_all(pull, 20)

    await asyncio.gather(*(one(number) for number in range(6)))
    counts = {"dist_pairs": 1, "dist_pairs_built": 1, "dist_pairs_broken": 0, "dist_pairs_closed_for_room": 0}
    assert plane.counters() == counts


async def test_references_that_never_come_hold_nobody_up(peer: Peer, new_plane: NewPlane) -> None:
    """Their payloads are under way on the pair: the next reference that comes lets the reader take them out."""
    plane = new_plane()
    for number in range(4):
        async with peer.pull(plane, payloads=payloads(100 * number + 50)) as other:
            async with peer.pull(plane, payloads=payloads(100 * number), silent=[2, 3, 5]) as broken_off:
                await broken_off.reference()
            await fetch_all(other, 8)
    assert plane.counters()["dist_pairs_built"] == 1


async def test_a_stopped_reader_costs_its_pair_within_the_deadline(peer: Peer, new_plane: NewPlane) -> None:
    """Here the reader is this process, which posts no receive; the serving process must not wait on."""
    plane = new_plane(deadline_s=DEADLINE_S)
    async with peer.pull(plane, payloads=[(at, 1 << 16) for at in range(30)]) as pull:
        started_s = time.monotonic()
        with pytest.raises(ConnectionError, match=r"Timed out|taken nothing|closed"):
            while True:
                await pull.reference()
        assert time.monotonic() - started_s < DEADLINE_S + 3.0
    async with peer.pull(plane, payloads=payloads(7)) as again:
        await fetch_all(again, 8)


async def test_a_stopped_source_costs_its_pair_within_the_deadline(peer: Peer, new_plane: NewPlane) -> None:
    plane = new_plane(deadline_s=DEADLINE_S)
    async with peer.pull(plane, payloads=[(1, 4 << 20)] * 4) as pull:
        reference, _, size = await pull.reference()
        await peer.stop()
        try:
            started_s = time.monotonic()
            with pytest.raises(ConnectionError):
                await pull.receiver.fetch(reference, size)
            assert time.monotonic() - started_s < DEADLINE_S + 3.0
        finally:
            peer.go_on()
    async with peer.pull(plane, payloads=payloads(7)) as again:
        await fetch_all(again, 8)


async def test_pairs_are_bounded_and_the_longest_unused_goes(peers: tuple[Peer, Peer], new_plane: NewPlane) -> None:
    plane = new_plane(max_pairs=1)
    async with peers[0].pull(plane, payloads=payloads(3)) as pull:
        await fetch_all(pull, 8)
        with pytest.raises(ConnectionError, match="all 1 pair groups are in use"):
            async with peers[1].pull(plane, payloads=payloads(3)):
                pass
    for peer in reversed(peers):
        async with peer.pull(plane, payloads=payloads(3)) as pull:
            await fetch_all(pull, 8)
    counters = plane.counters()
    assert (counters["dist_pairs"], counters["dist_pairs_closed_for_room"]) == (1, 2)


async def test_a_pull_does_not_wait_for_a_pair_that_takes_long(peer: Peer, new_plane: NewPlane) -> None:
    """It goes another way; the group is built meanwhile and the next pull finds it."""
    plane = new_plane(patience_s=0.0)
    with pytest.raises(ConnectionError, match="is still being built"):
        async with peer.pull(plane, payloads=payloads(3)):
            pass
    async with asyncio.timeout(10):
        while not plane.counters()["dist_pairs_built"]:
            await asyncio.sleep(0.01)
    async with peer.pull(plane, payloads=payloads(3)) as pull:
        await fetch_all(pull, 8)


WISH = {"reader": "r", "life": 0, "last": 0, "backend": "gloo"}
ANSWER = {"store": ["127.0.0.1", 1], "pair": "p", "pull": 1, "standing": b""}


@pytest.mark.parametrize(
    "hello",
    [b"\x80", b"\x01", b"\xc1", *(packed(WISH, "life", bad) for bad in (float("inf"), -1, "1", 2**64 - 1, None))],
)
async def test_what_is_no_request_of_dist_is_refused(new_plane: NewPlane, hello: bytes) -> None:
    plane = new_plane()
    with pytest.raises(ConnectionError, match="that dist cannot read"):
        await plane.sender(hello, "somebody")
    assert plane.counters()["dist_pairs"] == 0


@pytest.mark.parametrize(
    "answer",
    [
        b"\x01",
        packed(ANSWER, "pull", float("inf")),
        packed(ANSWER, "standing", 2**40),
        packed(ANSWER, "store", ["127.0.0.1", 2**40]),
    ],
)
async def test_what_is_no_answer_of_dist_is_refused(new_plane: NewPlane, answer: bytes) -> None:
    plane = new_plane()
    receiver = await plane.receiver("somebody")
    with pytest.raises(ConnectionError, match="that dist cannot read"):
        await receiver.start(answer)
    assert plane.counters()["dist_pairs"] == 0


async def test_a_peer_that_dies_costs_its_pair_at_once(
    peers: tuple[Peer, Peer], new_plane: NewPlane, caplog: pytest.LogCaptureFixture
) -> None:
    """The last test of this module: the peer is gone."""
    plane, peer = new_plane(), peers[1]
    async with peer.pull(plane, payloads=[(1, 1 << 20)]) as pull:
        reference, _, size = await pull.reference()
        peer.process.kill()
        peer.process.wait()
        started_s = time.monotonic()
        with pytest.raises(ConnectionError):
            await pull.receiver.fetch(reference, size)
        assert time.monotonic() - started_s < 2.0
    assert plane.counters()["dist_pairs"] == 0
    assert "is dropped" in caplog.text
