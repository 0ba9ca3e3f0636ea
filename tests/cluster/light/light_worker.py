"""An instance without a model: links, incarnations, announcements. LIGHT_FAIL=NAME makes NAME fail in its set-up,
LIGHT_CRASH=NAME end with exit code 7 while loading, LIGHT_SLOW=NAME never get ready. NAME.K is rank K of an instance of
several, whose ranks above 0 do nothing but end in order when rank 0 does.

It drains, turns and ends as the controller says. While the file LIGHT_WORK/NAME exists it has a request that runs; a
drain waits for that, at most for its grace. A file LIGHT_WORK/crash-NAME makes the next life of NAME end while loading."""

import asyncio
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from biphase.protos import worker_pb2, worker_pb2_grpc
from biphase.protos.convert import role_to_proto
from biphase.protos.errors import SetupError
from biphase.protos.grpc_setup import bind, server_options
from biphase.protos.process import Announcement, Announcer


def work_file(name: str) -> Path:
    return Path(os.environ.get("LIGHT_WORK", "/nonexistent")) / name


class LightWorker(worker_pb2_grpc.WorkerServicer):
    def __init__(self, config: Any, announcer: Announcer, stop: asyncio.Event) -> None:
        self._config, self._announcer, self._stop = config, announcer, stop
        self._role, self._incarnation = role_to_proto(config.role), config.incarnation
        self._draining = False
        self._flipping: worker_pb2.Flip | None = None
        self._links: set[asyncio.Queue[worker_pb2.LinkUp | None]] = set()
        self._epoch = 0

    async def Link(
        self, requests: AsyncIterator[worker_pb2.LinkDown], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[worker_pb2.LinkUp]:
        hello = await anext(aiter(requests))
        if hello.incarnation not in (0, self._incarnation):
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "another incarnation")
        if hello.hello.membership_epoch < self._epoch:
            await context.abort(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"membership epoch {hello.hello.membership_epoch} has given way to epoch {self._epoch}",
            )
        self._epoch = hello.hello.membership_epoch
        outgoing: asyncio.Queue[worker_pb2.LinkUp | None] = asyncio.Queue()
        self._links.add(outgoing)
        reading = asyncio.create_task(self._read(requests, outgoing))
        welcome = worker_pb2.Welcome(
            name=self._config.name, role=self._role, pid=os.getpid(), threads=1, num_blocks=100
        )
        try:
            yield worker_pb2.LinkUp(incarnation=self._incarnation, welcome=welcome)
            yield self._load()
            yield worker_pb2.LinkUp(incarnation=self._incarnation, signals=worker_pb2.WorkerSignals(uptime_s=1.0))
            while (message := await outgoing.get()) is not None:
                yield message
        finally:
            reading.cancel()
            self._links.discard(outgoing)

    async def _read(
        self, requests: AsyncIterator[worker_pb2.LinkDown], outgoing: "asyncio.Queue[worker_pb2.LinkUp | None]"
    ) -> None:
        async for message in requests:
            match message.WhichOneof("command"):
                case "drain":
                    self._draining = True
                    asyncio.create_task(self._drain(message.drain.grace_s))
                case "resume":
                    self._draining = False
                    self._announcer.update(state="ready", detail="")
                    self._tell(self._load())
                case "flip":
                    if self._flipping is None:
                        self._flipping = message.flip
                        asyncio.create_task(self._flip(message.flip))
                case "retire":
                    os._exit(5)
        outgoing.put_nowait(None)

    def _tell(self, message: worker_pb2.LinkUp | None) -> None:
        for link in self._links:
            link.put_nowait(message)

    def _load(self) -> worker_pb2.LinkUp:
        running = 1 if work_file(self._config.name).exists() else 0
        load = worker_pb2.Load(running=running, legs=running, free_blocks=100 - running, draining=self._draining)
        return worker_pb2.LinkUp(incarnation=self._incarnation, load=load)

    async def _drain(self, grace_s: float) -> None:
        self._announcer.update(state="draining", detail="takes no new work")
        self._tell(self._load())
        until_s = time.monotonic() + (grace_s or 1e9)
        while self._draining and work_file(self._config.name).exists() and time.monotonic() < until_s:
            await asyncio.sleep(0.02)
        self._tell(self._load())

    async def _flip(self, flip: worker_pb2.Flip) -> None:
        self._draining = True
        await self._drain(flip.grace_s)
        self._role, self._incarnation, self._draining, self._flipping = flip.role, flip.incarnation, False, None
        kind = "prefill" if flip.role == role_to_proto("prefill") else "decode"
        self._announcer.update(state="ready", detail="", kind=kind, incarnation=flip.incarnation)
        self._tell(None)

    async def GetStats(
        self, request: worker_pb2.StatsRequest, context: grpc.aio.ServicerContext
    ) -> worker_pb2.WorkerStats:
        return worker_pb2.WorkerStats(name=self._config.name, counters={"blocks_free": 7})


async def serve(
    config: Any, announcer: Announcer, stop: asyncio.Event, find_leader: Callable[[], Awaitable[str]] | None = None
) -> None:
    announcer.update(state="loading", detail="light weights", progress=0.5)
    name = f"{config.name}.{config.rank}" if config.rank else config.name
    if os.environ.get("LIGHT_FAIL") == name:
        raise SetupError("the model file is light on bytes")
    if os.environ.get("LIGHT_CRASH") == name or work_file(f"crash-{name}").exists():
        os._exit(7)
    if os.environ.get("LIGHT_SLOW") == name:
        await stop.wait()
        return
    if config.rank:
        await _follow(config, announcer, stop, find_leader)
        return
    leading = await _lead(config, announcer)
    server = grpc.aio.server(options=server_options())
    worker_pb2_grpc.add_WorkerServicer_to_server(LightWorker(config, announcer, stop), server)
    port = bind(server, config.host, 0)
    await server.start()
    announcer.update(state="ready", address=f"{config.host}:{port}", threads=1, kv_bytes=2**20, progress=1.0)
    await stop.wait()
    await server.stop(0.1)
    if leading is not None:
        leading.close()
        for writer in _followers:
            writer.write(b"stop")
            writer.close()


_followers: list[asyncio.StreamWriter] = []


async def _lead(config: Any, announcer: Announcer) -> asyncio.Server | None:
    """The other ranks connect here and prove that they know the key; true of the real ones too."""
    if config.plan.num_ranks == 1:
        return None
    all_there = asyncio.Event()

    async def met(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert await reader.readexactly(32) == config.rank_key.encode()
        _followers.append(writer)
        if len(_followers) == config.plan.num_ranks - 1:
            all_there.set()

    server = await asyncio.start_server(met, config.host, 0)
    announcer.update(rank_address=f"{config.host}:{server.sockets[0].getsockname()[1]}")
    await all_there.wait()
    return server


async def _follow(
    config: Any, announcer: Announcer, stop: asyncio.Event, find_leader: Callable[[], Awaitable[str]] | None
) -> None:
    while not (address := await find_leader() if find_leader else _leader_of(config)):
        await asyncio.sleep(0.02)
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(config.rank_key.encode())
    announcer.update(state="ready", progress=1.0)
    if not await reader.read():
        os._exit(1)  # rank 0 is gone


def _leader_of(config: Any) -> str:
    try:
        return Announcement.from_json(Path(config.leader).read_text()).rank_address
    except FileNotFoundError:
        return ""
