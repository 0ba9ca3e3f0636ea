"""The tcp wire and the frames' stream of a data plane, over real sockets: content, ends of every kind, bad bytes."""

import asyncio
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.kv import FIRST_TOKEN, LAYOUT, make_signature
from support.kv_wires import Reader, WiredPrefill, check_pull, order_of, small_shm, wired_prefill

from biphase.kernels.kv_layout import KvBox
from biphase.kvtransfer.tcp import messages
from biphase.kvtransfer.tcp.messages import Kind, PullCall, WireError
from biphase.kvtransfer.tcp.source import TcpTransport
from biphase.kvtransfer.wire import DataPlane, PullOrder, SourceRefused, SourceUnreachable
from biphase.protos.errors import SetupError
from biphase.protos.ids import TicketId

NUM_TOKENS = 500  # 2 MB: more than a socket takes at once
PLANES = [pytest.param(None, id="inline"), pytest.param(small_shm, id="shm")]


async def until(true: Callable[[], bool], timeout_s: float = 10.0) -> None:
    """Far ends hear over the wire; give them the loop until they have."""
    async with asyncio.timeout(timeout_s):
        while not true():
            await asyncio.sleep(0.001)


def idle(prefill: WiredPrefill) -> bool:
    return not prefill.open_pulls() and not prefill.side.exports.counters()["running_sends"]


@pytest.mark.parametrize("plane", PLANES)
@pytest.mark.parametrize("scatter", [False, True])
async def test_all_of_a_request_arrives_and_is_released(plane: Callable[[], DataPlane] | None, scatter: bool) -> None:
    async with wired_prefill(plane) as prefill:
        source = prefill.source()
        assert (await source.handshake(make_signature("decode-0"), 5.0)).instance == "prefill-0"
        for _ in range(3):
            await check_pull(prefill, source, NUM_TOKENS, scatter=scatter)
        assert prefill.server.counters()["tcp_connections"] == 2  # one for control, one for bulk
        await source.close()
        await until(lambda: prefill.server.counters()["tcp_connections"] == 0)
        assert idle(prefill)


@pytest.mark.parametrize("plane", PLANES)
async def test_what_a_reader_leaves_is_skipped(plane: Callable[[], DataPlane] | None) -> None:
    async with wired_prefill(plane) as prefill:
        source = prefill.source()
        ticket = prefill.side.open(NUM_TOKENS)
        reader = Reader(leave=frozenset({0, 3, 4, 11}))
        await reader.read(source, order_of(ticket))
        assert reader.num_left == 4
        for box in reader.boxes:
            where = slice(box.layer_start, box.layer_end), slice(None), slice(box.head_start, box.head_end)
            tokens = slice(box.token_start, box.token_end)
            ours, theirs = reader.content(NUM_TOKENS), prefill.side.content(NUM_TOKENS)
            assert np.array_equal(ours[*where, tokens], theirs[*where, tokens])
        assert np.isnan(reader.content(NUM_TOKENS)).any()
        await source.close()


@pytest.mark.parametrize("plane", PLANES)
async def test_many_pulls_at_a_time(plane: Callable[[], DataPlane] | None) -> None:
    async with wired_prefill(plane) as prefill:
        source = prefill.source()
        await asyncio.gather(*(check_pull(prefill, source, NUM_TOKENS) for _ in range(16)))
        await until(lambda: prefill.server.counters()["tcp_connections"] <= 5)  # idle ones are bounded
        await source.close()


@pytest.mark.parametrize("plane", PLANES)
async def test_what_is_computed_later_comes_later(plane: Callable[[], DataPlane] | None) -> None:
    async with wired_prefill(plane) as prefill:
        source = prefill.source()
        ticket = prefill.side.open(NUM_TOKENS, computed=0)
        reader = Reader()
        reading = asyncio.create_task(reader.read(source, order_of(ticket)))
        for computed in (1, 100, 499):
            await until(lambda: prefill.open_pulls() > 0)
            prefill.side.exports.advance(ticket.id, computed)
            await until(lambda: bool(reader.boxes) and reader.boxes[-1].token_end == computed)  # noqa: B023
            assert not reading.done()
        prefill.side.exports.finish(ticket.id, FIRST_TOKEN, time.monotonic())
        await reading
        assert np.array_equal(reader.content(NUM_TOKENS), prefill.side.content(NUM_TOKENS))
        await source.close()


