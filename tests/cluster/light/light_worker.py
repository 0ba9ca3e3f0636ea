"""An instance without a model: links, incarnations, announcements. LIGHT_FAIL=NAME makes NAME fail in its set-up,
LIGHT_CRASH=NAME end with exit code 7 while loading, LIGHT_SLOW=NAME never get ready. NAME.K is rank K of an instance of
several, whose ranks above 0 do nothing but end in order when rank 0 does."""

import asyncio
import os
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


class LightWorker(worker_pb2_grpc.WorkerServicer):
    def __init__(self, config: Any) -> None:
        self._config = config

    async def Link(
        self, requests: AsyncIterator[worker_pb2.LinkDown], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[worker_pb2.LinkUp]:
        hello = await anext(aiter(requests))
        if hello.incarnation != self._config.incarnation:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "another incarnation")
        welcome = worker_pb2.Welcome(
            name=self._config.name, role=role_to_proto(self._config.role), pid=os.getpid(), threads=1
        )
        yield worker_pb2.LinkUp(incarnation=self._config.incarnation, welcome=welcome)
        async for _ in requests:
            pass

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
    if os.environ.get("LIGHT_CRASH") == name:
        os._exit(7)
    if os.environ.get("LIGHT_SLOW") == name:
        await stop.wait()
        return
    if config.rank:
        await _follow(config, announcer, stop, find_leader)
        return
    leading = await _lead(config, announcer)
    server = grpc.aio.server(options=server_options())
    worker_pb2_grpc.add_WorkerServicer_to_server(LightWorker(config), server)
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
