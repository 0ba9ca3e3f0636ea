"""An instance without a model: links, incarnations, announcements. LIGHT_FAIL=NAME makes NAME fail in its set-up,
LIGHT_CRASH=NAME end with exit code 7 while loading, LIGHT_SLOW=NAME never get ready."""

import asyncio
import os
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio

from biphase.protos import worker_pb2, worker_pb2_grpc
from biphase.protos.convert import role_to_proto
from biphase.protos.errors import SetupError
from biphase.protos.grpc_setup import bind, server_options
from biphase.protos.process import Announcer


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


async def serve(config: Any, announcer: Announcer, stop: asyncio.Event) -> None:
    announcer.update(state="loading", detail="light weights", progress=0.5)
    if os.environ.get("LIGHT_FAIL") == config.name:
        raise SetupError("the model file is light on bytes")
    if os.environ.get("LIGHT_CRASH") == config.name:
        os._exit(7)
    if os.environ.get("LIGHT_SLOW") == config.name:
        await stop.wait()
        return
    server = grpc.aio.server(options=server_options())
    worker_pb2_grpc.add_WorkerServicer_to_server(LightWorker(config), server)
    port = bind(server, config.host, 0)
    await server.start()
    announcer.update(state="ready", address=f"{config.host}:{port}", threads=1, kv_bytes=2**20, progress=1.0)
    await stop.wait()
    await server.stop(0.1)
