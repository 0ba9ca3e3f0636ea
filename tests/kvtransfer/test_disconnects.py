"""Wires that are broken in the midst of a pull, as drills break them: what the reading end makes of it."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from support.kv import BLOCKS, LAYOUT, NUM_BLOCKS, PrefillSide, make_signature, tokens_of
from support.kv_wires import Reader, order_of, small_shm, wired_prefill

from biphase.kernels.kv_pack import CpuKvMemory
from biphase.kvtransfer import frames
from biphase.kvtransfer.faults import FaultInjector, FaultPlan
from biphase.kvtransfer.grpc_transport import GrpcTransport
from biphase.kvtransfer.puller import KvPuller
from biphase.kvtransfer.signature import RankEndpoint
from biphase.kvtransfer.tcp import server as tcp_server
from biphase.kvtransfer.tcp.source import TcpTransport
from biphase.kvtransfer.wire import PullOrder, Source, SourceUnreachable
from biphase.protos.errors import HandoffFailed

WIRES = ("grpc", "tcp", "shm")
NUM_TOKENS = 100


@dataclass
class Wired:
    side: PrefillSide
    injector: FaultInjector
    source: Source
    tcp_address: str


@dataclass
class Chosen:
    name: str
    reason: str = "it is tested"


@asynccontextmanager
async def wired(wire: str, spec: str) -> AsyncIterator[Wired]:
    injector = FaultInjector(FaultPlan.parse(spec))
    async with wired_prefill(small_shm if wire == "shm" else None) as prefill:
        prefill.side.service._wrap_sink = injector.wrap
        source: Source = GrpcTransport().open(prefill.side.address) if wire == "grpc" else prefill.source()
        try:
            yield Wired(prefill.side, injector, source, prefill.address)
        finally:
            await source.close()


async def read(wired: Wired, reader: Any) -> str:
    """How a pull ended."""
    try:
        async with asyncio.timeout(5.0):
            await reader.read(wired.source, order_of(wired.side.open(NUM_TOKENS)))
    except SourceUnreachable as error:
        return str(error)
    return "whole"


class InPlace(Reader):
    """Reads pieces into blocks of the pool itself, as pulls over sockets do. ``torn``: pieces that broke off in there."""

    torn = 0

    async def take(self, arrival: Any, order: PullOrder) -> None:
        header = frames.parse_header(arrival.header, arrival.num_bytes)
        if header.kind is not frames.FrameKind.PIECE:
            await super().take(arrival, order)
            return
        parts = self.memory.parts(self.blocks, header.box)
        try:
            await arrival.read_into(parts)
        except SourceUnreachable:
            self.torn += 1
            raise
        frames.check_digest(header, order.ticket, parts)
        self.boxes.append(header.box)


@pytest.mark.parametrize("wire", WIRES)
async def test_a_broken_wire_is_the_end_of_its_pull_and_no_answer(wire: str, monkeypatch: pytest.MonkeyPatch) -> None:
    num_made = 0
    made = tcp_server.Served.__init__

    def count(*args: Any, **kwargs: Any) -> None:
        nonlocal num_made
        num_made += 1
        made(*args, **kwargs)

    monkeypatch.setattr(tcp_server.Served, "__init__", count)
    async with wired(wire, "disconnect=0.2,seed=1") as ends:
        found = Counter([await read(ends, Reader()) for _ in range(40)])
        struck = ends.injector.counts["disconnect"]
        assert struck >= 10 and found.pop("whole") == 40 - struck > 0
        if wire != "grpc":  # which cannot but say that a call has ended
            assert not any("on purpose" in reason for reason in found)
            assert struck <= num_made <= struck + 1  # a pull after a broken one has connected anew
        ends.injector.plan = FaultPlan()
        assert await read(ends, Reader()) == "whole"
        assert not ends.side.exports.counters()["running_sends"]


async def test_it_breaks_in_mid_frame_within_the_pools_own_memory() -> None:
    async with wired("tcp", "disconnect=0.3,seed=2") as ends:
        torn = whole = 0
        for _ in range(40):
            reader = InPlace()
            whole += await read(ends, reader) == "whole"
            torn += reader.torn
            content, sent = reader.content(NUM_TOKENS), ends.side.content(NUM_TOKENS)
            written = ~np.isnan(content)
            assert np.count_nonzero(content[written] != sent[written]) <= 1  # the one that was torn in two
        assert torn >= 10 and whole >= 5


@pytest.mark.parametrize(("wire", "other"), [("grpc", "tcp"), ("tcp", "grpc"), ("shm", "tcp")])
async def test_a_pull_goes_on_by_another_wire_from_where_it_broke(wire: str, other: str) -> None:
    async with wired(wire, "disconnect=0.06,seed=3") as ends:
        endpoint = RankEndpoint(grpc=ends.side.address, tcp=ends.tcp_address, transports=WIRES)
        ends.side.service.signature = replace(ends.side.signature, ranks=(endpoint,))
        fell_back = failed = 0
        for _ in range(30):
            pool = np.full(LAYOUT.pool_shape(NUM_BLOCKS), np.nan, dtype=np.float32)
            plane = small_shm()
            puller = KvPuller(
                memory=CpuKvMemory(pool, LAYOUT),
                signature=make_signature("decode-0"),
                transports=[GrpcTransport(), TcpTransport(), TcpTransport(plane)],
                choose=lambda _ours, _theirs: [Chosen(wire), Chosen(other)],
            )
            try:
                async with asyncio.timeout(5.0):
                    await puller.pull(ends.side.open(NUM_TOKENS), 1, BLOCKS, timeout_s=5.0)
                fell_back += puller.counters()["fallbacks"]
                assert np.array_equal(tokens_of(pool, BLOCKS, NUM_TOKENS), ends.side.content(NUM_TOKENS))
            except HandoffFailed:
                failed += 1  # both were broken
            await puller.close()
            await plane.close()
        assert fell_back >= 4 and failed <= 20
