"""NIXL between real processes on host memory: what is read is what was meant, or is known not to be."""

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import psutil
import pytest
from support.payload_peer import Peer, fetch_all, serving_peer
from support.slot_reader import COUNT, slot_reader

from biphase.kvtransfer.nixl.library import bindings, net_devices, rdma_ports, why_not
from biphase.kvtransfer.nixl.plane import NUM_SLOTS, NixlPlane
from biphase.kvtransfer.nixl.reader import Reader

installed = pytest.mark.skipif(why_not() is not None, reason=why_not() or "")

SIZES = (0, 1, 4096, 100_001, 1 << 20)
WAIT_S = 2.0


@pytest.fixture(scope="module")
def peer() -> Iterator[Peer]:
    with serving_peer("biphase.kvtransfer.nixl.plane:NixlPlane", "host=127.0.0.1", f"wait_s={WAIT_S}") as peer:
        yield peer


@pytest.fixture
async def plane() -> AsyncIterator[NixlPlane]:
    plane = NixlPlane("127.0.0.1", wait_s=WAIT_S)
    yield plane
    await plane.close()


def payloads(first_seed: int, count: int = 10) -> list[tuple[int, int]]:
    return [(first_seed + at, SIZES[at % len(SIZES)]) for at in range(count)]


@installed
async def test_pulls_side_by_side(peer: Peer, plane: NixlPlane) -> None:
    async def one(number: int) -> None:
        async with peer.pull(plane, payloads=payloads(100 * number, 30)) as pull:
            await fetch_all(pull, 30)

    await asyncio.gather(*(one(number) for number in range(4)))


@installed
async def test_an_idle_process_is_idle(peer: Peer, plane: NixlPlane) -> None:
    """The library's own wrapper would keep it at two thirds of a core."""
    async with peer.pull(plane, payloads=payloads(1)) as pull:
        await fetch_all(pull, 10)
    process = psutil.Process(peer.process.pid)
    before = process.cpu_times()
    await asyncio.sleep(0.5)  # the span that is measured
    after = process.cpu_times()
    assert (after.user + after.system) - (before.user + before.system) <= 0.1


@installed
async def test_what_was_void_before_it_was_read(peer: Peer, plane: NixlPlane) -> None:
    async with peer.pull(plane, payloads=payloads(1)[1:], close_after=3) as pull:
        references = [await pull.reference() for _ in range(3)]
        with pytest.raises(ConnectionError, match="LEASE_EXPIRED"):
            await pull.reference()
        for reference, _, size in references:
            await pull.receiver.fetch(reference, size)
            assert not pull.receiver.intact(reference)


@installed
async def test_a_reader_stopped_in_mid_read_past_its_lease() -> None:
    """Its slot is written again meanwhile; it sees that, or has read what was meant."""
    plane = NixlPlane("127.0.0.1", num_slots=1, slot_bytes=COUNT)
    async with slot_reader("biphase.kvtransfer.nixl.plane:NixlPlane", f"slot_bytes={COUNT}") as reader:
        outcomes = [await reader.overtaken(plane) for _ in range(4)]
    await plane.close()
    assert set(outcomes) <= {"right", "void"}, outcomes
    assert "void" in outcomes, "no reader was stopped before its read was complete"


@installed
async def test_a_source_that_died(plane: NixlPlane) -> None:
    with serving_peer("biphase.kvtransfer.nixl.plane:NixlPlane", "host=127.0.0.1") as peer:
        async with peer.pull(plane, payloads=[(1, 1 << 20)] * 2) as pull:
            await fetch_all(pull, 1)
            reference, _, size = await pull.reference()
            peer.process.kill()
            peer.process.wait()
            with pytest.raises(ConnectionError, match="nixl"):
                await asyncio.wait_for(pull.receiver.fetch(reference, size), 2 * WAIT_S)


@installed
async def test_what_is_no_message_of_nixl_is_refused(plane: NixlPlane) -> None:
    receiver = await plane.receiver("somebody")
    with pytest.raises(ConnectionError, match="no description"):
        await receiver.start(b"\x01")


class NeverEnding:
    """An agent whose reads stay under way."""

    def createXferReq(self, *args: object) -> int:
        return 1

    def postXferReq(self, *args: object) -> object:
        return bindings().NIXL_IN_PROG

    getXferStatus = postXferReq


@installed
async def test_a_read_that_the_library_never_ends_is_not_asked_about_for_ever(plane: NixlPlane) -> None:
    """Its slot is lost: it may be written still. Where all are, pulls go another way at once."""
    plane.reader = Reader(NeverEnding(), None, drain_s=0.1)
    given_up: list[int] = []
    for _ in range(NUM_SLOTS):
        assert await plane.receiver("somebody") is not None
        with pytest.raises(ConnectionError, match=r"took more than 0\.01 s"):
            await plane.reader.read("a", 1, 2, 3, timeout_s=0.01, given_up=lambda: given_up.append(1))
    async with asyncio.timeout(5):
        while plane.reader.num_unfinished:
            await asyncio.sleep(0.01)
    assert (given_up, plane.reader.num_lost) == ([], NUM_SLOTS)
    with pytest.raises(ConnectionError, match=f"nixl keeps all {NUM_SLOTS} of our slots"):
        await plane.receiver("somebody")


def test_the_interface_is_named(tmp_path: Path) -> None:
    assert net_devices("127.0.0.1", tmp_path) == "lo"
    assert net_devices("0.0.0.0", tmp_path) == ""
    for device, state in (("mlx5_0", "4: ACTIVE\n"), ("mlx5_1", "1: DOWN\n")):
        (tmp_path / device / "ports/1").mkdir(parents=True)
        (tmp_path / device / "ports/1/state").write_text(state)
    assert rdma_ports(tmp_path) == ["mlx5_0:1"]
    assert net_devices("127.0.0.1", tmp_path) == "mlx5_0:1,lo"


def test_without_nixl_nothing_else_is_missing() -> None:
    program = (
        "import sys, importlib.util\n"
        "sys.meta_path.insert(0, type('No', (), {'find_spec': staticmethod(lambda name, *_: None)}))\n"
        "for name in ('nixl_cu12', 'nixl_cu13', 'nixl_rocm'): sys.modules[name] = None\n"
        "from biphase.kvtransfer.nixl import library\n"
        "importlib.util.find_spec = lambda name, *_: None\n"
        "print(library.why_not())"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "nixl is not installed: pip install 'biphase[nixl]'"
