"""A router without requests: follows the membership and shows it in GetServerInfo."""

import asyncio
import os
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio

from biphase.protos import controller_pb2, controller_pb2_grpc, router_pb2, router_pb2_grpc
from biphase.protos.grpc_setup import bind, channel_options, server_options
from biphase.protos.process import Announcer


class LightRouter(router_pb2_grpc.RouterServicer):
    def __init__(self, config: Any) -> None:
        self._config = config
        self.membership = controller_pb2.Membership()

    async def _reports(self) -> AsyncIterator[controller_pb2.RouterReport]:
        while True:
            yield controller_pb2.RouterReport(
                name=self._config.name, incarnation=self._config.incarnation, pid=os.getpid()
            )
            await asyncio.sleep(1.0)

    async def follow(self) -> None:
        while True:
            async with grpc.aio.insecure_channel(self._config.controller, options=channel_options()) as channel:
                try:
                    stub = controller_pb2_grpc.ControllerStub(channel)
                    async for membership in stub.WatchMembership(self._reports(), wait_for_ready=True):
                        if (membership.epoch, membership.version) > (self.membership.epoch, self.membership.version):
                            self.membership = membership
                except grpc.aio.AioRpcError:
                    await asyncio.sleep(0.05)

    async def GetServerInfo(
        self, request: router_pb2.GetServerInfoRequest, context: grpc.aio.ServicerContext
    ) -> router_pb2.ServerInfoReply:
        views = [
            router_pb2.InstanceView(
                name=member.name, incarnation=member.incarnation, state="draining" if member.draining else "ready"
            )
            for member in self.membership.members
        ]
        counters = {"epoch": self.membership.epoch, "version": self.membership.version}
        return router_pb2.ServerInfoReply(name="router-0", pid=os.getpid(), instances=views, counters=counters)


async def serve(config: Any, announcer: Announcer, stop: asyncio.Event) -> None:
    router = LightRouter(config)
    follow = asyncio.create_task(router.follow())
    server = grpc.aio.server(options=server_options())
    router_pb2_grpc.add_RouterServicer_to_server(router, server)
    port = bind(server, config.host, config.port)
    await server.start()
    announcer.update(state="ready", address=f"{config.host}:{port}", progress=1.0)
    await stop.wait()
    follow.cancel()
    await server.stop(0.1)
