"""Both sides of a handoff between instances of several ranks, in one loop: real servers, real channels between ranks."""

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from biphase.engine.ranks.channel import FollowerChannel, LeaderChannel
from biphase.engine.ranks.greeting import Membership
from biphase.kernels.kv_layout import KvLayout
from biphase.kernels.kv_pack import CpuKvMemory, KvMemory
from biphase.kvtransfer.choice import order
from biphase.kvtransfer.export_ranks import FollowerExports, LeaderExports
from biphase.kvtransfer.exports import ExportEnded, ExportTable
from biphase.kvtransfer.pull_ranks import FollowerPulls, LeaderPulls
from biphase.kvtransfer.puller import KvPuller
from biphase.kvtransfer.rank_memory import RankMemory
from biphase.kvtransfer.rank_pull import RankPuller
from biphase.kvtransfer.service import KvService
from biphase.kvtransfer.signature import KvSignatureValue, RankEndpoint
from biphase.kvtransfer.wire import FrameSink
from biphase.kvtransfer.wires import reading, serving
from biphase.protos.ids import BlockId, Incarnation, InstanceName, TicketId
from biphase.protos.parallel_plan import ParallelPlan
from biphase.protos.values import KvTicket
from support.kv import FIRST_TOKEN, CountingPool, WatchedMemory

HOST = "127.0.0.1"
FULL = KvLayout(num_layers=4, num_kv_heads=2, head_dim=16, block_size=16)
NUM_BLOCKS = 24

MakeMemory = Callable[[np.ndarray[Any, Any], KvLayout], KvMemory]


@asynccontextmanager
async def channels(
    plan: ParallelPlan, instance: str
) -> AsyncIterator[tuple[LeaderChannel | None, list[FollowerChannel]]]:
    """Rank 0's end and those of the others."""
    if plan.num_ranks == 1:
        yield None, []
        return

    def us(rank: int) -> Membership:
        return Membership(instance=instance, plan=plan, rank=rank, key="ab" * 16)

    leader = LeaderChannel(us(0), HOST)

    async def find() -> str:
        return f"{HOST}:{leader.port}"

    gathering = asyncio.create_task(leader.gather(20))
    others = await asyncio.gather(*(FollowerChannel.join(us(rank), find, 20) for rank in range(1, plan.num_ranks)))
    await gathering
    try:
        yield leader, list(others)
        assert not leader.lost.done(), leader.lost.result()
    finally:
        for other in others:
            other.close()
        leader.close()


def local_layout(full: KvLayout, plan: ParallelPlan, rank: int) -> KvLayout:
    layers, heads = plan.layers_of(rank, full.num_layers), plan.kv_heads_of(rank, full.num_kv_heads)
    return replace(full, num_layers=len(layers), num_kv_heads=len(heads))


def signature_of(full: KvLayout, plan: ParallelPlan, name: str, ranks: Sequence[RankEndpoint]) -> KvSignatureValue:
    value = KvSignatureValue.of(
        full, instance=name, incarnation=1, model_hash=b"m" * 16, rope="theta=1e5", plan=plan, ranks=tuple(ranks)
    )
    return replace(value, max_message_bytes=64 * 1024)


