"""A controller that says the memberships that a test gives it, and keeps what routers report."""

import asyncio
from collections.abc import Mapping
from typing import Any

import grpc.aio
from google.protobuf.message_factory import GetMessageClass

from biphase.protos import common_pb2, controller_pb2
from biphase.protos.grpc_setup import bind, server_options, service_handler
from support.scripted_worker import ScriptedWorker


class ScriptedController:
    """Sends the memberships that a test puts into it."""

    def __init__(self) -> None:
        self.watchers: list[asyncio.Queue[controller_pb2.Membership]] = []
        self.newest: controller_pb2.Membership | None = None
        self.reports: asyncio.Queue[controller_pb2.RouterReport] = asyncio.Queue()
        self.port = 0
        self._server: grpc.aio.Server | None = None

    async def listen(self) -> None:
        self._server = grpc.aio.server(options=server_options())
        handler = service_handler(controller_pb2.DESCRIPTOR, "Controller", self, GetMessageClass)
        self._server.add_generic_rpc_handlers((handler,))
        self.port = bind(self._server, "127.0.0.1", self.port)
        await self._server.start()

    async def die(self) -> None:
        if self._server is not None:
            server, self._server = self._server, None
            await server.stop(None)

    def say(
        self,
        epoch: int,
        version: int,
        *members: ScriptedWorker,
        draining: tuple[str, ...] = (),
        generations: Mapping[str, str] | None = None,
    ) -> None:
        self.newest = controller_pb2.Membership(
            epoch=epoch,
            version=version,
            members=[
                controller_pb2.Member(
                    name=worker.name,
                    role=common_pb2.ROLE_PREFILL if worker.role == "prefill" else common_pb2.ROLE_DECODE,
                    incarnation=worker.incarnation,
                    address=worker.address,
                    draining=worker.name in draining,
                    generation=(generations or {}).get(worker.name, ""),
                )
                for worker in members
            ],
        )
        for watcher in self.watchers:
            watcher.put_nowait(self.newest)

    async def WatchMembership(self, request: Any, context: Any) -> Any:
        watcher: asyncio.Queue[controller_pb2.Membership] = asyncio.Queue()
        self.watchers.append(watcher)
        reading = asyncio.create_task(self._read(request))
        try:
            if self.newest is not None:
                yield self.newest
            while True:
                yield await watcher.get()
        finally:
            reading.cancel()

    async def _read(self, reports: Any) -> None:
        async for report in reports:
            self.reports.put_nowait(report)

    async def until_reported(self, reached: Any) -> controller_pb2.RouterReport:
        async with asyncio.timeout(10):
            while not reached(report := await self.reports.get()):
                pass
        return report

    async def WatchStatus(self, request: Any, context: Any) -> Any:
        yield controller_pb2.ClusterStatus()

    async def GetStatus(self, request: Any, context: Any) -> Any:
        return controller_pb2.ClusterStatus()

    async def Shutdown(self, request: Any, context: Any) -> Any:
        return controller_pb2.ShutdownReply()
