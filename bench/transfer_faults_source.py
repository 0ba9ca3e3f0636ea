"""The serving end of bench/transfer_faults.py, a process of its own: a rank's KvService behind one wire, with faults.

It is told what to do by lines of JSON on its standard input and answers each with a line: ``open`` a ticket over fresh
random KV, ``revoke`` one as a router does, switch faults on, ``settle``, tell what it holds (``state``).
"""

import asyncio
import gc
import json
import os
import resource
import sys
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import xxhash

from biphase.kernels.kv_layout import KvLayout
from biphase.kernels.kv_pack import CpuKvMemory
from biphase.kvtransfer.exports import ExportEnded, ExportTable
from biphase.kvtransfer.faults import FaultInjector, FaultPlan
from biphase.kvtransfer.grpc_server import GrpcKvServer
from biphase.kvtransfer.service import KvService
from biphase.kvtransfer.shm.host import host_id
from biphase.kvtransfer.shm.plane import ShmPlane
from biphase.kvtransfer.signature import KvSignatureValue, RankEndpoint
from biphase.kvtransfer.tcp.server import TcpKvServer
from biphase.kvtransfer.wire import DataPlane, FrameSink
from biphase.protos.ids import BlockId, TicketId

HOST = "127.0.0.1"
LAYOUT = KvLayout(num_layers=2, num_kv_heads=2, head_dim=32, block_size=16)
MOST_TOKENS = 256
"""256 KiB."""

MESSAGE_BYTES = 64 * 1024
_LEASE_S = 5.0
_SETTLE_S = 3.0


def make_plane(transport: str) -> DataPlane | None:
    if transport == "shm":
        return ShmPlane()
    if transport == "dist":
        from biphase.kvtransfer.pair_groups.plane import DistPlane

        return DistPlane(HOST)
    return None


def make_signature(name: str, ranks: tuple[RankEndpoint, ...] = ()) -> KvSignatureValue:
    made = KvSignatureValue.of(
        LAYOUT, instance=name, incarnation=1, model_hash=b"m" * 16, rope="theta=1e5", ranks=ranks
    )
    return KvSignatureValue(
        **{field: getattr(made, field) for field in made.__dataclass_fields__ if field != "max_message_bytes"},
        max_message_bytes=MESSAGE_BYTES,
    )


