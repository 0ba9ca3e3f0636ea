"""Serving one worker: load the engine, listen, announce, wait for the end, close everything in order."""

import asyncio
import importlib.metadata
import logging
import os
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import Any

import grpc.aio
from google.protobuf.message_factory import GetMessageClass

from biphase.engine.engine import Engine
from biphase.engine.engine_thread import EngineThread
from biphase.engine.link import Identity
from biphase.engine.link_service import LinkService
from biphase.engine.ranks.channel import FindLeader, LeaderChannel
from biphase.engine.ranks.following import FollowerPhase, no_phase, serve_follower
from biphase.engine.ranks.joining import announcing
from biphase.engine.ranks.leading import OWN_REASON_S, leading
from biphase.engine.standard_services import StandardServices
from biphase.engine.worker import Worker, lost_line
from biphase.engine.worker_config import WorkerConfig
from biphase.protos import worker_pb2
from biphase.protos.errors import EngineLost, Internal, SetupError
from biphase.protos.grpc_setup import bind, server_options, service_handler
from biphase.protos.process import Announcer

_log = logging.getLogger(__name__)

FLUSH_S = 1.0
"""How long a stopping worker waits for its links to take their last messages."""

_SERVICE = worker_pb2.DESCRIPTOR.services_by_name["Worker"].full_name

Phase = Callable[..., AbstractAsyncContextManager[tuple[Worker[Any, Any], str]]]
"""Makes a phase's worker, and the KV address that its Welcome names; closes what it made when left.

Its arguments are WorkerConfig, Engine, Limits, StepRunner and, where the instance has several ranks, LeaderChannel."""


async def serve_worker(
    config: WorkerConfig,
    announcer: Announcer,
    stop: asyncio.Event,
    phase: Phase,
    follower_phase: FollowerPhase = no_phase,
    find_leader: FindLeader | None = None,
) -> None:
    """Run one rank of an instance, by default its only one, until ``stop`` is set. Raises SetupError for a set-up that
    cannot work. Where there are several, the loss of another one ends this process at once."""
    if config.rank > 0:
        await serve_follower(config, announcer, stop, follower_phase, find_leader)
        return
    announcer.update(state="loading", detail="starting the engine", log_file=config.log_file)
    async with AsyncExitStack() as closing:
        loaded = await closing.enter_async_context(_loaded(config, announcer, stop))
        if loaded is None:
            announcer.update(state="stopped", detail="")
            return
        engine, thread, ranks = loaded
        info = engine.model_info
        worker, kv_address = await closing.enter_async_context(phase(config, engine, engine.limits, thread, *ranks))
        service = LinkService(_identity(config, engine, kv_address), worker)
        port, standard = await closing.enter_async_context(_listening(config, service))
        stepping = asyncio.create_task(worker.run())
        stopping = asyncio.create_task(stop.wait())

        def draining() -> None:
            announcer.update(state="draining", detail="takes no new work")

        worker.on_drain = draining
        address = config.address(port)
        announcer.update(
            state="ready",
            detail="",
            progress=1.0,
            address=address,
            threads=engine.threads,
            kv_bytes=engine.kv_bytes,
            device=engine.device,
        )
        _log.info(
            "%s, a %s instance of %s (incarnation %d), is ready at %s: %d threads, %d blocks of %d tokens, %d bytes of KV",
            config.name,
            config.role,
            info.name,
            config.incarnation,
            address,
            engine.threads,
            engine.num_blocks,
            engine.layout.block_size,
            engine.kv_bytes,
        )
        await asyncio.wait({stepping, stopping}, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        broken = stepping.exception() if stepping.done() else None
        announcer.update(state="draining", detail="stopping")
        await standard.set_serving(False)
        worker.stop(*([lost_line(broken)] if isinstance(broken, EngineLost) else []))
        await asyncio.wait({stepping, stopping})
        await worker.legs_ended(FLUSH_S)
        if isinstance(broken, EngineLost):
            raise broken
        if broken is not None:
            _log.error("the step loop broke", exc_info=broken)
            raise Internal(f"{config.name}: the step loop broke: {broken!r}")
        await service.close(FLUSH_S)
    announcer.update(state="stopped", detail="")
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
    await standard.set_serving(True)
    await server.start()
    try:
        yield port, standard
    finally:
        await server.stop(grace=0.2)
