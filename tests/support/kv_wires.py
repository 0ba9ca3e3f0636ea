"""A prefill side behind the tcp wire, with or without a data plane, and a reader that is no puller."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from biphase.kernels.kv_layout import KvBox
from biphase.kernels.kv_pack import CpuKvMemory
from biphase.kvtransfer import frames
from biphase.kvtransfer.frames import FrameKind, Trailer
from biphase.kvtransfer.shm.plane import ShmPlane
from biphase.kvtransfer.tcp.server import TcpKvServer
from biphase.kvtransfer.tcp.source import TcpSource, TcpTransport
from biphase.kvtransfer.wire import DataPlane, PullOrder
from biphase.protos.values import KvTicket
from support.kv import FIRST_TOKEN, LAYOUT, NUM_BLOCKS, PrefillSide, prefill_side, tokens_of


@dataclass
class WiredPrefill:
    side: PrefillSide
    server: TcpKvServer
    plane: DataPlane | None
    address: str

    def source(self, plane: DataPlane | None = None) -> TcpSource:
        return TcpTransport(plane or self.plane).open(self.address)

    def open_pulls(self) -> int:
        return self.side.exports.counters()["open_pulls"]


@asynccontextmanager
async def wired_prefill(
    plane: Callable[[], DataPlane] | None = None,
    *,
    piece_s: float = 5.0,
    most_connections: int = 1024,
    **of_side: Any,
) -> AsyncIterator[WiredPrefill]:
    async with prefill_side(**of_side) as side:
        made = plane() if plane is not None else None
        planes = [made] if made is not None else []
        server = TcpKvServer(side.service, planes, piece_s=piece_s, most_connections=most_connections)
        port = await server.start("127.0.0.1", 0)
        try:
            yield WiredPrefill(side, server, made, f"127.0.0.1:{port}")
        finally:
            await server.stop()
            if made is not None:
                await made.close()


def small_shm(**arguments: Any) -> ShmPlane:
    return ShmPlane(**{"num_slots": 4, "slot_bytes": 128 * 1024, **arguments})


def order_of(ticket: KvTicket, *, epoch: int = 1, box: KvBox | None = None, pieces_only: bool = False) -> PullOrder:
    return PullOrder(
        ticket=ticket.id,
        epoch=epoch,
        incarnation=ticket.incarnation,
        box=box or LAYOUT.box(ticket.num_tokens),
        pieces_only=pieces_only,
    )


class Reader:
    """Takes frames into a pool of NaN, digests checked. ``leave``: the numbers of pieces whose payload is left."""

    def __init__(self, *, scatter: bool = False, leave: frozenset[int] = frozenset()) -> None:
        self.pool = np.full(LAYOUT.pool_shape(NUM_BLOCKS), np.nan, dtype=np.float32)
        self.memory = CpuKvMemory(self.pool, LAYOUT)
        self.blocks = list(range(NUM_BLOCKS))[::-1]
        self.boxes: list[KvBox] = []
        self.trailer: Trailer | None = None
        self.num_left = 0
        self._scatter = scatter
        self._leave = leave

    async def read(self, source: TcpSource, order: PullOrder) -> None:
        stream = source.pull(order)
        try:
            async for arrival in stream:
                await self.take(arrival, order)
        finally:
            stream.break_off("the reader has ended it")

    async def take(self, arrival: Any, order: PullOrder) -> None:
        header = frames.parse_header(arrival.header, arrival.num_bytes)
        if header.kind is FrameKind.PIECE and len(self.boxes) + self.num_left in self._leave:
            self.num_left += 1
            return
        if header.kind is FrameKind.PIECE and self._scatter:
            halves = memoryview(bytearray(arrival.num_bytes))
            at = arrival.num_bytes // 3
            parts: list[memoryview] = [halves[:at], halves[at : at + 1], halves[at + 1 :]]
            await arrival.read_into(parts)
            payload: Any = halves
        else:
            payload = await arrival.payload()
        if not arrival.intact():  # a pull that ends takes its slots with it
            return
        frames.check_digest(header, order.ticket, (payload,))
        if header.kind is FrameKind.TRAILER:
            self.trailer = frames.read_trailer(payload)
        elif header.kind is FrameKind.PIECE:
            self.memory.unpack(self.blocks, header.box, payload)
            if arrival.intact():
                self.boxes.append(header.box)

    def content(self, num_tokens: int) -> np.ndarray[Any, Any]:
        return tokens_of(self.pool, self.blocks, num_tokens)


async def check_pull(prefill: WiredPrefill, source: TcpSource, num_tokens: int, *, scatter: bool = False) -> None:
    """All of a request arrives, its first token with it, and it is released. Any number may run at a time."""
    ticket = prefill.side.open(num_tokens)
    reader = Reader(scatter=scatter)
    await reader.read(source, order_of(ticket))
    assert np.array_equal(reader.content(num_tokens), prefill.side.content(num_tokens))
    assert reader.trailer is not None
    assert reader.trailer.first_token == FIRST_TOKEN
    await source.release(ticket.id, 1, 1, 10.0)
    assert (await prefill.side.next_end()).outcome == "released"