@dataclass
class PrefillRanks:
    """A served instance. ``whole``: what its pools make up together, ``[layers, blocks, 2, heads, size, dim]``."""

    plan: ParallelPlan
    full: KvLayout
    whole: np.ndarray[Any, Any]
    blocks_pool: CountingPool
    exports: ExportTable
    followers: list[FollowerExports]
    services: list[KvService]
    listening: list[AsyncExitStack]
    address: str
    ended: "asyncio.Queue[ExportEnded]"
    next_seq: int = 0

    async def open(self, num_tokens: int, computed: bool = True) -> KvTicket:
        """As ``open_here``, and every rank has heard of it."""
        ticket = self.open_here(num_tokens, computed)
        async with asyncio.timeout(10):
            while any(not follower.table.counters()["tickets"] for follower in self.followers):
                await asyncio.sleep(0.001)
        return ticket

    def open_here(self, num_tokens: int, computed: bool = True) -> KvTicket:
        """A ticket; wholly computed and token 0 sampled unless ``computed`` says that nothing is."""
        ticket = TicketId(os.urandom(16))
        self.next_seq += 1
        self.exports.open(ticket, self.blocks_of(num_tokens), num_tokens, time.monotonic(), self.next_seq)
        if computed:
            self.exports.finish(ticket, FIRST_TOKEN, time.monotonic())
        return KvTicket(
            id=ticket,
            kv_address=self.address,
            instance=InstanceName("prefill-0"),
            incarnation=Incarnation(1),
            num_tokens=num_tokens,
        )

    def blocks_of(self, num_tokens: int) -> list[BlockId]:
        order = np.random.default_rng(1).permutation(self.full.blocks_for(num_tokens))
        return [BlockId(int(block)) for block in order]

    def layers_computed(self, ticket: KvTicket, tokens: int, layers: int) -> None:
        """On every rank, as their engines would say it; all layers is the end of a chunk."""
        for rank in range(self.plan.num_ranks):
            of_layers = len(self.plan.layers_of(rank, self.full.num_layers))
            if rank:
                self.followers[rank - 1].layers_computed(self.next_seq, tokens, layers, of_layers)
            elif layers < of_layers:
                self.exports.advance_layers(ticket.id, tokens, layers)
            else:
                self.exports.advance(ticket.id, tokens)

    async def stop_rank(self, rank: int) -> None:
        """It listens no more, and its pulls have ended."""
        await self.listening[rank].aclose()

    def counters(self) -> list[dict[str, int]]:
        return [service.counters() for service in self.services]


@asynccontextmanager
async def prefill_ranks(
    plan: ParallelPlan,
    *,
    full: KvLayout = FULL,
    memory: MakeMemory = CpuKvMemory,
    lease_s: float = 60.0,
    num_blocks: int = NUM_BLOCKS,
    wanted: str = "grpc",
    codecs: tuple[str, ...] = ("raw",),
    wrap_sink: Callable[[int, FrameSink], FrameSink] = lambda rank, sink: sink,
) -> AsyncIterator[PrefillRanks]:
    whole = np.random.default_rng(7).standard_normal(full.pool_shape(num_blocks), dtype=np.float32)
    async with AsyncExitStack() as closing:
        leader, others = await closing.enter_async_context(channels(plan, "prefill-0"))
        blocks_pool, ended = CountingPool(), asyncio.Queue[ExportEnded]()
        told = None if leader is None else LeaderExports(leader)
        exports = ExportTable(blocks_pool, lease_s, told)
        if told is not None:
            told.attach(exports)
        followers = [FollowerExports(channel) for channel in others]
        services: list[KvService] = []
        listening: list[AsyncExitStack] = []
        endpoints: list[RankEndpoint] = []
        for rank in range(plan.num_ranks):
            layers, heads = plan.layers_of(rank, full.num_layers), plan.kv_heads_of(rank, full.num_kv_heads)
            pool = np.ascontiguousarray(whole[layers.start : layers.stop, :, :, heads.start : heads.stop])
            of_rank = RankMemory(memory(pool, local_layout(full, plan, rank)), full, plan, rank)
            signature = replace(signature_of(full, plan, "prefill-0", ()), codecs=codecs)
            wrap = partial(wrap_sink, rank)
            if rank == 0:
                service = KvService(
                    exports=exports,
                    memory=of_rank,
                    signature=signature,
                    on_ended=ended.put_nowait,
                    wrap_sink=wrap,
                )
            else:
                other = followers[rank - 1]
                service = KvService(
                    exports=other.table,
                    memory=of_rank,
                    signature=signature,
                    on_ended=other.on_ended,
                    on_readers=other.on_readers,
                    leads=False,
                    wrap_sink=wrap,
                )
            stack = await closing.enter_async_context(AsyncExitStack())
            wires = serving(
                service,
                host=HOST,
                port=0,
                address=lambda port: f"{HOST}:{port}",
                own_host=HOST,
                device="cpu",
                wanted=wanted,
            )
            endpoints.append(await stack.enter_async_context(wires))
            if rank:
                followers[rank - 1].follow()
            services.append(service)
            listening.append(stack)
        for service in services:
            service.signature = replace(service.signature, ranks=tuple(endpoints))
        yield PrefillRanks(
            plan, full, whole, blocks_pool, exports, followers, services, listening, endpoints[0].grpc, ended
        )