def held_by_process() -> dict[str, int]:
    """What a process may leak, beside what it counts itself. What only a cycle of references holds is no leak."""
    gc.collect()
    return {
        "fds": len(os.listdir("/proc/self/fd")),
        "tasks": len(asyncio.all_tasks()),
        "peak_kib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    }


class References:
    """How often each block is held."""

    def __init__(self) -> None:
        self.counts: Counter[BlockId] = Counter()

    def hold(self, blocks: Sequence[BlockId]) -> None:
        self.counts.update(blocks)

    def release(self, blocks: Sequence[BlockId]) -> None:
        self.counts.subtract(blocks)
        if min(self.counts.values()) < 0:
            raise RuntimeError(f"a block was released more often than held: {self.counts}")
        self.counts = +self.counts


class SmallPieces:
    """A sink that has larger pieces than messages gets such as fit into one: several to a transfer on every wire."""

    def __init__(self, sink: FrameSink) -> None:
        self.gathers = sink.gathers
        self.room, self.send, self.abort, self.close = sink.room, sink.send, sink.abort, sink.close

    def piece_bytes(self, message_bytes: int) -> int:
        return message_bytes


class Source:
    """The export table, its blocks and what is served of them."""

    def __init__(self, transport: str, plan: FaultPlan, num_blocks: int) -> None:
        self._transport = transport
        self._pool = np.zeros(LAYOUT.pool_shape(num_blocks), np.float32)
        self._memory = CpuKvMemory(self._pool, LAYOUT)
        self._free = list(range(num_blocks))
        self._blocks: dict[TicketId, list[BlockId]] = {}
        self._references = References()
        self._exports = ExportTable(self._references, _LEASE_S)
        self._random = np.random.default_rng(plan.seed)
        self._injector = FaultInjector(plan)
        self._faulty = False
        self._plane: DataPlane | None = None

    async def start(self) -> None:
        self._service = KvService(
            exports=self._exports,
            memory=self._memory,
            signature=make_signature("source"),
            on_ended=self._ended,
            wrap_sink=self._wrap,
        )
        self._service.start()
        self._grpc = GrpcKvServer(self._service)
        self.grpc_address = f"{HOST}:{await self._grpc.start(HOST, 0)}"
        self._plane = make_plane(self._transport)
        self._tcp = TcpKvServer(self._service, [self._plane] if self._plane is not None else [])
        tcp_address = f"{HOST}:{await self._tcp.start(HOST, 0)}"
        endpoint = RankEndpoint(
            grpc=self.grpc_address, tcp=tcp_address, host_id=host_id(), transports=("grpc", "tcp", "shm", "dist")
        )
        self._service.signature = make_signature("source", (endpoint,))

    async def stop(self) -> None:
        await self._tcp.stop()
        await self._grpc.stop()
        await self._service.stop()
        if self._plane is not None:
            await self._plane.close()

    async def answer(self, said: dict[str, Any]) -> dict[str, Any]:
        match said["do"]:
            case "open":
                return self._open(said["tokens"], said["late_s"])
            case "revoke":
                self._exports.revoke(TicketId(bytes.fromhex(said["id"])), time.monotonic())
            case "faults":
                self._faulty = said["on"]
            case "settle":
                until_s = time.monotonic() + _SETTLE_S
                while self._busy() and time.monotonic() < until_s:  # noqa: ASYNC110 - tables have no events
                    await asyncio.sleep(0.01)
        return self._state()

    def _wrap(self, sink: FrameSink) -> FrameSink:
        """Over the second route of a pull, too."""
        return self._injector.wrap(SmallPieces(sink)) if self._faulty else sink

    def _open(self, num_tokens: int, late_s: float) -> dict[str, Any]:
        """A ticket over content that never was before; computed, ``late_s``: half of it then and the rest so much later."""
        box = LAYOUT.box(num_tokens)
        count = LAYOUT.blocks_for(num_tokens)
        blocks = [BlockId(self._free.pop(int(self._random.integers(len(self._free))))) for _ in range(count)]
        self._pool[:, blocks] = self._random.standard_normal((*self._pool[:, blocks].shape,), dtype=np.float32)
        data = bytearray(box.num_bytes(LAYOUT))
        self._memory.pack(blocks, box, data)
        ticket, first = TicketId(os.urandom(16)), int(self._random.integers(1 << 31))
        self._blocks[ticket] = blocks
        self._exports.open(ticket, blocks, num_tokens, time.monotonic())
        if late_s:
            self._exports.advance(ticket, num_tokens // 2)
            asyncio.get_running_loop().call_later(late_s, self._finish, ticket, first)
        else:
            self._finish(ticket, first)
        return {"id": ticket.hex(), "content": xxhash.xxh3_128_hexdigest(data), "first_token": first}

    def _finish(self, ticket: TicketId, first: int) -> None:
        if ticket in self._blocks:
            self._exports.finish(ticket, first, time.monotonic())

    def _ended(self, ended: ExportEnded) -> None:
        blocks = self._blocks.pop(ended.ticket)
        if any(self._references.counts[block] for block in blocks):
            raise RuntimeError(f"a ticket has ended and its blocks are held: {ended}")
        self._free += blocks

    def _busy(self) -> bool:
        now = self._exports.counters()
        return bool(now["tickets"] or now["open_pulls"] or now["running_sends"] or self._references.counts)

    def _state(self) -> dict[str, Any]:
        counters = self._service.counters()
        return {
            "faults": dict(self._injector.counts),
            "by_frame": {kind.name.lower(): dict(counts) for kind, counts in self._injector.by_frame.items()},
            "frames": self._injector.num_frames,
            "pulls": self._injector.num_pulls,
            "expired": counters["leases_expired"],
            "held": {
                "tickets": counters["tickets"],
                "open_pulls": counters["open_pulls"],
                "running_sends": counters["running_sends"],
                "blocks": sum(self._references.counts.values()) + len(self._pool[0]) - len(self._free),
                "slots": slots_in_use(self._plane),
            },
            "process": held_by_process(),
            "plane": getattr(self._plane, "counters", dict)(),
        }


def slots_in_use(plane: DataPlane | None) -> int:
    staging = getattr(plane, "_staging", None)
    return 0 if staging is None else staging.memory.num_slots - staging.slots.num_free


async def main(transport: str, spec: str, num_blocks: int) -> None:
    source = Source(transport, FaultPlan.parse(spec), num_blocks)
    await source.start()
    print(json.dumps({"grpc": source.grpc_address}), flush=True)
    reader = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while line := await reader.readline():
        print(json.dumps(await source.answer(json.loads(line))), flush=True)
    await source.stop()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
