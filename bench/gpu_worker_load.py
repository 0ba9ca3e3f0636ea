"""The real decode worker under load in this process: requests that join and end, its link an object instead of a stream.

Used to see how much of the time the GPU has nothing to do (host gap).
"""

import asyncio
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from gpu_profile import idle_share_of

from biphase.decode_worker.serve import decode_phase
from biphase.decode_worker.worker import DecodeWorker
from biphase.engine.config import EngineConfig
from biphase.engine.engine import Engine
from biphase.engine.engine_thread import EngineThread
from biphase.engine.limits import Limits
from biphase.engine.link import Link, OpenLeg
from biphase.engine.sequence import Refusal
from biphase.engine.worker_config import WorkerConfig
from biphase.protos.ids import LegId, RequestId
from biphase.protos.values import LegOutcome, LegStats, Sampling

_WARM_UP_STEPS = 150
"""By then requests end and join all the time: none has more than 256 tokens to draw, and half have fewer than 132."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """``requests`` at once, each of ``prompt_len`` tokens: computed here, beside the others' decoding. A prompt of one token
    joins as one does whose KV has been handed over: nothing of it is left to be computed."""

    requests: int
    prompt_len: int

    def __str__(self) -> str:
        joining = f"prompts of {self.prompt_len} computed here" if self.prompt_len > 1 else "prompts computed elsewhere"
        return f"{self.requests} requests, {joining}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Gap:
    """``share`` of the window in which no kernel ran; None where nothing can be profiled."""

    load: Load
    share: float | None
    steps: int
    tokens: int
    superfluous: int


class _Source(Link):
    """A link that opens a new leg whenever one ends; nothing is sent."""

    def __init__(self, worker: DecodeWorker, limits: Limits, prompt_len: int) -> None:
        super().__init__(1, "bench", "router")
        self._worker = worker
        self._limits = limits
        self._prompt_len = prompt_len
        self._most_tokens = min(256, limits.max_model_len - prompt_len + 1)  # the last one drawn is not in the cache
        self._rng = random.Random(0)
        self._next = 0
        self.refusals: list[str] = []

    def open_another(self) -> None:
        self._next += 1
        tokens = [self._rng.randrange(self._limits.vocab_size) for _ in range(self._prompt_len)]
        leg = OpenLeg(
            role="decode",
            leg_id=LegId(self._next),
            request_id=RequestId(str(self._next)),
            token_ids=tokens,
            num_prompt_tokens=len(tokens),
            sampling=Sampling(temperature=0.8, top_p=0.95, seed=self._next, max_tokens=self._length()),
            refusals=0,
        )
        self._worker.open_leg(self, leg)

    def _length(self) -> int:
        return self._rng.randint(min(8, self._most_tokens), self._most_tokens)

    def ended(self, leg_id: LegId, outcome: LegOutcome, detail: str, stats: LegStats) -> None:
        if outcome != "done":
            self.refusals.append(f"{outcome}: {detail}")
        asyncio.get_running_loop().call_soon(self.open_another)

    def refused(self, leg_id: LegId, refusal: Refusal) -> None:
        self.refusals.append(refusal.detail)

    def _send(self, message: object) -> None:
        pass


async def host_gaps(
    config: EngineConfig,
    loads: Sequence[Load],
    *,
    steps: int,
    trace: Path | None,
    found: Callable[[Gap], None],
    small: bool = False,
) -> None:
    """For each load some steps of warming up, then ``steps`` that are measured. One engine for all."""
    sizes = {"max_num_seqs": 2, "max_num_batched_tokens": 16, "local_prefill_tokens": 8} if small else {}
    worker_config = WorkerConfig(name="bench", role="decode", incarnation=1, engine=config, **sizes)  # type: ignore[arg-type]
    thread = EngineThread(worker_config.step_engine)
    try:
        engine = await thread.load(lambda detail, done: None)
        for load in loads:
            found(await _host_gap(worker_config, thread, engine, load, steps, trace))
            trace = None
    finally:
        await thread.close()


async def _host_gap(
    config: WorkerConfig, thread: EngineThread, engine: Engine, load: Load, steps: int, trace: Path | None
) -> Gap:
    limits = engine.limits
    async with decode_phase(config, engine, limits, thread) as (worker, _):
        source = _Source(worker, limits, load.prompt_len)
        running = asyncio.create_task(worker.run())
        for _ in range(load.requests):
            source.open_another()
        await _steps(worker, min(steps, _WARM_UP_STEPS), source)
        before = worker.counters()
        share = await idle_share_of(lambda: _steps(worker, steps, source), trace)
        after = worker.counters()
        worker.stop()
        await running
    return Gap(
        load=load,
        share=share,
        steps=after["steps"] - before["steps"],
        tokens=after["tokens"] - before["tokens"],
        superfluous=after["superfluous_tokens"] - before["superfluous_tokens"],
    )


async def _steps(worker: DecodeWorker, count: int, source: _Source) -> None:
    until = worker.counters()["steps"] + count
    while worker.counters()["steps"] < until:
        if source.refusals:
            raise RuntimeError(f"the worker under load said: {source.refusals[0]}")
        await asyncio.sleep(0.005)