@pytest.mark.parametrize("plane", PLANES)
async def test_a_refusal_is_told_and_the_connection_goes_on(plane: Callable[[], DataPlane] | None) -> None:
    async with wired_prefill(plane) as prefill:
        source = prefill.source()
        ticket = prefill.side.open(NUM_TOKENS)
        unknown = PullOrder(ticket=TicketId(b"?" * 16), epoch=1, incarnation=1, box=LAYOUT.box(1))
        with pytest.raises(SourceRefused, match="UNKNOWN_TICKET"):
            await Reader().read(source, unknown)
        with pytest.raises(SourceRefused, match="meant for incarnation 9"):
            await source.release(ticket.id, 1, 9, 5.0)
        with pytest.raises(SourceRefused, match="dtype"):
            wrong = make_signature("decode-0", layout=type(LAYOUT)(**{**_fields(LAYOUT), "dtype": "float16"}))
            await source.handshake(wrong, 5.0)
        prefill.side.exports.revoke(ticket.id, time.monotonic())
        with pytest.raises(SourceRefused, match="REVOKED"):
            await Reader().read(source, order_of(ticket))
        assert prefill.server.counters()["tcp_connections"] == 2
        await source.close()


def _fields(layout: object) -> dict[str, object]:
    names = ("num_layers", "num_kv_heads", "head_dim", "block_size")
    return {name: getattr(layout, name) for name in names}


@pytest.mark.parametrize("plane", PLANES)
async def test_a_ticket_revoked_while_its_reader_waits(plane: Callable[[], DataPlane] | None) -> None:
    async with wired_prefill(plane) as prefill:
        source = prefill.source()
        ticket = prefill.side.open(NUM_TOKENS, computed=100)
        reading = asyncio.create_task(Reader().read(source, order_of(ticket)))
        await until(lambda: prefill.open_pulls() > 0)
        prefill.side.exports.revoke(ticket.id, time.monotonic())
        with pytest.raises(SourceRefused, match="REVOKED"):
            await reading
        await until(lambda: idle(prefill))
        await source.close()


@pytest.mark.parametrize("plane", PLANES)
@pytest.mark.parametrize("after", [0, 1, 5])
async def test_a_reader_that_breaks_off_ends_the_pull(plane: Callable[[], DataPlane] | None, after: int) -> None:
    async with wired_prefill(plane) as prefill:
        source = prefill.source()
        ticket = prefill.side.open(NUM_TOKENS, computed=NUM_TOKENS)
        stream = source.pull(order_of(ticket))
        for _ in range(after):
            await anext(stream)
        stream.break_off("enough")
        stream.break_off("twice is once")
        with pytest.raises(SourceUnreachable, match="enough"):
            await anext(stream)
        await until(lambda: idle(prefill))
        await Reader().read(source, order_of(ticket, epoch=2, pieces_only=True))  # the source goes on
        await source.close()


@pytest.mark.parametrize("plane", PLANES)
async def test_breaking_off_wakes_who_waits(plane: Callable[[], DataPlane] | None) -> None:
    async with wired_prefill(plane) as prefill:
        source = prefill.source()
        ticket = prefill.side.open(NUM_TOKENS, computed=0)
        stream = source.pull(order_of(ticket))
        await anext(stream)  # a beat
        waiting = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0)
        stream.break_off("no longer wanted")
        with pytest.raises(SourceUnreachable, match="no longer wanted"):
            await waiting
        await until(lambda: idle(prefill))
        # while it connects, too
        stream = source.pull(order_of(ticket, epoch=2))
        waiting = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0)
        stream.break_off("at once")
        with pytest.raises(SourceUnreachable, match="at once"):
            await waiting
        await until(lambda: idle(prefill))
        await source.close()


async def test_a_cancelled_reader_leaves_nothing_behind() -> None:
    async with wired_prefill() as prefill:
        source = prefill.source()
        ticket = prefill.side.open(NUM_TOKENS, computed=0)
        stream = source.pull(order_of(ticket))
        await anext(stream)
        reading = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        stream.break_off("cancelled")
        await until(lambda: idle(prefill))
        await source.close()


@pytest.mark.parametrize("plane", PLANES)
async def test_a_reader_that_takes_nothing_is_cut(plane: Callable[[], DataPlane] | None) -> None:
    make = None if plane is None else lambda: small_shm(wait_s=0.2)
    async with wired_prefill(make, piece_s=0.2, num_blocks=2048) as prefill:
        source = prefill.source()
        ticket = prefill.side.open(32000)  # 128 MB
        stream = source.pull(order_of(ticket))
        await anext(stream)
        await until(lambda: idle(prefill))
        with pytest.raises(SourceUnreachable, match="closed by the far end|none of 4 staging slots|reset"):
            while True:
                await anext(stream)
        await source.close()


