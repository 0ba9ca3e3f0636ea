"""A source and a reader for a handoff bench, and one measured transfer of each kind between them.

The reader's rank 0 is this process; every other rank is one of its own. A measurement is seconds, CPU seconds of both ends,
and bytes.
"""

import asyncio
import contextlib
import os
import socket
import sys
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace

import grpc
import grpc.aio
import handoff_bare as bare
import numpy as np
from handoff_ends import (
    HOST,
    LAYOUTS,
    Child,
    Choice,
    Followers,
    NotingTransport,
    child,
    plane_of,
    rank_pool,
    scrambled,
    signature,
    transport_of,
)

from biphase.kvtransfer.grpc_transport import GrpcTransport
from biphase.kvtransfer.nixl.library import why_not
from biphase.kvtransfer.puller import KvPuller
from biphase.kvtransfer.signature import RankEndpoint
from biphase.protos.grpc_setup import channel_options
from biphase.protos.ids import Incarnation, InstanceName, TicketId
from biphase.protos.parallel_plan import ParallelPlan
from biphase.protos.values import KvTicket

BARE = ("copy", "ring", "tcp", "grpc", "gloo")


@dataclass(frozen=True)
class Taken:
    """``seconds``: from the first piece's post to the last one's completion; ``whole_s``: of the call."""

    seconds: float
    whole_s: float
    cpu_s: float
    num_bytes: int

    @property
    def rate(self) -> float:
        """GB/s."""
        return self.num_bytes / self.seconds / 1e9

    @property
    def cpu_per_gb(self) -> float:
        return self.cpu_s / self.num_bytes * 1e9


