"""The processes of a handoff bench: ranks of a source, and ranks of a reader other than its rank 0.

A process is told what to do by msgpack maps on its standard input, and answers each on its standard output.
"""

import asyncio
import contextlib
import os
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import handoff_bare as bare
import msgpack
import numpy as np

from biphase.kernels.kv_layout import KvLayout
from biphase.kernels.kv_pack import CpuKvMemory
from biphase.kvtransfer.exports import ExportTable
from biphase.kvtransfer.frames import FrameKind
from biphase.kvtransfer.grpc_server import GrpcKvServer
from biphase.kvtransfer.grpc_transport import GrpcTransport
from biphase.kvtransfer.pull_job import PartsPulled, PullJob
from biphase.kvtransfer.rank_memory import RankMemory
from biphase.kvtransfer.rank_pull import RankPuller
from biphase.kvtransfer.service import KvService
from biphase.kvtransfer.shm.plane import ShmPlane
from biphase.kvtransfer.signature import BYTES_DIGEST, HEADER_DIGEST, KvSignatureValue, RankEndpoint
from biphase.kvtransfer.tcp.server import TcpKvServer
from biphase.kvtransfer.tcp.source import TcpTransport
from biphase.kvtransfer.wire import DataPlane, FrameSink, Room, Transport
from biphase.protos.ids import BlockId, TicketId
from biphase.protos.parallel_plan import ParallelPlan

LLAMA = KvLayout(num_layers=32, num_kv_heads=8, head_dim=128, block_size=32, dtype="float16")
"""Llama-3.1-8B's, in 16 bits: its heads go round on four ranks."""

SMOLLM2 = KvLayout(num_layers=30, num_kv_heads=3, head_dim=64, block_size=32)
LAYOUTS = {"llama": LLAMA, "smollm2": SMOLLM2}

HOST = "127.0.0.1"
_KIND_AT = 4  # of a frame's header


def signature(
    name: str, layout: KvLayout, plan: ParallelPlan, ranks: Sequence[RankEndpoint] = (), digests: bool = True
) -> KvSignatureValue:
    value = KvSignatureValue.of(
        layout, instance=name, incarnation=1, model_hash=b"bench" * 3, rope="theta 5e5", plan=plan, ranks=tuple(ranks)
    )
    return replace(value, digests=(BYTES_DIGEST,) if digests else (HEADER_DIGEST,))


