"""Serving a prefill instance: scheduler, export table and KV endpoint put together."""

import asyncio
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

from biphase.engine.block_pool import BlockPool
from biphase.engine.engine import Engine
from biphase.engine.limits import Limits
from biphase.engine.ranks.channel import FindLeader, LeaderChannel
from biphase.engine.serving import serve_worker
from biphase.engine.step import StepPlan
from biphase.engine.worker import StepRunner
from biphase.engine.worker_config import WorkerConfig
from biphase.kvtransfer.export_ranks import LeaderExports
from biphase.kvtransfer.exports import ExportTable
from biphase.kvtransfer.ranks import gather_endpoints
from biphase.kvtransfer.wires import serving
from biphase.prefill_worker.follower import follower_phase
from biphase.prefill_worker.kv import serve_kv
from biphase.prefill_worker.scheduler import PrefillScheduler
from biphase.prefill_worker.worker import PrefillWorker
from biphase.protos.process import Announcer

__all__ = ["follower_phase", "prefill_phase", "serve"]
"""The first two are found by their names (engine/roles.py)."""


async def serve(
    config: WorkerConfig,
    announcer: Announcer,
    stop: asyncio.Event,
    find_leader: FindLeader | None = None,
    *,
    now: asyncio.Event | None = None,
) -> None:
    """Load, listen, announce ``ready`` with the address; returns after ``stop`` when all is closed. SetupError."""
    await serve_worker(config, announcer, stop, find_leader, now=now)


@asynccontextmanager
async def prefill_phase(
    config: WorkerConfig, engine: Engine, limits: Limits, runner: StepRunner, ranks: LeaderChannel | None = None
) -> AsyncIterator[tuple[PrefillWorker, str]]:
    """The prefill worker with its KV endpoint listening, and the endpoint's address."""
    pool = BlockPool(engine.num_blocks, engine.layout.block_size, hash_key=secrets.token_bytes(16))
    scheduler = PrefillScheduler(
        pool,
        limits,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_num_seqs=config.max_num_seqs,
        max_queued_tokens=config.queue_tokens,
    )
    followers = None if ranks is None else LeaderExports(ranks)
    exports = ExportTable(pool, config.lease_s, followers)
    if followers is not None:
        followers.attach(exports)
    worker = PrefillWorker(scheduler, runner, exports, name=config.name, incarnation=config.incarnation)
    served = serve_kv(config, engine, exports, on_ended=worker.export_ended)
    worker.transfer_counters = served.counters
    loop = asyncio.get_running_loop()

    def on_layers(plan: StepPlan, layers: int) -> None:
        """In a thread of the engine's."""
        loop.call_soon_threadsafe(worker.layers_computed, plan, layers)

    async with serving(
        served.service,
        host=config.host,
        port=config.kv_port,
        address=config.address,
        own_host=config.rank_host,
        device=engine.config.device,
        wanted=config.kv_transport,
    ) as endpoint:
        endpoints = await gather_endpoints(endpoint, ranks)
        served.service.signature = replace(served.service.signature, ranks=endpoints)
        worker.kv_address = endpoint.grpc
        engine.on_layers = on_layers
        try:
            yield worker, worker.kv_address
        finally:
            engine.on_layers = None
            if followers is not None:
                followers.detach()
