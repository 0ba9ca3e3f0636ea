"""How fast KV moves between two processes over gRPC, and what a running decode feels of it.

    python bench/handoff.py [--part speed|decode] [--megabytes 256] [--rounds 7] [--json FILE] [--check]

Speed: payload GB/s of the whole handoff (KV already computed; pack, digest, transfer, check, unpack and Release
included) beside a bare gRPC stream of equal messages whose receiver drops the bytes, and a bare TCP socket. They
alternate; the first round warms up and is not counted. The two ends of a handoff tune malloc in their processes, which
speeds any gRPC stream up there. The goal compares with a bare stream in those same processes; one between two processes
with malloc as it comes is printed beside it.

Decode: SmolLM2 decodes on one thread while its process pulls; a gap is the time from the end of one step to the end of
the next. The goal compares the longest gap under pulls with the median of the same run without one.
"""

import argparse
import asyncio
import itertools
import json
import os
import socket
import statistics
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace

import grpc
import grpc.aio
import numpy as np
import report

from biphase.kernels.kv_layout import KvLayout
from biphase.kernels.kv_pack import CpuKvMemory
from biphase.kvtransfer.exports import ExportEnded, ExportTable
from biphase.kvtransfer.frames import HEADER_BYTES
from biphase.kvtransfer.grpc_server import GrpcKvServer
from biphase.kvtransfer.pieces import split
from biphase.kvtransfer.puller import KvPuller, PullResult
from biphase.kvtransfer.service import KvService
from biphase.kvtransfer.signature import MAX_FRAME_BYTES, KvSignatureValue
from biphase.protos.grpc_setup import bind, channel_options, server_options
from biphase.protos.ids import BlockId, Incarnation, InstanceName, SeqId, TicketId
from biphase.protos.values import KvTicket, Sampling

LAYOUT = KvLayout(num_layers=30, num_kv_heads=3, head_dim=64, block_size=32)
"""SmolLM2-135M's."""

SERVICE = "biphase.bench.Source"
DECODE_SEQS = 4
DECODE_CONTEXT = 256


def signature(name: str, frame_bytes: int = MAX_FRAME_BYTES) -> KvSignatureValue:
    value = KvSignatureValue.of(LAYOUT, instance=name, incarnation=1, model_hash=b"bench" * 3, rope="theta 1e5")
    return replace(value, max_message_bytes=frame_bytes)


