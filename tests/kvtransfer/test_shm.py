"""Shared memory as a data plane: who may map it, what a reader sees of slots that are given to others, what is left."""

import asyncio
import gc
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import msgpack
import numpy as np
import pytest
from support.kv_wires import Reader, WiredPrefill, order_of, small_shm, wired_prefill

from biphase.kvtransfer.shm import plane as plane_module
from biphase.kvtransfer.shm.host import host_id
from biphase.kvtransfer.shm.memory import MappedSlots, MemoryName, SharedSlots
from biphase.kvtransfer.shm.plane import ShmPlane, ShmReceiver
from biphase.kvtransfer.wire import SourceUnreachable
from biphase.protos.values import KvTicket

SUPPORT = Path(__file__).parents[1] / "support"
NUM_TOKENS = 500


@asynccontextmanager
async def reader_process(prefill: WiredPrefill, ticket: KvTicket) -> AsyncIterator[asyncio.subprocess.Process]:
    """A reader that holds half a piece."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        str(SUPPORT / "shm_reader_process.py"),
        prefill.address,
        ticket.id.hex(),
        str(ticket.num_tokens),
        env={**os.environ, "PYTHONPATH": str(SUPPORT.parent)},
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        assert await process.stdout.readline() == b"half\n"
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def rest_of(process: asyncio.subprocess.Process) -> dict[str, object]:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(b"\n")
    told: dict[str, object] = json.loads(await process.stdout.readline())
    await process.wait()
    return told


def state_of(process: asyncio.subprocess.Process) -> str:
    return Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0]


async def test_a_reader_stopped_in_mid_read_past_the_lease_gets_no_wrong_byte() -> None:
    async with wired_prefill(lambda: small_shm(wait_s=0.3), piece_s=0.3, lease_s=0.2) as prefill:
        first, second = prefill.side.open(NUM_TOKENS), prefill.side.open(NUM_TOKENS)
        async with reader_process(prefill, first) as process:
            for ticket in (first, second):
                prefill.side.exports.leg_closed(ticket.id, time.monotonic())
            process.send_signal(signal.SIGSTOP)
            while state_of(process) != "T":
                await asyncio.sleep(0.001)
            end = await prefill.side.next_end()
            while (end.ticket, end.outcome) != (first.id, "expired"):
                end = await prefill.side.next_end()
            # the slots are free again, and written with the KV of others, every one of them many times over
            third = prefill.side.open(NUM_TOKENS)
            prefill.side.pool[:] += 1.0
            other = small_shm()
            reader, source = Reader(), prefill.source(other)
            await reader.read(source, order_of(third))
            assert np.array_equal(reader.content(NUM_TOKENS), prefill.side.content(NUM_TOKENS))
            await source.close()
            await other.close()
            process.send_signal(signal.SIGCONT)
            told = await rest_of(process)
    assert told["intact"] is False
    assert told["same"] is False  # the slot was written again indeed
    assert told["digest"] == "wrong"
    assert str(told["again"]).startswith("SourceRefused: LEASE_EXPIRED")
    assert str(told["stream"]).startswith("SourceUnreachable")
    assert told["boxes"] == 0


async def test_a_reader_stopped_for_less_goes_on() -> None:
    async with wired_prefill(small_shm) as prefill:
        ticket = prefill.side.open(NUM_TOKENS)
        async with reader_process(prefill, ticket) as process:
            process.send_signal(signal.SIGSTOP)
            other = small_shm()
            reader, source = Reader(), prefill.source(other)
            await reader.read(source, order_of(prefill.side.open(NUM_TOKENS)))  # others have slots to go on with
            await source.close()
            await other.close()
            process.send_signal(signal.SIGCONT)
            told = await rest_of(process)
    assert (told["intact"], told["same"], told["digest"]) == (True, True, "right")
    assert (told["stream"], told["again"]) == ("ended well", "ended well")


async def test_a_reader_that_waits_for_slots_of_others_hears_that_the_source_lives(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else it takes the source for dead while the slots of readers that have stopped come free, and its handoff fails."""
    monkeypatch.setattr("biphase.kvtransfer.reader.BEAT_S", 0.02)
    async with wired_prefill(small_shm) as prefill:
        source, stopped = prefill.source(), []
        for _ in range(2):  # each with half of the slots
            stream = source.pull(order_of(prefill.side.open(NUM_TOKENS)))
            while not (await anext(stream)).num_bytes:
                pass
            stopped.append(stream)
        assert prefill.plane is not None
        async with asyncio.timeout(5):
            while prefill.plane._staging.slots.num_free:  # type: ignore[attr-defined]
                await asyncio.sleep(0.001)
        order, reader = order_of(prefill.side.open(NUM_TOKENS)), Reader()
        waiting = source.pull(order)
        async with asyncio.timeout(5):
            for _ in range(5):
                assert not (await anext(waiting)).num_bytes
            for stream in stopped:
                stream.break_off("gone")
            async for arrival in waiting:
                await reader.take(arrival, order)
        assert np.array_equal(reader.content(NUM_TOKENS), prefill.side.content(NUM_TOKENS))
        await source.close()


async def test_the_last_slots_of_a_pull_that_ended_well_wait_for_their_reader() -> None:
    async with wired_prefill(small_shm) as prefill:
        source = prefill.source()
        ticket = prefill.side.open(16)  # one piece: sent, with the trailer and the end, before the reader looks at it
        stream = source.pull(order_of(ticket))
        arrival = await anext(stream)
        while not arrival.num_bytes:
            arrival = await anext(stream)
        async with asyncio.timeout(5):
            while prefill.open_pulls():
                await asyncio.sleep(0.001)
        reader = Reader()
        await reader.take(arrival, order_of(ticket))
        assert reader.boxes
        stream.break_off("enough")
        await source.close()


