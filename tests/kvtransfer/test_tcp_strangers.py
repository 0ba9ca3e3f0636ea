"""Whoever reaches the tcp listener without a ticket: keeps nobody out, and gets nothing of a data plane."""

import asyncio
import time

import pytest
from support.kv import make_signature
from support.kv_wires import Reader, check_pull, order_of, small_shm, wired_prefill

from biphase.kernels.kv_layout import KvBox
from biphase.kvtransfer.shm.plane import ShmPlane
from biphase.kvtransfer.tcp import messages
from biphase.kvtransfer.tcp.messages import Kind
from biphase.kvtransfer.wire import PayloadSender, PullOrder, SourceRefused
from biphase.protos.ids import TicketId

NUM_TOKENS = 100
MOST = 4

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def connected(address: str) -> Streams:
    host, _, port = address.rpartition(":")
    return await asyncio.open_connection(host, int(port))


async def closed(streams: Streams, timeout_s: float = 5.0) -> None:
    """By the far end."""
    async with asyncio.timeout(timeout_s):
        while await streams[0].read(1024):
            pass
    streams[1].close()


async def test_silent_connections_keep_nobody_out() -> None:
    async with wired_prefill(most_connections=MOST) as prefill:
        silent = [await connected(prefill.address) for _ in range(MOST)]
        source = prefill.source()
        await check_pull(prefill, source, NUM_TOKENS)
        await asyncio.gather(closed(silent[0]), closed(silent[1]))  # for control and bulk
        more = [await connected(prefill.address) for _ in range(2 * MOST)]
        await check_pull(prefill, source, NUM_TOKENS)
        await source.close()
        for _, writer in (*silent, *more):
            writer.close()


async def test_what_has_been_of_use_goes_after_what_never_was() -> None:
    async with wired_prefill(most_connections=MOST) as prefill:
        source = prefill.source()
        await check_pull(prefill, source, NUM_TOKENS)
        control, bulk = source._control, source._idle[0]
        silent = [await connected(prefill.address) for _ in range(3 * MOST)]
        await check_pull(prefill, source, NUM_TOKENS)
        assert (source._control, source._idle) == (control, [bulk])
        assert prefill.server.counters()["tcp_connections"] <= MOST
        await source.close()
        for _, writer in silent:
            writer.close()


async def test_readers_whose_idle_connections_gave_way_connect_again() -> None:
    async with wired_prefill(most_connections=MOST) as prefill:
        sources = [prefill.source() for _ in range(MOST)]
        for _ in range(2):
            for source in sources:
                await check_pull(prefill, source, NUM_TOKENS)
        for source in sources:
            await source.close()


async def test_connections_at_work_are_not_closed_for_others() -> None:
    async with wired_prefill(most_connections=2) as prefill:
        source = prefill.source()
        orders = [order_of(prefill.side.open(NUM_TOKENS, computed=50)) for _ in range(2)]
        streams = [source.pull(order) for order in orders]
        for stream in streams:
            await anext(stream)
        await closed(await connected(prefill.address))
        assert prefill.open_pulls() == 2
        for stream in streams:
            stream.break_off("enough")
        await source.close()


@pytest.mark.parametrize("sent", [b"", messages.prefix(Kind.CALL, 100)[:3], messages.prefix(Kind.CALL, 100) + b"x"])
async def test_a_connection_without_a_whole_first_call_is_closed(sent: bytes) -> None:
    async with wired_prefill(piece_s=0.2) as prefill:
        streams = await connected(prefill.address)
        streams[1].write(sent)
        await closed(streams)


@pytest.mark.parametrize("sent", [messages.prefix(Kind.CALL, 100)[:3], messages.prefix(Kind.CALL, 100)])
async def test_so_is_one_whose_second_call_never_ends_but_not_one_that_lies_idle(sent: bytes) -> None:
    async with wired_prefill(piece_s=0.2) as prefill:
        source = prefill.source()
        await source.handshake(make_signature("decode-0"), 5.0)
        streams = await connected(prefill.address)
        call = {"call": "release", "ticket": b"?" * 16, "epoch": 1, "incarnation": 1}
        streams[1].write(messages.message(Kind.CALL, call))
        assert messages.read_prefix(await streams[0].readexactly(messages.PREFIX_BYTES)).kind is Kind.REPLY
        streams[1].write(sent)
        await closed(streams)
        assert source._control is not None
        assert not source._control.stale()
        await source.close()


class Watched(ShmPlane):
    """Counts who was given a sender."""

    num_senders = 0

    async def sender(self, hello: bytes, peer: str) -> PayloadSender:
        self.num_senders += 1
        return await super().sender(hello, peer)


def watched() -> Watched:
    return Watched(num_slots=4, slot_bytes=128 * 1024)


async def test_a_plane_keeps_nothing_for_those_without_a_ticket() -> None:
    async with wired_prefill(watched) as prefill:
        plane, source = prefill.plane, prefill.source()
        assert isinstance(plane, Watched)
        ticket = prefill.side.open(NUM_TOKENS)
        good = order_of(ticket, epoch=2)
        await Reader().read(source, good)
        assert plane.num_senders == 1
        for match, changes in (
            ("UNKNOWN_TICKET", {"ticket": TicketId(b"?" * 16)}),
            ("meant for incarnation 9", {"incarnation": 9}),
            ("STALE_EPOCH", {"epoch": 1}),
        ):
            with pytest.raises(SourceRefused, match=match):
                await Reader().read(source, _changed(good, **changes))
        assert plane.num_senders == 1
        assert prefill.open_pulls() == 0
        await source.close()


def _changed(order: PullOrder, **changes: object) -> PullOrder:
    values = {name: getattr(order, name) for name in ("ticket", "epoch", "incarnation", "box", "codec", "digest")}
    return PullOrder(**{**values, **changes})  # type: ignore[arg-type]


async def test_a_rank_that_hears_late_of_a_ticket_serves_its_reader_by_a_plane() -> None:
    async with wired_prefill(small_shm) as prefill:
        prefill.side.service._leads = False
        source, told = prefill.source(), b"late" * 4
        box = KvBox(layer_start=0, layer_end=4, head_start=0, head_end=2, token_start=0, token_end=NUM_TOKENS)
        reader = Reader()
        order = PullOrder(ticket=TicketId(told), epoch=1, incarnation=1, box=box, pieces_only=True)
        reading = asyncio.create_task(reader.read(source, order))
        while prefill.server.counters()["tcp_connections"] == 0:
            await asyncio.sleep(0.001)
        prefill.side.exports.open(TicketId(told), prefill.side.blocks_of(NUM_TOKENS), NUM_TOKENS, time.monotonic())
        prefill.side.exports.advance(TicketId(told), NUM_TOKENS)
        await reading
        assert sum(box.num_tokens for box in reader.boxes if box.layer_start == 0) >= NUM_TOKENS
        await source.close()