def num_tokens_of(megabytes: int) -> int:
    """Tokens, in whole blocks, whose KV has at least that many MB."""
    return -(-megabytes * 10**6 // LAYOUT.block_bytes) * LAYOUT.block_size


def pieces_of(num_tokens: int, frame_bytes: int) -> list[int]:
    """Bytes of the frames of one handoff."""
    whole = LAYOUT.box(num_tokens)
    pieces = split(LAYOUT, whole, frame_bytes - HEADER_BYTES)
    return [HEADER_BYTES + piece.num_bytes(LAYOUT) for piece in pieces]


class Endless:
    """A block pool for a source whose blocks are never reused."""

    def hold(self, blocks: Sequence[BlockId]) -> None:
        pass

    def release(self, blocks: Sequence[BlockId]) -> None:
        pass


# The source: a process of its own.

_servers: list[GrpcKvServer] = []
"""Kept for as long as the process lives."""


async def serve_kv(num_tokens: int, frame_bytes: int) -> tuple[ExportTable, list[BlockId], int]:
    """A KV endpoint over random KV: its table, one request's blocks and the port."""
    num_blocks = LAYOUT.blocks_for(num_tokens)
    pool = np.random.default_rng(1).standard_normal(LAYOUT.pool_shape(num_blocks), dtype=np.float32)
    blocks = [BlockId(int(block)) for block in np.random.default_rng(2).permutation(num_blocks)]
    exports = ExportTable(Endless(), lease_s=3600.0)

    def on_ended(end: ExportEnded) -> None:
        pass

    kv_signature = signature("prefill-bench", frame_bytes)
    service = KvService(exports=exports, memory=CpuKvMemory(pool, LAYOUT), signature=kv_signature, on_ended=on_ended)
    service.start()
    server = GrpcKvServer(service)
    kv_port = await server.start("127.0.0.1", 0)
    _servers.append(server)
    return exports, blocks, kv_port


async def source(num_tokens: int, frame_bytes: int, with_kv: bool) -> None:
    """Serve a bare gRPC stream, a bare socket and, if asked to, KV until killed."""
    exports, blocks, kv_port = await serve_kv(num_tokens, frame_bytes) if with_kv else (None, [], 0)
    sizes = pieces_of(num_tokens, frame_bytes)
    longest = memoryview(os.urandom(max(sizes)))
    messages = {size: bytes(longest[:size]) for size in set(sizes)}

    async def ticket(_request: bytes, _context: grpc.aio.ServicerContext) -> bytes:
        assert exports is not None
        now_s, fresh = time.monotonic(), TicketId(os.urandom(16))
        exports.open(fresh, blocks, num_tokens, now_s)
        exports.finish(fresh, 1, now_s)
        return fresh

    async def stream(_request: bytes, context: grpc.aio.ServicerContext) -> None:
        for size in sizes:
            await context.write(messages[size])

    handlers = {
        "Ticket": grpc.unary_unary_rpc_method_handler(ticket),
        "Stream": grpc.unary_stream_rpc_method_handler(stream),
    }
    bare = grpc.aio.server(options=server_options())
    bare.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    bare_port = bind(bare, "127.0.0.1", 0)
    await bare.start()
    listener = socket.create_server(("127.0.0.1", 0))

    def serve_socket() -> None:
        while True:
            connection, _ = listener.accept()
            with connection:
                for size in sizes:
                    connection.sendall(messages[size])

    threading.Thread(target=serve_socket, daemon=True).start()
    print(json.dumps({"kv": kv_port, "bare": bare_port, "tcp": listener.getsockname()[1]}), flush=True)
    await asyncio.Event().wait()


class SourceProcess:
    """The other process as this one sees it."""

    def __init__(self, ports: dict[str, int], num_tokens: int, frame_bytes: int) -> None:
        self._ports = ports
        self._num_tokens = num_tokens
        self._frames = pieces_of(num_tokens, frame_bytes)
        self._channel = grpc.aio.insecure_channel(f"127.0.0.1:{ports['bare']}", options=channel_options(bulk=True))

    async def ticket(self) -> KvTicket:
        """A ticket over KV that is computed."""
        return KvTicket(
            id=TicketId(await self._channel.unary_unary(f"/{SERVICE}/Ticket")(b"")),
            kv_address=f"127.0.0.1:{self._ports['kv']}",
            instance=InstanceName("prefill-bench"),
            incarnation=Incarnation(1),
            num_tokens=self._num_tokens,
        )

    async def bare_stream(self) -> float:
        """Bytes per ns, that is GB/s, of a gRPC stream whose bytes are dropped."""
        began_s, num_bytes = time.perf_counter(), 0
        call = self._channel.unary_stream(f"/{SERVICE}/Stream")(b"")
        while (message := await call.read()) is not grpc.aio.EOF:
            num_bytes += len(message)
        return self._rate(num_bytes, began_s)

    def bare_tcp(self) -> float:
        """GB/s of a socket read into one buffer."""
        buffer = bytearray(max(self._frames))
        began_s, num_bytes = time.perf_counter(), 0
        with socket.create_connection(("127.0.0.1", self._ports["tcp"])) as connection:
            while count := connection.recv_into(buffer):
                num_bytes += count
        return self._rate(num_bytes, began_s)

    async def close(self) -> None:
        await self._channel.close()

    def _rate(self, num_bytes: int, began_s: float) -> float:
        if num_bytes != sum(self._frames):
            raise RuntimeError(f"{num_bytes} bytes came, {sum(self._frames)} were sent")
        return num_bytes / (time.perf_counter() - began_s) / 1e9


@asynccontextmanager
async def running_source(num_tokens: int, frame_bytes: int, with_kv: bool = True) -> AsyncIterator[SourceProcess]:
    arguments = [sys.executable, __file__, "--source", str(num_tokens), str(frame_bytes), str(int(with_kv))]
    process = await asyncio.create_subprocess_exec(*arguments, stdout=asyncio.subprocess.PIPE)
    assert process.stdout is not None
    try:
        ports = json.loads(await process.stdout.readline())
        there = SourceProcess(ports, num_tokens, frame_bytes)
        yield there
        await there.close()
    finally:
        process.kill()
        await process.wait()


async def untuned(num_tokens: int, frame_bytes: int) -> None:
    """In a process without KV: one bare stream from another such process per line of input, its GB/s per line out."""
    async with running_source(num_tokens, frame_bytes, with_kv=False) as there:
        while await asyncio.to_thread(sys.stdin.readline):
            print(await there.bare_stream(), flush=True)


@asynccontextmanager
async def running_untuned(num_tokens: int, frame_bytes: int) -> AsyncIterator[Callable[[], Awaitable[float]]]:
    arguments = [sys.executable, __file__, "--untuned", str(num_tokens), str(frame_bytes)]
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*arguments, stdin=pipe, stdout=pipe)
    assert process.stdin is not None and process.stdout is not None
    into, out_of = process.stdin, process.stdout

    async def measure() -> float:
        into.write(b"\n")
        return float(await out_of.readline())

    try:
        yield measure
    finally:
        into.close()
        await process.wait()