async def test_a_pull_revoked_voids_its_slots_at_once() -> None:
    async with wired_prefill(small_shm) as prefill:
        source = prefill.source()
        ticket = prefill.side.open(NUM_TOKENS)
        stream = source.pull(order_of(ticket))
        arrival = await anext(stream)
        while not arrival.num_bytes:
            arrival = await anext(stream)
        await arrival.payload()
        assert arrival.intact()
        prefill.side.exports.revoke(ticket.id, time.monotonic())
        async with asyncio.timeout(5):
            while arrival.intact():
                await asyncio.sleep(0.001)
        stream.break_off("enough")
        await source.close()


class Elsewhere(ShmPlane):
    async def receiver(self, peer: str) -> ShmReceiver:
        receiver = await super().receiver(peer)
        receiver.hello = msgpack.packb({"host": "elsewhere"})
        return receiver


async def test_another_host_is_told_so() -> None:
    async with wired_prefill(small_shm) as prefill:
        source = prefill.source(Elsewhere())
        with pytest.raises(SourceUnreachable, match="cannot share memory with us: host elsewhere against"):
            await Reader().read(source, order_of(prefill.side.open(16)))
        assert prefill.plane is not None
        for hello in (b"", b"\xc1", msgpack.packb([]), msgpack.packb({})):
            with pytest.raises(ConnectionError, match=r"\w"):
                await prefill.plane.sender(hello, "127.0.0.1:1")
        await source.close()


def test_a_host_is_known_by_its_kernel_and_namespace() -> None:
    boot, namespace, user = host_id().split("/")
    assert len(boot) == 36
    assert int(namespace) == os.stat("/proc/self/ns/pid").st_ino
    assert int(user) == os.getuid()


def test_a_reader_maps_what_it_was_told_and_nothing_else() -> None:
    slots = SharedSlots(3, 4096)
    payload, _ = slots.view(2, 10)
    payload[:] = b"0123456789"
    slots.mark(2, 2**63 + 5)
    mapped = MappedSlots(MemoryName.unpacked(slots.name.packed()))
    assert bytes(mapped.payload(2, 10)) == b"0123456789"
    assert mapped.generation(2) == 2**63 + 5
    assert mapped.payload(0, 1).readonly
    with pytest.raises(ConnectionError, match="4097 bytes in a slot of 4096"):
        mapped.payload(0, 4097)
    for wrong in (
        replace(slots.name, inode=slots.name.inode + 1),
        replace(slots.name, num_slots=4),
        replace(slots.name, fd=99999),
        replace(slots.name, pid=2**22 + 1),
    ):
        with pytest.raises(ConnectionError, match="process"):
            MappedSlots(wrong)
    for data in (b"", b"\xc1", msgpack.packb({"pid": 1}), replace(slots.name, pid=-1).packed()):
        with pytest.raises(ConnectionError, match="no name of a shared memory"):
            MemoryName.unpacked(data)
    slots.close()
    with pytest.raises(ConnectionError, match="cannot be opened"):
        MappedSlots(slots.name)
    assert bytes(mapped.payload(2, 10)) == b"0123456789"  # what is mapped stays


async def test_the_memory_of_a_source_that_has_ended_is_given_up_with_the_next_one_mapped() -> None:
    plane = ShmPlane()
    sources = [SharedSlots(1, 4096) for _ in range(3)]
    receiver = await plane.receiver("127.0.0.1:1")
    await receiver.start(sources[0].name.packed())  # in use still
    plane.map(sources[1].name)
    for ended in sources[:2]:
        ended.close()
    plane.map(sources[2].name)
    assert [key[1] for key in plane._mapped] == [sources[0].name.inode, sources[2].name.inode]
    receiver.close()
    await plane.close()
    sources[2].close()


async def test_memories_of_sources_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plane_module, "MOST_MAPPED", 2)
    plane = ShmPlane()
    sources = [SharedSlots(1, 4096) for _ in range(4)]
    for slots in sources[:2]:
        receiver = await plane.receiver("127.0.0.1:1")
        await receiver.start(slots.name.packed())
        if slots is sources[1]:
            receiver.close()
    for slots in sources[2:]:
        plane.map(slots.name)
    assert [key[1] for key in plane._mapped] == [sources[0].name.inode, sources[3].name.inode]
    await plane.close()
    with pytest.raises(ConnectionError, match="shm is closed"):
        await plane.receiver("127.0.0.1:1")
    with pytest.raises(ConnectionError, match="shm is closed"):
        await plane.sender(msgpack.packb({"host": host_id()}), "127.0.0.1:1")
    for slots in sources:
        slots.close()


async def test_nothing_is_left_behind() -> None:
    def num_maps() -> int:
        return Path("/proc/self/maps").read_text().count("memfd:biphase-kv")

    gc.collect()
    before = num_maps(), len(os.listdir("/proc/self/fd"))
    async with wired_prefill(small_shm) as prefill:
        source = prefill.source()
        for _ in range(3):
            ticket = prefill.side.open(100)
            await Reader().read(source, order_of(ticket))
        await source.close()
        assert num_maps() == before[0] + 2  # ours twice: as source and as reader
    gc.collect()
    assert (num_maps(), len(os.listdir("/proc/self/fd"))) == before
