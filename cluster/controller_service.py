"""The controller's gRPC face: what routers, people and tests ask of it. What people ask for is done by ``admin``."""

import asyncio
from collections.abc import AsyncIterator, Awaitable
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
from google.protobuf.message_factory import GetMessageClass

from biphase.cluster.backend import Backend, ProcessSpec
from biphase.cluster.controller_messages import event_message, status_of
from biphase.cluster.log_reader import read_log
from biphase.cluster.make_backend import make_backend
from biphase.protos import controller_pb2, router_pb2, router_pb2_grpc, worker_pb2, worker_pb2_grpc
from biphase.protos.errors import InvalidRequest, one_line
from biphase.protos.grpc_setup import Undecodable, bind, channel_options, server_options, service_handler
from biphase.protos.process import Announcer
from biphase.protos.values import Role

if TYPE_CHECKING:
    from biphase.cluster.controller import Controller

STATUS_INTERVAL_S = 0.05
COUNTERS_S = 1.0


class ControllerService:
    """controller.proto's service, its requests decoded tolerantly."""

    def __init__(self, controller: "Controller") -> None:
        self._controller = controller

    # -- routers ----------------------------------------------------------------------------------------------------

    async def WatchMembership(
        self, reports: AsyncIterator[Any], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[controller_pb2.Membership]:
        reading = asyncio.create_task(self._read_reports(reports))
        try:
            await self._controller.settled.wait()  # the last membership stands until then
            async for membership in self._controller.membership.follow():
                yield membership
        finally:
            reading.cancel()

    async def _read_reports(self, reports: AsyncIterator[Any]) -> None:
        async for report in reports:
            if not isinstance(report, Undecodable):
                self._controller.reports.add(report)

    # -- what people see --------------------------------------------------------------------------------------------

    async def WatchStatus(
        self, request: controller_pb2.WatchStatusRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[controller_pb2.ClusterStatus]:
        async for status in self._controller.status.follow(STATUS_INTERVAL_S):
            yield status

    async def GetStatus(
        self, request: controller_pb2.WatchStatusRequest, context: grpc.aio.ServicerContext
    ) -> controller_pb2.ClusterStatus:
        status = status_of(self._controller)
        await asyncio.gather(*(_add_counters(it) for it in status.processes if it.state in ("ready", "draining")))
        return status

    async def WatchEvents(
        self, request: controller_pb2.WatchEventsRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[controller_pb2.Event]:
        events = self._controller.events
        if not request.follow:
            for event in events.after(request.after):
                yield event_message(event)
            return
        async for event in events.follow(request.after):
            yield event_message(event)

    async def GetLogs(
        self, request: controller_pb2.GetLogsRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[controller_pb2.LogChunk]:
        try:
            async for data in read_log(
                self._controller, request.process, tail_lines=request.tail_lines, follow=request.follow
            ):
                yield controller_pb2.LogChunk(data=data)
        except InvalidRequest as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, one_line(error))

    # -- what people ask for ----------------------------------------------------------------------------------------

    async def Shutdown(
        self, request: controller_pb2.ShutdownRequest, context: grpc.aio.ServicerContext
    ) -> controller_pb2.ShutdownReply:
        await self._controller.shut_down(now=request.now, drain_s=request.drain_s)
        return controller_pb2.ShutdownReply()

    async def Scale(
        self, request: controller_pb2.ScaleRequest, context: grpc.aio.ServicerContext
    ) -> controller_pb2.AdminReply:
        admin = self._controller.admin
        wanted: dict[Role, int] = {}
        if request.HasField("prefill"):
            wanted["prefill"] = request.prefill
        if request.HasField("decode"):
            wanted["decode"] = request.decode
        asked = admin.unpin("unpinned by hand") if request.auto else admin.scale(wanted, for_s=request.for_s)
        return await self._answer(asked, "scale", context)

    async def Flip(
        self, request: controller_pb2.FlipRequest, context: grpc.aio.ServicerContext
    ) -> controller_pb2.AdminReply:
        asked = self._controller.admin.flip(request.instance, grace_s=request.grace_s, for_s=request.for_s)
        return await self._answer(asked, "flip", context)

    async def Drain(
        self, request: controller_pb2.DrainRequest, context: grpc.aio.ServicerContext
    ) -> controller_pb2.AdminReply:
        admin = self._controller.admin
        if request.node:
            asked = (
                admin.uncordon(request.node)
                if request.undo
                else admin.drain_node(request.node, grace_s=request.grace_s)
            )
        elif request.undo:
            asked = admin.undo_drain(request.instance)
        else:
            asked = admin.drain(request.instance, grace_s=request.grace_s)
        return await self._answer(asked, "drain", context)

    async def Cordon(
        self, request: controller_pb2.CordonRequest, context: grpc.aio.ServicerContext
    ) -> controller_pb2.AdminReply:
        admin = self._controller.admin
        asked = admin.uncordon(request.node) if request.undo else admin.cordon(request.node)
        return await self._answer(asked, "cordon", context)

    async def Update(
        self, request: controller_pb2.UpdateRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[controller_pb2.AdminReply]:
        try:
            async for text, done in self._controller.updating.run(
                request.deployment,
                dry_run=request.dry_run,
                allow_downtime=request.allow_downtime,
                grace_s=request.grace_s,
            ):
                yield controller_pb2.AdminReply(text=text, done=done)
        except InvalidRequest as error:
            await self._refuse("update", error, context)

    async def _answer(
        self, asked: Awaitable[str], what: str, context: grpc.aio.ServicerContext
    ) -> controller_pb2.AdminReply:
        try:
            return controller_pb2.AdminReply(text=await asked, done=True)
        except InvalidRequest as error:
            await self._refuse(what, error, context)
            raise AssertionError("abort raises") from error

    async def _refuse(self, what: str, error: InvalidRequest, context: grpc.aio.ServicerContext) -> None:
        self._controller.events.add("refused", "", f"{what}: {one_line(error)}")
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, one_line(error))


async def _add_counters(process: controller_pb2.ProcessStatus) -> None:
    """Ask the process itself; one that does not answer in time has none."""
    if process.kind == "controller":
        return
    async with grpc.aio.insecure_channel(process.address, options=channel_options()) as channel:
        try:
            if process.kind == "router":
                info = await router_pb2_grpc.RouterStub(channel).GetServerInfo(
                    router_pb2.GetServerInfoRequest(), timeout=COUNTERS_S
                )
                counters = info.counters
            else:
                stats = await worker_pb2_grpc.WorkerStub(channel).GetStats(
                    worker_pb2.StatsRequest(), timeout=COUNTERS_S
                )
                counters = stats.counters
                for peer, transport in stats.transports.items():
                    process.transports[peer] = transport
        except grpc.aio.AioRpcError:
            return
    for name, value in counters.items():
        process.counters[name] = value


async def serve(spec: ProcessSpec, announcer: Announcer, stop: asyncio.Event) -> None:
    """Run the controller of ``spec.deployment`` at ``spec.controller_address`` until ``stop`` or a Shutdown."""
    from biphase.cluster.controller import Controller

    backend: Backend = make_backend(spec.deployment, spec.run_dir, owner=False)
    await backend.open()
    controller = Controller(spec, backend, announcer)
    server = grpc.aio.server(options=server_options(of_clients=True))  # routers notice its end themselves
    handler = service_handler(controller_pb2.DESCRIPTOR, "Controller", ControllerService(controller), GetMessageClass)
    server.add_generic_rpc_handlers((handler,))
    host, _, port = spec.controller_address.rpartition(":")
    bind(server, host, int(port))
    await server.start()
    announcer.update(state="ready", address=spec.controller_address)
    try:
        await controller.run(stop)
    finally:
        await server.stop(grace=0.2)
        await backend.close()
