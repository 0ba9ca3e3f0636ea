"""A prefill rank that is not rank 0: it serves its part of every ticket that rank 0 opens."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from biphase.engine.engine import Engine
from biphase.engine.ranks.channel import FollowerChannel
from biphase.engine.step import StepPlan
from biphase.engine.worker_config import WorkerConfig
from biphase.kvtransfer.export_ranks import FollowerExports
from biphase.kvtransfer.ranks import tell_endpoint
from biphase.kvtransfer.wires import serving
from biphase.prefill_worker.kv import serve_kv


@asynccontextmanager
async def follower_phase(config: WorkerConfig, engine: Engine, channel: FollowerChannel) -> AsyncIterator[None]:
    """This rank's KV endpoint, listening on any free port; rank 0 is told where."""
    loop = asyncio.get_running_loop()
    exports = FollowerExports(channel)
    served = serve_kv(config, engine, exports.table, on_ended=exports.on_ended, on_readers=exports.on_readers)

    def layers_computed(plan: StepPlan, layers: int) -> None:
        for seq in plan.seqs:
            exports.layers_computed(seq.seq_id, seq.start + len(seq.token_ids), layers, engine.layout.num_layers)

    def on_layers(plan: StepPlan, layers: int) -> None:
        """In a thread of the engine's."""
        loop.call_soon_threadsafe(layers_computed, plan, layers)

    async with serving(
        served.service,
        host=config.host,
        port=0,
        address=config.address,
        own_host=config.rank_host,
        device=engine.config.device,
        wanted=config.kv_transport,
    ) as endpoint:
        exports.follow()
        engine.on_layers = on_layers
        tell_endpoint(endpoint, channel)
        try:
            yield
        finally:
            engine.on_layers = None
            exports.leave()
