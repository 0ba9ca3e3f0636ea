"""A worker shell in this process: real links over loopback, an engine that draws by rule and can be held or broken."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import grpc.aio
from google.protobuf.message_factory import GetMessageClass

from biphase.engine.limits import Limits
from biphase.engine.link import Identity
from biphase.engine.link_service import LinkService
from biphase.engine.orders import Orders
from biphase.engine.step import StepPlan, StepResult
from biphase.engine.worker import Worker
from biphase.protos import worker_pb2
from biphase.protos.grpc_setup import bind, server_options, service_handler
from biphase.protos.values import ModelInfo, Role

BLOCK_SIZE = 4
LIMITS = Limits(vocab_size=1000, max_model_len=256, eos_token_ids=(2,), num_blocks=64, block_size=BLOCK_SIZE)


class RuleEngine:
    """Draws 100 + output index. ``hold()`` keeps the next steps until ``let_go()``; ``error`` makes one step raise."""

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.plans: list[StepPlan] = []
        self._go = asyncio.Event()
        self._go.set()
        self.waiting = asyncio.Event()

    def hold(self) -> None:
        self._go.clear()
        self.waiting.clear()

    def let_go(self) -> None:
        self._go.set()

    pipeline_depth = 1

    def launch(self, plan: StepPlan) -> asyncio.Future[StepResult]:
        return asyncio.ensure_future(self._run(plan))

    async def _run(self, plan: StepPlan) -> StepResult:
        self.plans.append(plan)
        self.waiting.set()
        await asyncio.sleep(0)
        await self._go.wait()
        if self.error is not None:
            error, self.error = self.error, None
            raise error
        tokens = tuple(100 + part.output_index if part.sampling else None for part in plan.seqs)
        return StepResult(tokens=tokens, step_ms=0.1)


@contextlib.asynccontextmanager
async def serving(worker: Worker[Any, Any], role: Role) -> AsyncIterator[tuple[str, LinkService]]:
    """Serve links for ``worker`` and step it; yields the address and the service."""
    identity = Identity(
        name=f"{role}-0",
        role=role,
        incarnation=3,
        pid=1,
        model=ModelInfo(
            name="rule",
            model_hash=b"",
            vocab_size=1000,
            max_model_len=256,
            eos_token_ids=(2,),
            architecture="rule",
            dtype="float32",
        ),
        kv_address="",
        num_blocks=64,
        block_size=BLOCK_SIZE,
        max_num_seqs=8,
        max_num_batched_tokens=64,
        max_queued_tokens=128,
        threads=1,
        kv_bytes=0,
        version="0",
    )
    service = LinkService()
    service.begin(identity, worker, Orders(worker, identity))
    server = grpc.aio.server(options=server_options())
    server.add_generic_rpc_handlers((service_handler(worker_pb2.DESCRIPTOR, "Worker", service, GetMessageClass),))
    port = bind(server, "127.0.0.1", 0)
    await server.start()
    stepping = asyncio.create_task(worker.run())
    try:
        yield f"127.0.0.1:{port}", service
    finally:
        worker.stop()
        await stepping
        await worker.legs_ended(5.0)
        await service.end("the instance stops", 5.0)
        await server.stop(None)