def tokens_of(layout: KvLayout, megabytes: float) -> int:
    return -(-int(megabytes * 1e6) // layout.token_bytes)


def rank_pool(
    layout: KvLayout, plan: ParallelPlan, rank: int, num_blocks: int, *, full: bool
) -> tuple[np.ndarray[Any, Any], RankMemory]:
    layers, heads = plan.layers_of(rank, layout.num_layers), plan.kv_heads_of(rank, layout.num_kv_heads)
    local = replace(layout, num_layers=len(layers), num_kv_heads=len(heads))
    dtype = np.dtype(f"u{layout.itemsize}")
    shape = local.pool_shape(num_blocks)
    if full:
        pool = np.random.default_rng(rank).integers(0, np.iinfo(dtype).max, shape, dtype=dtype)
    else:
        pool = np.ones(shape, dtype=dtype)  # its pages are there
    return pool, RankMemory(CpuKvMemory(pool, local), layout, plan, rank)


def scrambled(layout: KvLayout, num_tokens: int, num_blocks: int, seed: int) -> list[BlockId]:
    order = np.random.default_rng(seed).permutation(num_blocks)[: layout.blocks_for(num_tokens)]
    return [BlockId(int(block)) for block in order]


def plane_of(name: str) -> DataPlane:
    """Raises ImportError or ConnectionError for one that is not to be had."""
    if name == "shm":
        return ShmPlane()
    if name == "dist":
        from biphase.kvtransfer.pair_groups.plane import DistPlane

        return DistPlane(HOST)
    from biphase.kvtransfer.nixl.plane import NixlPlane

    return NixlPlane(HOST)


def transport_of(name: str, planes: dict[str, DataPlane]) -> Transport:
    if name == "grpc":
        return GrpcTransport()
    return TcpTransport(planes[name] if name != "tcp" else None)


@dataclass(frozen=True)
class Choice:
    """What a puller is to use."""

    name: str
    reason: str = "the bench says so"


class Posted:
    """What a source has sent since it was last asked: when the first piece was begun, and how large the frames were."""

    def __init__(self) -> None:
        self.began_s = 0.0
        self.sizes: list[int] = []

    def begin(self) -> None:
        if not self.began_s:
            self.began_s = time.monotonic()

    def take(self) -> dict[str, Any]:
        told = {"began_s": self.began_s, "sizes": self.sizes}
        self.began_s, self.sizes = 0.0, []
        return told


class NotingSink:
    """A sink that notes what passes."""

    def __init__(self, sink: FrameSink, posted: Posted) -> None:
        self._sink, self._posted = sink, posted
        self.gathers = sink.gathers
        self.piece_bytes = sink.piece_bytes
        self.abort = sink.abort
        self.close = sink.close

    async def room(self, num_bytes: int) -> Room:
        self._posted.begin()
        return await self._sink.room(num_bytes)

    async def send(self, header: bytes, payload: Room | Sequence[memoryview] | bytes) -> None:
        if header[_KIND_AT] == FrameKind.PIECE:
            self._posted.begin()
            parts = payload if isinstance(payload, Sequence) and not isinstance(payload, bytes) else [payload]
            self._posted.sizes.append(len(header) + sum(len(getattr(part, "payload", part)) for part in parts))
        await self._sink.send(header, payload)


class NotingTransport:
    """A transport that notes when a reader had done with the last piece: it asks for the next frame, and gets the trailer."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self.name = transport.name
        self.completed_s = 0.0

    def open(self, address: str) -> Any:
        source = self._transport.open(address)
        pull = source.pull
        source.pull = lambda order: self._noted(pull(order))  # type: ignore[method-assign]
        return source

    def _noted(self, stream: Any) -> "NotingStream":
        return NotingStream(stream, self)

    async def close(self) -> None:
        await self._transport.close()


class NotingStream:
    def __init__(self, stream: Any, transport: NotingTransport) -> None:
        self._stream, self._transport = stream, transport
        self.break_off = stream.break_off

    def __aiter__(self) -> "NotingStream":
        return self

    async def __anext__(self) -> Any:
        asked_s = time.monotonic()
        arrival = await self._stream.__anext__()
        if arrival.header[_KIND_AT] == FrameKind.TRAILER:
            self._transport.completed_s = asked_s
        return arrival


class Endless:
    """A block pool for a source whose blocks are never reused."""

    def hold(self, blocks: Sequence[BlockId]) -> None:
        pass

    def release(self, blocks: Sequence[BlockId]) -> None:
        pass


# The other end of a child's pipes.


class Child:
    """A process of the bench, as its parent sees it."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def ask(self, **message: Any) -> Any:
        assert self._process.stdin is not None
        data = msgpack.packb(message)
        self._process.stdin.write(len(data).to_bytes(4, "little") + data)
        return await self.told()

    async def told(self) -> Any:
        assert self._process.stdout is not None
        size = int.from_bytes(await self._process.stdout.readexactly(4), "little")
        return msgpack.unpackb(await self._process.stdout.readexactly(size))


@contextlib.asynccontextmanager
async def child(*, pass_fds: Sequence[int] = (), **arguments: Any) -> AsyncIterator[Child]:
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(Path(__file__)), msgpack.packb(arguments).hex(), stdin=pipe, stdout=pipe, pass_fds=pass_fds
    )
    try:
        yield Child(process)
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


# In the child.