class Rig:
    """``sources`` and ``readers``: the children, by rank; the reader's rank 0 is here."""

    def __init__(
        self, layout: str, num_tokens: int, plans: tuple[ParallelPlan, ParallelPlan], planes: Sequence[str]
    ) -> None:
        self.layout = LAYOUTS[layout]
        self.num_tokens = num_tokens
        self.num_bytes = num_tokens * self.layout.token_bytes
        self.plans = plans
        self._name, self._plane_names = layout, planes
        self._num_blocks = self.layout.blocks_for(num_tokens)
        self._pullers: dict[tuple[str, bool], KvPuller] = {}
        self._noted: dict[tuple[str, bool], NotingTransport] = {}
        self._sizes: list[int] = []
        self._gloo: bare.Gloo | None = None
        self._buffer = np.zeros(0, np.uint8)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator["Rig"]:
        async with contextlib.AsyncExitStack() as closing:
            source, reader = self.plans
            largest = min(self.num_bytes, 4 << 20) + 4096
            self._ring = bare.Ring.made(largest)
            self._slots = self._ring.mapped()
            shared = {"layout": self._name, "num_blocks": self._num_blocks, "planes": list(self._plane_names)}
            ring = [*self._ring.fds, self._ring.slot_bytes]
            sources = [
                {**shared, "plan": [source.tp, source.pp], "rank": rank, "ring": ring}
                for rank in range(source.num_ranks)
            ]
            self.sources = [
                await closing.enter_async_context(child(pass_fds=self._ring.fds, source=each)) for each in sources
            ]
            readers = [{**shared, "plan": [reader.tp, reader.pp], "rank": rank} for rank in range(1, reader.num_ranks)]
            self.readers = [await closing.enter_async_context(child(reader=each)) for each in readers]
            self._told = [await each.told() for each in self.sources]
            for each in self.readers:
                await each.told()
            for each in self.sources:
                await each.ask(do="endpoints", endpoints=[told["endpoint"] for told in self._told])
            self._pool, self._memory = rank_pool(self.layout, reader, 0, self._num_blocks, full=False)
            self._flat = self._pool.reshape(-1).view(np.uint8)
            self._planes = {name: plane_of(name) for name in self._plane_names}
            self._channel = grpc.aio.insecure_channel(
                f"{HOST}:{self._told[0]['bare_grpc']}", options=channel_options(bulk=True)
            )
            try:
                yield self
            finally:
                for puller in self._pullers.values():
                    await puller.close()
                for plane in self._planes.values():
                    await plane.close()
                await self._channel.close()
                for fd in self._ring.fds:
                    os.close(fd)

    async def pull(self, transport: str, *, digests: bool) -> Taken:
        """One whole handoff: pull on every rank, and Release."""
        ticket = os.urandom(16)
        for each in self.sources:
            await each.ask(do="ticket", ticket=ticket, tokens=self.num_tokens)
        wanted = KvTicket(
            id=TicketId(ticket),
            kv_address=self._told[0]["endpoint"]["grpc"],
            instance=InstanceName("prefill-bench"),
            incarnation=Incarnation(1),
            num_tokens=self.num_tokens,
        )
        blocks = scrambled(self.layout, self.num_tokens, self._num_blocks, 3)
        puller = self._puller(transport, digests)
        cpu_s, began_s = await self._cpu_s(), time.perf_counter()
        pulled = await puller.pull(wanted, 1, blocks, timeout_s=60.0)
        whole_s = time.perf_counter() - began_s
        cpu_s = await self._cpu_s() - cpu_s
        posted = [await each.ask(do="posted") for each in self.sources]
        self._sizes = posted[0]["sizes"]
        posted_s = min(each["began_s"] for each in posted if each["began_s"])
        taken = Taken(self._noted[transport, digests].completed_s - posted_s, whole_s, cpu_s, pulled.bytes)
        for each in self.sources[1:]:
            await each.ask(do="end", ticket=ticket)
        if puller.counters()["fallbacks"]:
            raise RuntimeError(f"a pull by {transport} has fallen back to another transport")
        return taken

    async def frame_sizes(self, transport: str) -> list[int]:
        """Of what one handoff sends; it warms everything up as well."""
        await self.pull(transport, digests=False)
        return self._sizes

    async def bare(self, arm: str, sizes: Sequence[int]) -> Taken:
        """The same bytes without a handoff. ``ring keep``: the ring, copied out to memory for all."""
        num_bytes = sum(sizes)
        if len(self._buffer) < max(sizes):
            self._buffer = np.ones(max(sizes), np.uint8)
        port = _free_port() if arm == "gloo" and self._gloo is None else 0
        if arm != "copy":
            await self.sources[0].ask(do="bare", arm=arm.split()[0], sizes=list(sizes), port=port)
        if port:
            self._gloo = bare.Gloo(1, port)
        other = np.ones(num_bytes, np.uint8) if arm in ("copy", "ring keep") else self._buffer
        cpu_s, began_s = await self._cpu_s(), time.perf_counter()
        if arm == "copy":
            np.copyto(other[: self.num_bytes], self._flat[: self.num_bytes])
        elif arm == "ring":
            bare.receive_ring(self._ring, self._slots, sizes, other)
        elif arm == "ring keep":
            bare.receive_ring(self._ring, self._slots, sizes, other, keep=True)
        elif arm == "tcp":
            bare.receive_tcp(self._told[0]["bare_tcp"], sizes)
        elif arm == "gloo":
            assert self._gloo is not None
            self._gloo.receive(sizes, other)
        else:
            call = self._channel.unary_stream("/biphase.bench/Stream")(b"")
            received = 0
            while (message := await call.read()) is not grpc.aio.EOF:
                received += len(message)
            if received != num_bytes:
                raise RuntimeError(f"{received} bytes came, {num_bytes} were sent")
        completed_s = time.perf_counter()
        cpu_s = await self._cpu_s() - cpu_s
        posted = await self.sources[0].ask(do="posted") if arm != "copy" else {"began_s": began_s}
        num_bytes = self.num_bytes if arm == "copy" else num_bytes
        return Taken(completed_s - posted["began_s"], completed_s - began_s, cpu_s, num_bytes)

    def _puller(self, transport: str, digests: bool) -> KvPuller:
        puller = self._pullers.get((transport, digests))
        if puller is None:
            plan = self.plans[1]
            ours = signature(
                "decode-bench", self.layout, plan, [RankEndpoint() for _ in range(plan.num_ranks)], digests=digests
            )
            noted = self._noted[transport, digests] = NotingTransport(transport_of(transport, self._planes))
            transports = [noted] if transport == "grpc" else [GrpcTransport(), noted]
            puller = self._pullers[transport, digests] = KvPuller(
                memory=self._memory,
                signature=replace(ours),
                transports=transports,
                choose=lambda ours, theirs: [Choice(transport)],
                followers=Followers({rank: each for rank, each in enumerate(self.readers, 1)}),
            )
        return puller

    async def _cpu_s(self) -> float:
        others: list[Child] = [*self.sources, *self.readers]
        return time.process_time() + sum(await asyncio.gather(*(each.ask(do="cpu") for each in others)))


def available(transports: Sequence[str]) -> list[str]:
    """Those that can be had here; says why another cannot."""
    reason = why_not()
    if reason is not None and "nixl" in transports:
        print(f"handoff: {reason}", file=sys.stderr)
    return [name for name in transports if name != "nixl" or reason is None]


def _free_port() -> int:
    with socket.create_server((HOST, 0)) as listener:
        return int(listener.getsockname()[1])
