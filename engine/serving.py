"""Serving one worker: load the engine, listen, announce, wait for the end, close everything in order."""

import asyncio
import importlib.metadata
import logging
import os
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import Any

import grpc.aio
from google.protobuf.message_factory import GetMessageClass

from biphase.engine.engine import Engine
from biphase.engine.engine_thread import EngineThread
from biphase.engine.limits import Limits
from biphase.engine.link import Identity
from biphase.engine.link_service import LinkService
from biphase.engine.standard_services import StandardServices
from biphase.engine.worker import StepRunner, Worker
from biphase.engine.worker_config import WorkerConfig
from biphase.protos import worker_pb2
from biphase.protos.errors import Internal
from biphase.protos.grpc_setup import bind, server_options, service_handler
from biphase.protos.process import Announcer

_log = logging.getLogger(__name__)

FLUSH_S = 1.0
"""How long a stopping worker waits for its links to take their last messages."""

_SERVICE = worker_pb2.DESCRIPTOR.services_by_name["Worker"].full_name
_PROGRESS_EVERY_S = 0.2

Phase = Callable[[WorkerConfig, Engine, Limits, StepRunner], AbstractAsyncContextManager[tuple[Worker[Any, Any], str]]]
"""Makes a phase's worker, and the KV address that its Welcome names; closes what it made when left."""


async def serve_worker(config: WorkerConfig, announcer: Announcer, stop: asyncio.Event, phase: Phase) -> None:
    """Run one instance until ``stop`` is set. Raises SetupError for a set-up that cannot work."""
    announcer.update(state="loading", detail="starting the engine", log_file=config.log_file)
    async with AsyncExitStack() as closing:
        thread = EngineThread(config.step_engine)
        closing.push_async_callback(thread.close)
        engine = await _load(thread, announcer, stop)
        if engine is None:
            announcer.update(state="stopped", detail="")
            return
        info = engine.model_info
        limits = engine.limits
        worker, kv_address = await closing.enter_async_context(phase(config, engine, limits, thread))
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
        broken = stepping.done()
        announcer.update(state="draining", detail="stopping")
        await standard.set_serving(False)
        worker.stop()
        await asyncio.wait({stepping, stopping})
        await worker.legs_ended(FLUSH_S)
        if broken:
            _log.error("the step loop broke", exc_info=stepping.exception())
            raise Internal(f"{config.name}: the step loop broke: {stepping.exception()!r}")
        await service.close(FLUSH_S)
    announcer.update(state="stopped", detail="")
    _log.info("%s has stopped", config.name)


async def _load(thread: EngineThread, announcer: Announcer, stop: asyncio.Event) -> Engine | None:
    """Load the model, its progress announced a few times a second; None when told to stop meanwhile."""
    last_s, last_detail = 0.0, ""

    def progress(detail: str, share: float) -> None:
        nonlocal last_s, last_detail
        now_s = time.monotonic()
        if detail != last_detail or now_s - last_s >= _PROGRESS_EVERY_S:
            last_s, last_detail = now_s, detail
            announcer.update(state="loading", detail=detail, progress=share)

    loading = asyncio.create_task(thread.load(progress))
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait({loading, stopping}, return_when=asyncio.FIRST_COMPLETED)
    if not loading.done():
        announcer.update(state="loading", detail="stopping as soon as the engine is loaded")
    stopping.cancel()
    await asyncio.wait({loading, stopping})
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