class SourceRank:
    """One rank of a prefill instance whose KV is all there, and the sending ends of the bare arms."""

    def __init__(
        self, layout: str, plan: list[int], rank: int, num_blocks: int, planes: list[str], ring: list[int]
    ) -> None:
        self.layout = LAYOUTS[layout]
        self.plan, self.rank = ParallelPlan(tp=plan[0], pp=plan[1]), rank
        self.num_blocks = num_blocks
        self._plane_names = planes
        self._ring = bare.Ring(*ring) if ring else None
        self._gloo: bare.Gloo | None = None
        self._posted = Posted()

    async def start(self) -> dict[str, Any]:
        self._pool, memory = rank_pool(self.layout, self.plan, self.rank, self.num_blocks, full=True)
        self._exports = ExportTable(Endless(), lease_s=3600.0)
        offered = replace(signature("prefill-bench", self.layout, self.plan), digests=(BYTES_DIGEST, HEADER_DIGEST))
        self._service = KvService(
            exports=self._exports,
            memory=memory,
            signature=offered,
            on_ended=lambda ended: None,
            wrap_sink=lambda sink: NotingSink(sink, self._posted),
        )
        self._service.start()
        self._planes = [plane_of(name) for name in self._plane_names]
        self._servers = GrpcKvServer(self._service), TcpKvServer(self._service, self._planes)
        grpc, tcp = [await server.start(HOST, 0) for server in self._servers]
        self._data = self._pool.reshape(-1).view(np.uint8)
        self._listener = socket.create_server((HOST, 0))
        self._slots = self._ring.mapped() if self._ring is not None else None
        bare_grpc = await self._start_bare_grpc()
        return {
            "endpoint": asdict(RankEndpoint(grpc=f"{HOST}:{grpc}", tcp=f"{HOST}:{tcp}")),
            "bare_tcp": self._listener.getsockname()[1],
            "bare_grpc": bare_grpc,
        }

    async def _start_bare_grpc(self) -> int:
        import grpc
        import grpc.aio

        from biphase.protos.grpc_setup import bind, server_options

        self._messages: dict[int, bytes] = {}
        self._sizes: list[int] = []

        async def stream(_request: bytes, context: grpc.aio.ServicerContext) -> None:
            self._posted.begin()
            for size in self._sizes:
                await context.write(self._messages[size])

        handlers = {"Stream": grpc.unary_stream_rpc_method_handler(stream)}
        self._bare_grpc = grpc.aio.server(options=server_options())
        self._bare_grpc.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("biphase.bench", handlers),))
        port = bind(self._bare_grpc, HOST, 0)
        await self._bare_grpc.start()
        return int(port)

    async def answer(self, message: dict[str, Any]) -> Any:
        match message["do"]:
            case "endpoints":
                ranks = tuple(
                    RankEndpoint(**{**each, "transports": tuple(each["transports"])}) for each in message["endpoints"]
                )
                self._service.signature = replace(self._service.signature, ranks=ranks)
            case "ticket":
                now_s, num_tokens = time.monotonic(), message["tokens"]
                blocks = scrambled(self.layout, num_tokens, self.num_blocks, 2)
                self._exports.open(TicketId(message["ticket"]), blocks, num_tokens, now_s)
                self._exports.finish(TicketId(message["ticket"]), 1, now_s)
            case "end":
                self._exports.revoke(TicketId(message["ticket"]), time.monotonic())
            case "cpu":
                return time.process_time()
            case "posted":
                return self._posted.take()
            case "bare":
                self._sizes = message["sizes"]
                self._messages = {size: self._data[:size].tobytes() for size in set(self._sizes)}
                self._start(message["arm"], message.get("port", 0))
        return None

    def _start(self, arm: str, port: int) -> None:
        if arm != "grpc":
            threading.Thread(target=self._send_bare, args=(arm, self._sizes, port), daemon=True).start()

    def _send_bare(self, arm: str, sizes: list[int], port: int) -> None:
        begin = self._posted.begin
        if arm == "tcp":
            bare.send_tcp(self._listener, sizes, memoryview(self._data), begin)
        elif arm == "ring":
            assert self._ring is not None
            assert self._slots is not None
            bare.send_ring(self._ring, self._slots, sizes, self._data, begin)
        else:
            if self._gloo is None:
                self._gloo = bare.Gloo(0, port)
            self._gloo.send(sizes, self._data, begin)


class ReaderRank:
    """A rank of a decode instance that is not rank 0."""

    def __init__(self, layout: str, plan: list[int], rank: int, num_blocks: int, planes: list[str]) -> None:
        self._layout, self._plan = LAYOUTS[layout], ParallelPlan(tp=plan[0], pp=plan[1])
        self._rank, self._num_blocks, self._plane_names = rank, num_blocks, planes

    async def start(self) -> dict[str, Any]:
        self._pool, memory = rank_pool(self._layout, self._plan, self._rank, self._num_blocks, full=False)
        planes = {name: plane_of(name) for name in self._plane_names}
        transports = [transport_of(name, planes) for name in ("grpc", "tcp", *planes)]
        self._puller = RankPuller(memory, transports)
        return {}

    async def answer(self, message: dict[str, Any]) -> Any:
        if message["do"] == "cpu":
            return time.process_time()
        pulled = await self._puller.pull(PullJob.from_message(message["job"]))
        return {**asdict(pulled), "trailer": None}


async def run_child(arguments: dict[str, Any]) -> None:
    end: SourceRank | ReaderRank
    end = SourceRank(**arguments["source"]) if "source" in arguments else ReaderRank(**arguments["reader"])
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    out = os.dup(1)
    os.dup2(2, 1)  # what others print must not come between

    def tell(value: Any) -> None:
        data = msgpack.packb(value)
        os.write(out, len(data).to_bytes(4, "little") + data)

    tell(await end.start())
    while True:
        try:
            size = int.from_bytes(await reader.readexactly(4), "little")
        except asyncio.IncompleteReadError:
            return
        tell(await end.answer(msgpack.unpackb(await reader.readexactly(size))))


class Followers:
    """The other ranks of the reader, for its puller."""

    def __init__(self, children: dict[int, Child]) -> None:
        self._children = children

    async def pull(self, rank: int, job: PullJob) -> PartsPulled:
        return PartsPulled(**await self._children[rank].ask(do="pull", job=job.to_message()))


if __name__ == "__main__":
    asyncio.run(run_child(msgpack.unpackb(bytes.fromhex(sys.argv[1]))))
