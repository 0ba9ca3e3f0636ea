"""Serving one router: load the tokenizer, find the instances, listen, announce, wait for the end, drain."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from typing import Any

import grpc.aio
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from biphase.protos import router_pb2
from biphase.protos.grpc_setup import bind, server_options, service_handler
from biphase.protos.process import Announcer
from biphase.router.config import RouterConfig
from biphase.router.front import Front
from biphase.router.membership import MembershipWatch, static_members
from biphase.router.servicer import RouterServicer
from biphase.router.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

SERVICE = router_pb2.DESCRIPTOR.services_by_name["Router"].full_name


async def serve(config: RouterConfig, announcer: Announcer, stop: asyncio.Event) -> None:
    """Run one router until ``stop`` is set. Raises SetupError for a set-up that cannot work.

    It is ready as soon as it listens; requests wait in its queue for instances to appear.
    """
    announcer.update(state="loading", detail="loading the tokenizer", log_file=config.log_file)
    tokenizer = await asyncio.to_thread(Tokenizer.load, config.model)
    async with Front(config, tokenizer) as front:
        async with _listening(config, front) as (port, checks):
            async with _members(config, front):
                host = config.advertise_host or config.host
                address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
                announcer.update(state="ready", detail="", progress=1.0, address=address)
                logger.info("%s (incarnation %d) is ready at %s", config.name, config.incarnation, address)
                await stop.wait()
                announcer.update(state="draining", detail=f"{len(front.requests)} live requests")
                await checks.enter_graceful_shutdown()
                if not await front.drain(config.waits.drain_s):
                    logger.warning("%d requests did not end within %g s", len(front.requests), config.waits.drain_s)
                await front.close()
    announcer.update(state="stopped", detail="")
    logger.info("%s has stopped", config.name)


@contextlib.asynccontextmanager
async def _listening(config: RouterConfig, front: Front) -> AsyncIterator[tuple[int, Any]]:
    """The gRPC server with health and reflection; yields its port and the health servicer."""
    server = grpc.aio.server(options=server_options(config.limits.max_message_bytes, of_clients=True))
    handler = service_handler(router_pb2.DESCRIPTOR, "Router", RouterServicer(front), GetMessageClass)
    server.add_generic_rpc_handlers((handler,))
    checks = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    port = bind(server, config.host, config.port)
    await checks.set(SERVICE, health_pb2.HealthCheckResponse.SERVING)
    await server.start()
    try:
        yield port, checks
    finally:
        await server.stop(grace=0.5)


@contextlib.asynccontextmanager
async def _members(config: RouterConfig, front: Front) -> AsyncIterator[None]:
    """The fleet follows the controller, or is the static list."""
    if not config.controller:
        front.fleet.apply(static_members(config.prefill, config.decode), epoch=0)
        yield
        return
    watch = MembershipWatch(config.controller, front.report, front.fleet.apply)
    task = asyncio.create_task(watch.run(), name="membership")
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
