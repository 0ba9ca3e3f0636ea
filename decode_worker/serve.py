"""Serving a decode instance: scheduler and puller put together."""

import asyncio
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

from biphase.decode_worker.follower import follower_phase
from biphase.decode_worker.scheduler import DecodeScheduler
from biphase.decode_worker.worker import DecodeWorker
from biphase.engine.block_pool import BlockPool
from biphase.engine.engine import Engine
from biphase.engine.limits import Limits
from biphase.engine.ranks.channel import FindLeader, LeaderChannel
from biphase.engine.serving import serve_worker
from biphase.engine.worker import StepRunner
from biphase.engine.worker_config import WorkerConfig
from biphase.kvtransfer.choice import order
from biphase.kvtransfer.codec_choice import AUTO, CodecChooser
from biphase.kvtransfer.codec_times import measure
from biphase.kvtransfer.pull_ranks import LeaderPulls
from biphase.kvtransfer.puller import KvPuller
from biphase.kvtransfer.rank_memory import RankMemory
from biphase.kvtransfer.ranks import gather_endpoints
from biphase.kvtransfer.signature import KvSignatureValue
from biphase.kvtransfer.wires import reading
from biphase.protos.process import Announcer

__all__ = ["decode_phase", "follower_phase", "serve"]
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
async def decode_phase(
    config: WorkerConfig, engine: Engine, limits: Limits, runner: StepRunner, ranks: LeaderChannel | None = None
) -> AsyncIterator[tuple[DecodeWorker, str]]:
    """The decode worker with its puller. Nobody pulls from it: its KV address is empty."""
    pool = BlockPool(engine.num_blocks, engine.layout.block_size, hash_key=secrets.token_bytes(16))
    scheduler = DecodeScheduler(
        pool,
        limits,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        local_prefill_tokens=config.local_prefill_tokens,
        micro_batches=config.plan.pp,
        may_continue=engine.may_continue,
    )
    async with reading(own_host=config.rank_host, device=engine.config.device, wanted=config.kv_transport) as (
        wires,
        endpoint,
    ):
        signature = KvSignatureValue.of_engine(
            engine,
            instance=config.name,
            incarnation=config.incarnation,
            kv_codec=config.kv_codec,
            ranks=await gather_endpoints(endpoint, ranks),
        )
        codecs = CodecChooser(wanted=config.kv_codec)
        if config.kv_codec == AUTO:
            codecs.times = measure(engine.kv_memory)
        followers = None if ranks is None else LeaderPulls(ranks)
        puller = KvPuller(
            memory=RankMemory(engine.kv_memory, engine.full_layout, engine.plan, engine.rank),
            signature=signature,
            transports=wires,
            choose=partial(order, wanted=config.kv_transport),
            codecs=codecs,
            followers=followers,
            decoding=lambda: scheduler.num_running > 0,
        )
        worker = DecodeWorker(scheduler, runner, puller, pull_timeout_s=config.pull_timeout_s)
        try:
            yield worker, ""
        finally:
            await worker.close()
            await puller.close()
            if followers is not None:
                followers.detach()