# Part one: speed.

UNTUNED = "bare gRPC stream, malloc as it comes"


async def measure_speed(result: report.Report, num_tokens: int, rounds: int, frame_bytes: int) -> None:
    num_blocks = LAYOUT.blocks_for(num_tokens)
    pool = np.zeros(LAYOUT.pool_shape(num_blocks), dtype=np.float32)
    blocks = [BlockId(int(block)) for block in np.random.default_rng(3).permutation(num_blocks)]
    puller = KvPuller(memory=CpuKvMemory(pool, LAYOUT), signature=signature("decode-bench"))
    rates: dict[str, list[float]] = {"handoff": [], "bare gRPC stream": [], UNTUNED: [], "bare TCP socket": []}
    async with (
        running_source(num_tokens, frame_bytes) as there,
        running_untuned(num_tokens, frame_bytes) as bare_untuned,
    ):
        for _ in range(rounds):
            ticket = await there.ticket()
            began_s = time.perf_counter()
            pulled = await puller.pull(ticket, 1, blocks, timeout_s=60.0)
            rates["handoff"].append(pulled.bytes / (time.perf_counter() - began_s) / 1e9)
            rates["bare gRPC stream"].append(await there.bare_stream())
            rates[UNTUNED].append(await bare_untuned())
            rates["bare TCP socket"].append(there.bare_tcp())
        await puller.close()
    counted = {name: values[1:] for name, values in rates.items()}
    medians = {name: statistics.median(values) for name, values in counted.items()}
    for name, values in counted.items():
        share = medians[name] / medians["bare gRPC stream"]
        result.row(f"{name}, GB/s", medians[name], min(values), max(values), f"{share:.0%} of the bare gRPC stream")
    result.goal("handoff_of_bare_grpc", medians["handoff"] / medians["bare gRPC stream"], 0.7, at_least=True)
    result.extra["speed"] = {"rounds": rates, "tokens": num_tokens, "frame_bytes": frame_bytes}


# Part two: what a decode feels.


