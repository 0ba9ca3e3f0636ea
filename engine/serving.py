"""Serving one worker: load the engine, listen, announce, wait for the end, close everything in order."""

import asyncio
import importlib.metadata
import logging
import os
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import grpc.aio
from google.protobuf.message_factory import GetMessageClass

from biphase.engine.engine import Engine
from biphase.engine.engine_thread import EngineThread
from biphase.engine.life import Ends, Life
from biphase.engine.link import Identity
from biphase.engine.link_service import LinkService
from biphase.engine.ranks.channel import FindLeader, LeaderChannel
from biphase.engine.ranks.following import serve_follower
from biphase.engine.ranks.joining import announcing
from biphase.engine.ranks.leading import OWN_REASON_S, leading
from biphase.engine.roles import Roles, all_roles
from biphase.engine.standard_services import StandardServices
from biphase.engine.step_book import StepFits
from biphase.engine.worker_config import WorkerConfig
from biphase.protos import worker_pb2
from biphase.protos.errors import EngineLost, SetupError
from biphase.protos.grpc_setup import bind, server_options, service_handler
from biphase.protos.process import Announcer

_log = logging.getLogger(__name__)

_SERVICE = worker_pb2.DESCRIPTOR.services_by_name["Worker"].full_name


async def serve_worker(
    config: WorkerConfig,
    announcer: Announcer,
    stop: asyncio.Event,
    find_leader: FindLeader | None = None,
    *,
    now: asyncio.Event | None = None,
    roles: Roles | None = None,
) -> None:
    """Run one rank of an instance, by default its only one, until ``stop`` or ``now`` is set (life.Ends). Raises SetupError
    for a set-up that cannot work. Where there are several, the loss of another one ends this process at once.

    It begins in the config's role, and turns into others of ``roles`` (default: all) as it is ordered to."""
    roles = all_roles() if roles is None else roles
    ends = Ends(stop=stop, now=asyncio.Event() if now is None else now)
    if config.rank > 0:
        follower_phases = {role: parts.follow for role, parts in roles.items()}
        await serve_follower(config, announcer, stop, follower_phases, find_leader)
        return
    announcer.update(state="loading", detail="starting the engine", log_file=config.log_file)
    async with AsyncExitStack() as closing:
        loaded = await closing.enter_async_context(_loaded(config, announcer, stop))
        if loaded is None:
            announcer.update(state="stopped", detail="")
            return
        engine, thread, ranks = loaded
        service = LinkService()
        port, standard = await closing.enter_async_context(_listening(config, service))
        address = config.address(port)
        _log.info(
            "%s has %s loaded, listens at %s: %d threads, %d blocks of %d tokens, %d bytes of KV",
            config.name,
            engine.model_info.name,
            address,
            engine.threads,
            engine.num_blocks,
            engine.layout.block_size,
            engine.kv_bytes,
        )
        fits, began_s, turned_ms = StepFits(), 0.0, 0
        while True:
            async with roles[config.role].lead(config, engine, engine.limits, thread, *ranks) as (worker, kv_address):
                if began_s:
                    turned_ms = round((time.monotonic() - began_s) * 1e3)
                    _log.info("%s has turned within %d ms", config.name, turned_ms)
                worker.steps.fits, worker.turned_ms = fits, turned_ms
                life = Life(
                    config,
                    worker,
                    _identity(config, engine, kv_address),
                    service=service,
                    standard=standard,
                    announcer=announcer,
                    roles=roles,
                )
                _log.info("%s serves as a %s instance, incarnation %d", config.name, config.role, config.incarnation)
                turn = await life.run(
                    ends, address=address, threads=engine.threads, kv_bytes=engine.kv_bytes, device=engine.device
                )
                if turn is None:
                    break
                began_s = life.drained_s
                engine.turn(turn.role, turn.incarnation)
            config = config.as_role(turn.role, turn.incarnation)
    announcer.update(state="stopped", detail=life.orders.retired)
    _log.info("%s has stopped", config.name)


@asynccontextmanager
async def _loaded(
    config: WorkerConfig, announcer: Announcer, stop: asyncio.Event
) -> AsyncIterator[tuple[Engine, EngineThread, tuple[LeaderChannel, ...]] | None]:
    """The engine, on one rank or on several, and what runs its steps; None when told to stop meanwhile."""
    if config.plan.num_ranks == 1:
        thread = EngineThread(config.step_engine)
        try:
            engine = await _load(thread, announcer, stop)
            yield None if engine is None else (engine, thread, ())
        finally:
            await thread.close()
        return
    async with leading(config, announcer, stop) as leader:
        if leader is None:
            yield None
            return
        engine = await _load(leader.thread, announcer, stop, asyncio.wrap_future(leader.failed))
        yield None if engine is None else (engine, leader.thread, (leader.channel,))


async def _load(
    thread: EngineThread, announcer: Announcer, stop: asyncio.Event, failed: "asyncio.Future[Exception] | None" = None
) -> Engine | None:
    """Load the model, its progress announced; None when told to stop meanwhile. ``failed``: why another rank has not."""
    loading = asyncio.create_task(thread.load(announcing(announcer)))
    stopping = asyncio.create_task(stop.wait())
    ends: set[asyncio.Future[Any]] = {loading} if failed is None else {loading, failed}
    await asyncio.wait({*ends, stopping}, return_when=asyncio.FIRST_COMPLETED)
    if not any(end.done() for end in ends):
        announcer.update(state="loading", detail="stopping as soon as the engine is loaded")
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    await asyncio.wait({stopping})
    if failed is not None:
        if not failed.done() and isinstance(loading.exception(), EngineLost):
            await asyncio.wait({failed}, timeout=OWN_REASON_S)  # a rank that we miss may be about to say why
        if failed.done():
            await asyncio.wait({loading}, timeout=OWN_REASON_S)
            if not loading.done():
                loading.cancel()
                raise failed.result()
            if not isinstance(loading.exception(), SetupError):
                raise failed.result()
    engine = loading.result()
    return None if stop.is_set() else engine


def _identity(config: WorkerConfig, engine: Engine, kv_address: str) -> Identity:
    return Identity(
        name=config.name,
        role=config.role,
        incarnation=config.incarnation,
        pid=os.getpid(),
        model=engine.model_info,
        kv_address=kv_address,
        num_blocks=engine.num_blocks,
        block_size=engine.layout.block_size,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_queued_tokens=config.queue_tokens,
        threads=engine.threads,
        kv_bytes=engine.kv_bytes,
        version=_version(),
    )


def _version() -> str:
    try:
        return importlib.metadata.version("biphase")
    except importlib.metadata.PackageNotFoundError:  # run from a source tree that is not installed
        return "unknown"


@asynccontextmanager
async def _listening(config: WorkerConfig, service: LinkService) -> AsyncIterator[tuple[int, StandardServices]]:
    """The worker's gRPC server with health and reflection; yields its port."""
    server = grpc.aio.server(options=server_options())
    server.add_generic_rpc_handlers((service_handler(worker_pb2.DESCRIPTOR, "Worker", service, GetMessageClass),))
    standard = StandardServices(server, _SERVICE)
    port = bind(server, config.host, config.port)
    await standard.set_serving(False)
    await server.start()
    try:
        yield port, standard
    finally:
        await server.stop(grace=0.2)
