"""The real decode worker under load in this process: requests that join and end, its link an object instead of a stream.

Used to see how much of the time the GPU has nothing to do (host gap).
"""

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from biphase.decode_worker.serve import decode_phase
from biphase.decode_worker.worker import DecodeWorker
from biphase.engine.config import EngineConfig
from biphase.engine.engine_thread import EngineThread
from biphase.engine.limits import Limits
from biphase.engine.link import Link, OpenLeg
from biphase.engine.sequence import Refusal
from biphase.engine.worker_config import WorkerConfig
from biphase.protos.ids import LegId, RequestId
from biphase.protos.values import LegOutcome, LegStats, Sampling


@dataclass(frozen=True, slots=True, kw_only=True)
class Gap:
    """``share`` of the window in which no kernel ran; None where nothing can be profiled."""

    share: float | None
    steps: int
    tokens: int
    superfluous: int


class _Source(Link):
    """A link that opens a new leg whenever one ends; nothing is sent."""

    def __init__(self, worker: DecodeWorker, vocab_size: int, prompt_len: int) -> None:
        super().__init__(1, "bench", "router")
        self._worker = worker
        self._vocab_size = vocab_size
        self._prompt_len = prompt_len
        self._rng = random.Random(0)
        self._next = 0
        self.refusals: list[str] = []

    def open_another(self) -> None:
        self._next += 1
        tokens = [self._rng.randrange(self._vocab_size) for _ in range(self._prompt_len)]
        leg = OpenLeg(
            role="decode",
            leg_id=LegId(self._next),
            request_id=RequestId(str(self._next)),
            token_ids=tokens,
            num_prompt_tokens=len(tokens),
            sampling=Sampling(temperature=0.8, top_p=0.95, seed=self._next, max_tokens=self._rng.randint(8, 256)),
            refusals=0,
        )
        self._worker.open_leg(self, leg)

    def ended(self, leg_id: LegId, outcome: LegOutcome, detail: str, stats: LegStats) -> None:
        if outcome != "done":
            self.refusals.append(f"{outcome}: {detail}")
        asyncio.get_running_loop().call_soon(self.open_another)

    def refused(self, leg_id: LegId, refusal: Refusal) -> None:
        self.refusals.append(refusal.detail)

    def _send(self, message: object) -> None:
        pass


async def host_gap(config: EngineConfig, *, requests: int, prompt_len: int, steps: int, trace: Path | None) -> Gap:
    """``requests`` at once, as they end others join; measured over ``steps`` steps after as many of warming up."""
    worker_config = WorkerConfig(
        name="bench", role="decode", incarnation=1, engine=config, max_num_seqs=max(64, requests)
    )
    thread = EngineThread(worker_config.step_engine)
    try:
        engine = await thread.load(lambda detail, done: None)
        info = engine.model_info
        limits = Limits(
            vocab_size=info.vocab_size,
            max_model_len=info.max_model_len,
            eos_token_ids=info.eos_token_ids,
            num_blocks=engine.num_blocks,
            block_size=engine.layout.block_size,
        )
        async with decode_phase(worker_config, engine, limits, thread) as (worker, _):
            source = _Source(worker, info.vocab_size, prompt_len)
            running = asyncio.create_task(worker.run())
            for _ in range(requests):
                source.open_another()
            await _steps(worker, steps, source)
            before = worker.counters()
            share = await _idle_share(lambda: _steps(worker, steps, source), trace)
            after = worker.counters()
            worker.stop()
            await running
    finally:
        await thread.close()
    return Gap(
        share=share,
        steps=after["steps"] - before["steps"],
        tokens=after["tokens"] - before["tokens"],
        superfluous=after.get("superfluous_tokens", 0) - before.get("superfluous_tokens", 0),
    )


async def _steps(worker: DecodeWorker, count: int, source: _Source) -> None:
    until = worker.counters()["steps"] + count
    while worker.counters()["steps"] < until:
        if source.refusals:
            raise RuntimeError(f"the worker under load said: {source.refusals[0]}")
        await asyncio.sleep(0.005)


async def _idle_share(run: Callable[[], Awaitable[None]], trace: Path | None) -> float | None:
    if not torch.cuda.is_available():
        await run()
        return None
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        await run()
        torch.cuda.synchronize()
    if trace is not None:
        profiler.export_chrome_trace(str(trace))
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.device_type == torch.autograd.DeviceType.CUDA and event.time_range.end > event.time_range.start
    )
    return idle_share(spans)


def idle_share(spans: list[tuple[float, float]]) -> float:
    """Of the time from the first start to the last end, the share that no span covers; ``spans`` sorted by start."""
    if not spans:
        raise RuntimeError("the profiler saw no kernel")
    busy, reached = 0.0, spans[0][0]
    for start, end in spans:
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return 1 - busy / (reached - spans[0][0])