async def measure_decode(result: report.Report, num_tokens: int, rounds: int, frame_bytes: int) -> None:
    from biphase.engine.config import EngineConfig
    from biphase.engine.engine_thread import EngineThread
    from biphase.engine.step import SeqStep, StepPlan

    pull_blocks = LAYOUT.blocks_for(num_tokens)
    seq_blocks = LAYOUT.blocks_for(2048)
    config = EngineConfig(
        model="smollm2",
        block_size=LAYOUT.block_size,
        max_model_len=2048,
        num_kv_blocks=pull_blocks + DECODE_SEQS * seq_blocks,
        threads=1,
    )
    thread = EngineThread(config)
    engine = await thread.load(lambda _detail, _done: None)
    tables = [[BlockId(pull_blocks + seq * seq_blocks + at) for at in range(seq_blocks)] for seq in range(DECODE_SEQS)]
    greedy = Sampling(max_tokens=1 << 20, ignore_eos=True)

    def plan(start: int, token_ids: Sequence[Sequence[int]]) -> StepPlan:
        return StepPlan(
            seqs=tuple(
                SeqStep(
                    seq_id=SeqId(seq), token_ids=tuple(ids), start=start, blocks=tuple(tables[seq]), sampling=greedy
                )
                for seq, ids in enumerate(token_ids)
            )
        )

    context = DECODE_CONTEXT
    prompts = [[100 + seq + at % 1000 for at in range(context)] for seq in range(DECODE_SEQS)]
    tokens = (await thread.run(plan(0, prompts))).tokens
    ends: list[tuple[float, bool]] = []
    puller = KvPuller(memory=engine.kv_memory, signature=signature("decode-bench"), decoding=lambda: True)
    pulling: asyncio.Task[PullResult] | None = None
    pulled: list[PullResult] = []

    async def steps(count: int) -> None:
        """``count`` steps, or without a count for as long as the pull runs."""
        nonlocal context, tokens
        done = 0
        while done < count or (pulling is not None and not pulling.done()):
            tokens = (await thread.run(plan(context, [[int(token or 0)] for token in tokens]))).tokens
            context = context + 1 if context < 2000 else DECODE_CONTEXT
            ends.append((time.perf_counter(), pulling is not None))
            done += 1

    blocks = [BlockId(block) for block in range(pull_blocks)]
    async with running_source(num_tokens, frame_bytes) as there:
        for _ in range(rounds):
            await steps(20)
            ticket = await there.ticket()
            pulling = asyncio.create_task(puller.pull(ticket, 1, blocks, timeout_s=60.0))
            await steps(0)
            pulled.append(await pulling)
            await steps(1)
            pulling = None
        await puller.close()
    await thread.close()
    ends = ends[20:]  # the first steps warm up
    gaps = [((after - before) * 1e3, during) for (before, _), (after, during) in itertools.pairwise(ends)]
    alone = [gap for gap, during in gaps if not during]
    under = [gap for gap, during in gaps if during]
    median = statistics.median(alone)
    rate = statistics.median(result.bytes / result.ms / 1e6 for result in pulled)
    result.row("decode gap alone, ms", median, min(alone), max(alone), f"{DECODE_SEQS} requests, 1 thread")
    note = f"{rounds} pulls of {pulled[0].bytes / 1e6:.0f} MB at {rate:.2f} GB/s, {len(under)} steps"
    result.row("decode gap under pull, ms", statistics.median(under), min(under), max(under), note)
    result.goal("decode_gap_max_of_median", max(under) / median, 3.0)
    result.extra["decode"] = {"alone_ms": alone, "under_pull_ms": under, "pull_ms": [each.ms for each in pulled]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=["speed", "decode"], help="only this part")
    parser.add_argument("--megabytes", type=int, default=256, help="payload of one handoff (default 256)")
    parser.add_argument("--rounds", type=int, default=9, help="rounds, of which speed drops the first (default 9)")
    parser.add_argument("--frame-bytes", type=int, default=MAX_FRAME_BYTES, help="largest message")
    parser.add_argument("--source", nargs=3, type=int, metavar="N", help=argparse.SUPPRESS)
    parser.add_argument("--untuned", nargs=2, type=int, metavar="N", help=argparse.SUPPRESS)
    report.add_arguments(parser)
    arguments = parser.parse_args()
    if arguments.source:
        asyncio.run(source(*arguments.source))
        return 0
    if arguments.untuned:
        asyncio.run(untuned(*arguments.untuned))
        return 0
    if arguments.rounds < 2 or arguments.megabytes < 1:
        parser.error("there must be at least 2 rounds of at least 1 MB")
    result = report.Report("handoff", ["what", "median", "least", "most", "note"])
    num_tokens = num_tokens_of(arguments.megabytes)
    if arguments.part != "decode":
        asyncio.run(measure_speed(result, num_tokens, arguments.rounds, arguments.frame_bytes))
    if arguments.part != "speed":
        asyncio.run(measure_decode(result, num_tokens, arguments.rounds, arguments.frame_bytes))
    return result.finish(arguments)


if __name__ == "__main__":
    report.run(main)