async def test_the_death_of_the_source_is_told_at_once() -> None:
    program = Path(__file__).parents[1] / "support" / "kv_wire_process.py"
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        str(program),
        env={**os.environ, "PYTHONPATH": str(program.parents[1])},
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        told = json.loads(await process.stdout.readline())
        source = TcpTransport().open(told["tcp"])
        order = PullOrder(ticket=TicketId(bytes.fromhex(told["id"])), epoch=1, incarnation=1, box=LAYOUT.box(100))
        stream = source.pull(order)
        await anext(stream)
        waiting = asyncio.ensure_future(anext(stream))
        process.send_signal(signal.SIGKILL)
        with pytest.raises(SourceUnreachable, match="closed by the far end|reset"):
            async with asyncio.timeout(5):
                await waiting
                await anext(stream)
        with pytest.raises(SourceUnreachable, match="cannot connect|closed|idle|reset"):
            await source.handshake(make_signature("decode-0"), 5.0)
        await source.close()
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def test_nobody_there_and_a_port_that_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        async with wired_prefill() as prefill:
            with pytest.raises(SetupError, match=f"cannot listen on 127.0.0.1:{port}"):
                await prefill.server.start("127.0.0.1", port)
    source = TcpTransport().open(f"127.0.0.1:{port}")
    with pytest.raises(SourceUnreachable, match=f"cannot connect to 127.0.0.1:{port}"):
        await source.handshake(make_signature("decode-0"), 5.0)
    with pytest.raises(SourceUnreachable, match=f"cannot connect to 127.0.0.1:{port}"):
        await anext(source.pull(PullOrder(ticket=TicketId(b"t" * 16), epoch=1, incarnation=1, box=LAYOUT.box(1))))
    await source.close()


@pytest.mark.parametrize(
    "sent",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        messages.prefix(Kind.FRAME, 10),
        messages.prefix(Kind.CALL, 2**31),
        messages.prefix(Kind.CALL, 4) + b"\xc1\xc1\xc1\xc1",
        messages.message(Kind.CALL, {"call": "dance"}),
        messages.message(Kind.CALL, {"call": "handshake", "signature": b"\xff\xff"}),
        messages.message(Kind.CALL, {"call": "release", "ticket": b"short", "epoch": 1, "incarnation": 1}),
        messages.message(Kind.CALL, {"call": "pull", "ticket": b"t" * 16, "box": [0, 1, 2]}),
        messages.message(Kind.CALL, {"call": "pull", "box": [0, 1, 0, 1, 0, -1]}),
    ],
)
async def test_bytes_that_are_none_of_ours_close_the_connection(sent: bytes) -> None:
    async with wired_prefill() as prefill:
        host, _, port = prefill.address.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(sent)
        async with asyncio.timeout(5):
            assert await reader.read() == b""
        writer.close()
        source = prefill.source()
        await source.handshake(make_signature("decode-0"), 5.0)
        await source.close()


async def test_a_call_while_a_pull_is_served_ends_both() -> None:
    async with wired_prefill() as prefill:
        ticket = prefill.side.open(NUM_TOKENS, computed=0)
        host, _, port = prefill.address.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        call = messages.message(Kind.CALL, messages.pull_body(PullCall(order_of(ticket))))
        writer.write(call)
        await until(lambda: prefill.open_pulls() > 0)
        writer.write(call)
        await until(lambda: idle(prefill))
        async with asyncio.timeout(5):
            await reader.read()
        writer.close()


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        messages.prefix(Kind.SHOWN, 10, 4) + b"h" * 64 + b"here",
        messages.prefix(Kind.TAKEN, 0, 4) + b"here",
        messages.prefix(Kind.REPLY, 2**30),
        messages.message(Kind.REPLY, {}),
        messages.prefix(Kind.FRAME, 1 << 20) + b"h" * 64 + b"too little",
    ],
)
async def test_a_source_that_answers_nonsense_is_unreachable(answer: bytes) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(10)
        writer.write(answer)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(talk, "127.0.0.1", 0)
    source = TcpTransport().open(f"127.0.0.1:{server.sockets[0].getsockname()[1]}")
    with pytest.raises(SourceUnreachable):
        async for arrival in source.pull(
            PullOrder(ticket=TicketId(b"t" * 16), epoch=1, incarnation=1, box=LAYOUT.box(1))
        ):
            await arrival.payload()
    await source.close()
    server.close()
    await server.wait_closed()


def test_a_pull_is_the_same_after_the_wire() -> None:
    box = KvBox(layer_start=0, layer_end=3, head_start=1, head_end=2, token_start=7, token_end=2**20)
    order = PullOrder(ticket=TicketId(b"t" * 16), epoch=3, incarnation=4, box=box, codec="raw", pieces_only=True)
    data = messages.message(Kind.CALL, messages.pull_body(PullCall(order, "shm", b"hello")))
    head = messages.read_prefix(data)
    assert (head.kind, head.size) == (Kind.CALL, len(data) - messages.PREFIX_BYTES)
    assert messages.read_pull(messages.read_body(data[messages.PREFIX_BYTES :])) == PullCall(order, "shm", b"hello")
    with pytest.raises(WireError, match="not a map"):
        messages.read_body(b"\x01")
    too_wide = messages.pull_body(PullCall(replace(order, epoch=2**32)))
    with pytest.raises(WireError, match="epoch is 4294967296, 4294967295 is the most"):
        messages.read_pull(too_wide)
