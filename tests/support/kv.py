"""Both sides of a handoff in one loop, and the pull that most tests make of it."""

import asyncio
import os
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from biphase.kernels.kv_layout import KvBox, KvLayout
from biphase.kernels.kv_pack import CpuKvMemory, KvMemory
from biphase.kernels.kv_pack.checksum import sum64
from biphase.kvtransfer.exports import ExportEnded, ExportTable
from biphase.kvtransfer.grpc_server import GrpcKvServer
from biphase.kvtransfer.puller import KvPuller
from biphase.kvtransfer.service import KvService
from biphase.kvtransfer.signature import KvSignatureValue
from biphase.protos.ids import BlockId, Incarnation, InstanceName, TicketId
from biphase.protos.values import KvTicket

LAYOUT = KvLayout(num_layers=4, num_kv_heads=2, head_dim=64, block_size=16)
NUM_BLOCKS = 64
FIRST_TOKEN = 77
LEASE_S = 60.0
NUM_TOKENS = 100
BLOCKS = [BlockId(block) for block in (9, 3, 4, 5, 40, 1, 2, 60)]
"""Of the reader, one more than ``NUM_TOKENS`` need."""


class CountingPool:
    """References per block, as a block pool counts them."""

    def __init__(self) -> None:
        self.references: Counter[BlockId] = Counter()

    def hold(self, blocks: Sequence[BlockId]) -> None:
        self.references.update(blocks)

    def release(self, blocks: Sequence[BlockId]) -> None:
        self.references.subtract(blocks)
        assert min(self.references.values()) >= 0
        self.references = +self.references


class WatchedMemory(CpuKvMemory):
    """Tells when a number of pieces has been written."""

    def __init__(self, pool: np.ndarray[Any, Any], layout: KvLayout) -> None:
        super().__init__(pool, layout)
        self.boxes: list[KvBox] = []
        self._loop = asyncio.get_running_loop()
        self._changed = asyncio.Event()

    def unpack(
        self, blocks: Sequence[int], box: KvBox, data: Any, codec: str = "raw", group_size: int | None = None
    ) -> None:
        super().unpack(blocks, box, data, codec, group_size)
        self.boxes.append(box)
        self._loop.call_soon_threadsafe(self._changed.set)

    async def wrote(self, num_pieces: int) -> None:
        while len(self.boxes) < num_pieces:
            self._changed.clear()
            await self._changed.wait()


class SummingMemory(CpuKvMemory):
    """Packs as a kernel does that sums on its way."""

    content_digest: Literal["sum64"] = "sum64"  # type: ignore[assignment]

    def pack(self, blocks: Sequence[int], box: KvBox, out: Any, codec: str = "raw") -> int:  # type: ignore[override]
        super().pack(blocks, box, out, codec)
        return sum64(out)


def random_pool(layout: KvLayout = LAYOUT, num_blocks: int = NUM_BLOCKS) -> np.ndarray[Any, Any]:
    return np.random.default_rng(7).standard_normal(layout.pool_shape(num_blocks), dtype=np.float32)


def make_signature(
    name: str, *, incarnation: int = 1, layout: KvLayout = LAYOUT, content_digest: str = "bytes"
) -> KvSignatureValue:
    return KvSignatureValue.of(
        layout,
        instance=name,
        incarnation=incarnation,
        model_hash=b"m" * 16,
        rope="theta=1e5",
        content_digest=content_digest,
    )


