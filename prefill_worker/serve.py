"""Serving a prefill instance: scheduler, export table and KV endpoint put together."""

import asyncio
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from biphase.engine.block_pool import BlockPool
from biphase.engine.engine import Engine
from biphase.engine.limits import Limits
from biphase.engine.ranks.channel import FindLeader, LeaderChannel
from biphase.engine.serving import serve_worker
from biphase.engine.worker import StepRunner
from biphase.engine.worker_config import WorkerConfig
from biphase.kvtransfer.exports import ExportTable
from biphase.kvtransfer.grpc_server import GrpcKvServer
from biphase.kvtransfer.service import KvService
from biphase.kvtransfer.signature import KvSignatureValue
from biphase.prefill_worker.scheduler import PrefillScheduler
from biphase.prefill_worker.worker import PrefillWorker
from biphase.protos.process import Announcer


async def serve(
    config: WorkerConfig, announcer: Announcer, stop: asyncio.Event, find_leader: FindLeader | None = None
) -> None:
    """Load, listen, announce ``ready`` with the address; returns after ``stop`` when all is closed. SetupError."""
    await serve_worker(config, announcer, stop, prefill_phase, find_leader=find_leader)


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
    exports = ExportTable(pool, config.lease_s)
    worker = PrefillWorker(scheduler, runner, exports, name=config.name, incarnation=config.incarnation)
    signature = KvSignatureValue.of(
        engine.layout,
        instance=config.name,
        incarnation=config.incarnation,
        model_hash=engine.model_info.model_hash,
        rope=engine.rope_signature,
        content_digest=engine.kv_memory.content_digest,
    )
    service = KvService(exports=exports, memory=engine.kv_memory, signature=signature, on_ended=worker.export_ended)
    service.start()
    worker.transfer_counters = service.counters
    server = GrpcKvServer(service)
    worker.kv_address = config.address(await server.start(config.host, config.kv_port))
    try:
        yield worker, worker.kv_address
    finally:
        await server.stop()
        await service.stop()
