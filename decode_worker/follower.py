"""A decode rank that is not rank 0: it pulls what rank 0 gives it of every handoff."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from biphase.engine.engine import Engine
from biphase.engine.ranks.channel import FollowerChannel
from biphase.engine.worker_config import WorkerConfig
from biphase.kvtransfer.pull_ranks import FollowerPulls
from biphase.kvtransfer.rank_memory import RankMemory
from biphase.kvtransfer.rank_pull import RankPuller
from biphase.kvtransfer.ranks import tell_endpoint
from biphase.kvtransfer.wires import reading


@asynccontextmanager
async def follower_phase(config: WorkerConfig, engine: Engine, channel: FollowerChannel) -> AsyncIterator[None]:
    """This rank's puller; rank 0 is told what it can read by."""
    memory = RankMemory(engine.kv_memory, engine.full_layout, engine.plan, engine.rank)
    async with reading(own_host=config.rank_host, device=engine.config.device, wanted=config.kv_transport) as (
        wires,
        endpoint,
    ):
        puller = RankPuller(memory, wires)
        pulls = FollowerPulls(channel, puller)
        tell_endpoint(endpoint, channel)
        try:
            yield
        finally:
            await pulls.close()
            await puller.close()