@dataclass
class PrefillSide:
    """A served export table. ``blocks`` of a ticket are the first ones of the pool, in a scrambled order."""

    pool: np.ndarray[Any, Any]
    blocks_pool: CountingPool
    exports: ExportTable
    service: KvService
    server: GrpcKvServer
    signature: KvSignatureValue
    address: str
    ended: list[ExportEnded]
    ended_event: asyncio.Event

    def open(self, num_tokens: int = 100, computed: int | None = None) -> KvTicket:
        """A ticket; wholly computed and token 0 sampled unless ``computed`` says how far it is."""
        ticket = TicketId(os.urandom(16))
        self.exports.open(ticket, self.blocks_of(num_tokens), num_tokens, time.monotonic())
        if computed is None:
            self.exports.finish(ticket, FIRST_TOKEN, time.monotonic())
        else:
            self.exports.advance(ticket, computed)
        return KvTicket(
            id=ticket,
            kv_address=self.address,
            instance=InstanceName(self.signature.instance),
            incarnation=Incarnation(self.signature.incarnation),
            num_tokens=num_tokens,
        )

    def blocks_of(self, num_tokens: int) -> list[BlockId]:
        order = np.random.default_rng(1).permutation(LAYOUT.blocks_for(num_tokens))
        return [BlockId(int(block)) for block in order]

    def content(self, num_tokens: int) -> np.ndarray[Any, Any]:
        """``[layers, 2, heads, tokens, dim]`` of a ticket."""
        return tokens_of(self.pool, self.blocks_of(num_tokens), num_tokens)

    async def next_end(self) -> ExportEnded:
        while not self.ended:
            self.ended_event.clear()
            await self.ended_event.wait()
        return self.ended.pop(0)


@dataclass
class DecodeSide:
    """A puller over a pool of NaN."""

    pool: np.ndarray[Any, Any]
    memory: WatchedMemory
    puller: KvPuller

    def content(self, blocks: Sequence[int], num_tokens: int) -> np.ndarray[Any, Any]:
        return tokens_of(self.pool, blocks, num_tokens)


def tokens_of(pool: np.ndarray[Any, Any], blocks: Sequence[int], num_tokens: int) -> np.ndarray[Any, Any]:
    chosen = pool[:, list(blocks)].transpose(0, 2, 3, 1, 4, 5)
    layers, two, heads, count, size, dim = chosen.shape
    return chosen.reshape(layers, two, heads, count * size, dim)[:, :, :, :num_tokens]


@asynccontextmanager
async def prefill_side(
    *,
    memory: Callable[[np.ndarray[Any, Any], KvLayout], KvMemory] = CpuKvMemory,
    signature: KvSignatureValue | None = None,
    lease_s: float = LEASE_S,
    max_message_bytes: int = 64 * 1024,
    num_blocks: int = NUM_BLOCKS,
) -> AsyncIterator[PrefillSide]:
    pool = random_pool(num_blocks=num_blocks)
    blocks_pool = CountingPool()
    exports = ExportTable(blocks_pool, lease_s)
    kv_memory = memory(pool, LAYOUT)
    signature = signature or make_signature("prefill-0", content_digest=kv_memory.content_digest)
    signature = replace(signature, max_message_bytes=max_message_bytes)
    ended: list[ExportEnded] = []
    ended_event = asyncio.Event()

    def on_ended(end: ExportEnded) -> None:
        ended.append(end)
        ended_event.set()

    service = KvService(exports=exports, memory=kv_memory, signature=signature, on_ended=on_ended)
    service.start()
    server = GrpcKvServer(service)
    port = await server.start("127.0.0.1", 0)
    try:
        yield PrefillSide(
            pool, blocks_pool, exports, service, server, signature, f"127.0.0.1:{port}", ended, ended_event
        )
    finally:
        await server.stop()
        await service.stop()


@asynccontextmanager
async def decode_side(
    *,
    signature: KvSignatureValue | None = None,
    num_blocks: int = NUM_BLOCKS,
    decoding: Callable[[], bool] = lambda: False,
) -> AsyncIterator[DecodeSide]:
    pool = np.full(LAYOUT.pool_shape(num_blocks), np.nan, dtype=np.float32)
    memory = WatchedMemory(pool, LAYOUT)
    puller = KvPuller(memory=memory, signature=signature or make_signature("decode-0"), decoding=decoding)
    try:
        yield DecodeSide(pool, memory, puller)
    finally:
        await puller.close()


async def pull(
    decode: DecodeSide, ticket: KvTicket, epoch: int = 1, timeout_s: float = 20.0, blocks: Sequence[BlockId] = BLOCKS
) -> Any:
    return await decode.puller.pull(ticket, epoch, blocks, timeout_s=timeout_s)


async def until_no_pull(prefill: PrefillSide) -> None:
    """The other end hears of a cancellation over the wire; give it the loop until it has."""
    async with asyncio.timeout(10):
        while prefill.exports.counters()["open_pulls"]:
            await asyncio.sleep(0.001)
