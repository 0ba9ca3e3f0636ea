"""Requests through the real scheduler and engine in one thread, with every part of every step timed."""

import random
import statistics
import time
from dataclasses import dataclass

import numpy as np

from biphase.decode_worker.requests import DecodeRequest
from biphase.decode_worker.scheduler import DecodeScheduler
from biphase.engine.block_pool import BlockPool
from biphase.engine.cpu_engine import CpuEngine
from biphase.engine.step import SeqStep, StepPlan, StepResult
from biphase.protos.ids import BlockId, SeqId
from biphase.protos.values import Sampling


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """Where one step's time went, in seconds."""

    num_tokens: int
    schedule_s: float
    prepare_s: float
    compute_s: float
    complete_s: float

    @property
    def total_s(self) -> float:
        return self.schedule_s + self.prepare_s + self.compute_s + self.complete_s

    @property
    def bookkeeping_s(self) -> float:
        """Everything that is not the model: scheduling, batch preparation, booking the results."""
        return self.total_s - self.compute_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    seconds: float
    steps: list[Step]
    requests: int

    @property
    def decode_steps(self) -> list[Step]:
        """The steps that took one token of every request."""
        return [step for step in self.steps if step.num_tokens == self.requests]

    @property
    def decode_s(self) -> float:
        """Median time of a decode step."""
        return statistics.median(step.total_s for step in self.decode_steps)

    @property
    def bookkeeping_share(self) -> float:
        return statistics.median(step.bookkeeping_s / step.total_s for step in self.decode_steps)


class Colocated:
    """A decode worker's core without its network: local prefill and decode in this thread."""

    def __init__(self, engine: CpuEngine) -> None:
        self.engine = engine
        self._rng = random.Random(0)
        self._next_id = 0

    def run(self, requests: int, input_len: int, output_len: int, sampling: Sampling | None = None) -> Run:
        """That many requests at once, to their last token."""
        engine = self.engine
        pool = BlockPool(engine.num_blocks, engine.layout.block_size)
        limits = engine.limits
        scheduler = DecodeScheduler(pool, limits)
        base = sampling or Sampling()
        offers = [self._request(input_len, output_len, base, i) for i in range(requests)]
        steps: list[Step] = []
        start_s = time.perf_counter()
        for offer in offers:
            refusal = scheduler.offer(offer, start_s)
            if refusal is not None:
                raise RuntimeError(f"the scheduler refused a request: {refusal.detail}")
        while len(scheduler):
            begin_s = time.perf_counter()
            plan, _ = scheduler.schedule(begin_s)
            if plan is None:
                raise RuntimeError(f"nothing to compute, though requests are left: {scheduler!r}")
            scheduled_s = time.perf_counter()
            batch = engine.prepare(plan)
            prepared_s = time.perf_counter()
            tokens = engine.compute(plan, batch)
            computed_s = time.perf_counter()
            scheduler.complete(plan, StepResult(tokens=tokens, step_ms=(computed_s - scheduled_s) * 1e3), computed_s)
            steps.append(
                Step(
                    num_tokens=plan.num_tokens,
                    schedule_s=scheduled_s - begin_s,
                    prepare_s=prepared_s - scheduled_s,
                    compute_s=computed_s - prepared_s,
                    complete_s=time.perf_counter() - computed_s,
                )
            )
        return Run(seconds=time.perf_counter() - start_s, steps=steps, requests=requests)

    def _request(self, input_len: int, output_len: int, base: Sampling, i: int) -> DecodeRequest:
        self._next_id += 1
        vocab = self.engine.model_info.vocab_size
        return DecodeRequest(
            seq_id=SeqId(self._next_id),
            token_ids=[self._rng.randrange(vocab // 500, vocab * 4 // 5) for _ in range(input_len)],
            num_prompt_tokens=input_len,
            sampling=Sampling(
                temperature=base.temperature,
                top_k=base.top_k,
                top_p=base.top_p,
                min_p=base.min_p,
                seed=1000 + i,
                max_tokens=output_len,
                ignore_eos=True,
            ),
        )


class LongContext:
    """Decode steps of ``requests`` sequences whose ``context`` tokens of KV were put there, blocks in random order."""

    def __init__(self, engine: CpuEngine, requests: int, context: int) -> None:
        self._engine = engine
        self._context = context
        layout = engine.layout
        per_request = layout.blocks_for(context + 1)
        blocks = list(range(engine.num_blocks))
        random.Random(0).shuffle(blocks)
        self._tables = [
            [BlockId(block) for block in blocks[i * per_request : (i + 1) * per_request]] for i in range(requests)
        ]
        box = layout.box(context)
        values = np.random.default_rng(0).standard_normal(box.num_bytes(layout) // layout.itemsize, dtype=np.float32)
        for table in self._tables:
            engine.kv_memory.unpack(table, box, values)
        self.kv_bytes = requests * context * layout.token_bytes

    def step_s(self) -> float:
        """One decode step at that context (the same position is written each time)."""
        seqs = tuple(
            SeqStep(seq_id=SeqId(i), token_ids=(100 + i,), start=self._context, blocks=table, sampling=Sampling())
            for i, table in enumerate(self._tables)
        )
        start_s = time.perf_counter()
        self._engine.execute(StepPlan(seqs=seqs))
        return time.perf_counter() - start_s
