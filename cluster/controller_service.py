"""The controller's gRPC face: values to messages, and the service that streams them."""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio

from biphase.cluster.reconcile import Slot
from biphase.cluster.version import version
from biphase.protos import common_pb2, controller_pb2, router_pb2, router_pb2_grpc, worker_pb2, worker_pb2_grpc
from biphase.protos.grpc_setup import channel_options

if TYPE_CHECKING:
    from biphase.cluster.controller import Controller

STATUS_INTERVAL_S = 0.05
COUNTERS_S = 1.0


def membership_of(controller: "Controller") -> controller_pb2.Membership:
    reconciler = controller.reconciler
    members = [
        controller_pb2.Member(
            name=member.name,
            role=common_pb2.ROLE_PREFILL if member.kind == "prefill" else common_pb2.ROLE_DECODE,
            incarnation=member.incarnation,
            address=member.address,
            draining=member.draining,
        )
        for member in reconciler.members
    ]
    return controller_pb2.Membership(epoch=controller.epoch, version=reconciler.version, members=members)


def status_of(controller: "Controller") -> controller_pb2.ClusterStatus:
    deployment = controller.deployment
    own = controller.announcer.current
    processes = [_process_status(controller, slot) for slot in controller.reconciler.slots.values()]
    processes.append(
        controller_pb2.ProcessStatus(
            name=own.name,
            kind=own.kind,
            incarnation=own.incarnation,
            state=own.state,
            progress=1.0,
            pid=own.pid,
            address=own.address,
            restarts=controller.epoch - 1,
            log_file=own.log_file,
        )
    )
    problems = [f"{process.name}: {process.detail}" for process in processes if process.state in ("lost", "waiting")]
    return controller_pb2.ClusterStatus(
        deployment=deployment.name,
        state=controller.state,
        detail="; ".join(problems),
        backend=deployment.backend,
        model=deployment.served_model_name or deployment.model,
        mode=deployment.mode,
        uptime_s=time.monotonic() - controller.started_s,
        processes=processes,
        router_addresses=controller.router_addresses(),
        version=version(),
    )


def _process_status(controller: "Controller", slot: Slot) -> controller_pb2.ProcessStatus:
    status = controller_pb2.ProcessStatus(
        name=slot.wanted.name,
        kind=slot.wanted.kind,
        incarnation=slot.incarnation,
        state=slot.phase,
        detail=slot.reason if slot.phase in ("waiting", "lost") else "",
        restarts=slot.restarts,
    )
    life = controller.lives.get(slot.wanted.name)
    if slot.wanted.kind == "prefill" or slot.wanted.kind == "decode":
        status.plan = str(controller.deployment.plan(slot.wanted.kind).parallel)
    if life is not None and life.handle.end is None:
        status.pid = life.handle.pid
        if len(life.handle.pids) > 1:
            status.rank_pids.extend(life.handle.pids)
    if slot.announcement is not None:
        said = slot.announcement
        status.pid, status.address, status.threads = said.pid, said.address, said.threads
        status.kv_bytes, status.log_file, status.progress = said.kv_bytes, said.log_file, said.progress
        status.device = said.device
        status.detail = status.detail or said.detail
    return status


class ControllerService:
    """controller.proto's service, its requests decoded tolerantly."""

    def __init__(self, controller: "Controller") -> None:
        self._controller = controller

    async def WatchMembership(
        self, reports: AsyncIterator[Any], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[controller_pb2.Membership]:
        async for membership in self._controller.membership.follow():
            yield membership

    async def WatchStatus(
        self, request: controller_pb2.WatchStatusRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[controller_pb2.ClusterStatus]:
        async for status in self._controller.status.follow(STATUS_INTERVAL_S):
            yield status

    async def GetStatus(
        self, request: controller_pb2.WatchStatusRequest, context: grpc.aio.ServicerContext
    ) -> controller_pb2.ClusterStatus:
        status = status_of(self._controller)
        await asyncio.gather(*(_add_counters(process) for process in status.processes if process.state == "ready"))
        return status

    async def Shutdown(
        self, request: controller_pb2.ShutdownRequest, context: grpc.aio.ServicerContext
    ) -> controller_pb2.ShutdownReply:
        await self._controller.shut_down(now=request.now, drain_s=request.drain_s)
        return controller_pb2.ShutdownReply()


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