@dataclass
class DecodeRanks:
    """An instance that pulls. ``pools`` and ``memories`` by rank; pools are NaN until pulled into."""

    plan: ParallelPlan
    full: KvLayout
    pools: list[np.ndarray[Any, Any]]
    memories: list[WatchedMemory]
    puller: KvPuller
    pullers: list[RankPuller]
    pulls: list[FollowerPulls]

    def holds(self, source: PrefillRanks, blocks: Sequence[int], num_tokens: int) -> bool:
        """Whether every rank holds its part of the source's request, bit for bit."""
        wanted = tokens_of(source.whole, source.blocks_of(num_tokens), num_tokens)
        for rank, pool in enumerate(self.pools):
            layers = self.plan.layers_of(rank, self.full.num_layers)
            heads = self.plan.kv_heads_of(rank, self.full.num_kv_heads)
            part = wanted[layers.start : layers.stop, :, heads.start : heads.stop]
            if not np.array_equal(tokens_of(pool, blocks, num_tokens), part):
                return False
        return True

    async def wrote(self, rank: int) -> None:
        await self.memories[rank].wrote(1)


@asynccontextmanager
async def decode_ranks(
    plan: ParallelPlan,
    *,
    full: KvLayout = FULL,
    block_size: int | None = None,
    num_blocks: int = NUM_BLOCKS,
    wanted: str = "grpc",
    codecs: tuple[str, ...] = ("raw",),
) -> AsyncIterator[DecodeRanks]:
    full = replace(full, block_size=block_size or full.block_size)
    async with AsyncExitStack() as closing:
        leader, others = await closing.enter_async_context(channels(plan, "decode-0"))
        pools, memories, of_ranks = [], [], []
        for rank in range(plan.num_ranks):
            local = local_layout(full, plan, rank)
            pools.append(np.full(local.pool_shape(num_blocks), np.nan, dtype=np.float32))
            memories.append(WatchedMemory(pools[-1], local))
            of_ranks.append(RankMemory(memories[-1], full, plan, rank))
        made = [await closing.enter_async_context(reading(own_host=HOST, device="cpu", wanted=wanted)) for _ in pools]
        signature = signature_of(full, plan, "decode-0", [endpoint for _, endpoint in made])
        puller = KvPuller(
            memory=of_ranks[0],
            signature=replace(signature, codecs=codecs),
            transports=made[0][0],
            choose=partial(order, wanted=wanted),
            followers=None if leader is None else LeaderPulls(leader),
        )
        pullers = [RankPuller(memory, wires) for memory, (wires, _) in zip(of_ranks[1:], made[1:], strict=True)]
        pulls = [FollowerPulls(channel, of_rank) for channel, of_rank in zip(others, pullers, strict=True)]
        try:
            yield DecodeRanks(plan, full, pools, memories, puller, pullers, pulls)
        finally:
            for running in pulls:
                await running.close()
            for of_rank in pullers:
                await of_rank.close()
            await puller.close()


def tokens_of(pool: np.ndarray[Any, Any], blocks: Sequence[int], num_tokens: int) -> np.ndarray[Any, Any]:
    chosen = pool[:, list(blocks)].transpose(0, 2, 3, 1, 4, 5)
    layers, two, heads, count, size, dim = chosen.shape
    return chosen.reshape(layers, two, heads, count * size, dim)[:, :, :, :num_tokens]
