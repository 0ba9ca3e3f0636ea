"""The real CPU engine taking two steps at a time, as a GPU does: a launch returns at once, a thread runs them in order.

It finds out only when a step runs what the step before drew, keeps a freed block's readers honest (the KV of a step in
flight is written late), and refuses a plan that shares a block with another sequence in flight.
"""

import threading
from collections import deque
from concurrent.futures import Future
from dataclasses import replace
from queue import SimpleQueue
from typing import Any

import torch

from biphase.engine.config import EngineConfig
from biphase.engine.engine import Engine, Progress
from biphase.engine.step import StepPlan, StepResult
from biphase.protos.ids import BlockId, SeqId


class _Launched:
    def __init__(self) -> None:
        self.done: Future[StepResult] = Future()

    def wait(self) -> StepResult:
        return self.done.result()


class PipelinedEngine(Engine):
    """Everything but launches is the engine's that it wraps. ``error`` makes one step raise.

    ``hold()`` keeps launched steps from running until ``let_go()``; ``num_ahead`` counts launches behind a running step.
    """

    pipeline_depth = 2
    may_continue = True

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._steps: SimpleQueue[tuple[StepPlan, _Launched] | None] = SimpleQueue()
        self._in_flight: deque[StepPlan] = deque()
        self._drawn: dict[SeqId, int] = {}
        self._go = threading.Event()
        self._go.set()
        self.error: Exception | None = None
        self.num_ahead = 0
        self._thread = threading.Thread(target=self._run, name="device", daemon=True)
        self._thread.start()

    @staticmethod
    def load(config: EngineConfig, progress: Progress) -> "PipelinedEngine":
        return PipelinedEngine(Engine.load(config, progress))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def hold(self) -> None:
        self._go.clear()

    def let_go(self) -> None:
        self._go.set()

    def launch(self, plan: StepPlan) -> _Launched:
        launched = _Launched()
        self.num_ahead += bool(self._in_flight)
        self._in_flight.append(plan)
        assert len(self._in_flight) <= self.pipeline_depth
        owners: dict[BlockId, SeqId] = {}
        for part in (part for step in list(self._in_flight) for part in step.seqs):
            for block in part.blocks:
                assert owners.setdefault(block, part.seq_id) == part.seq_id, f"block {block} has two owners in flight"
        self._steps.put((plan, launched))
        return launched

    def close(self) -> None:
        self._steps.put(None)
        self._thread.join()

    def _run(self) -> None:
        torch.set_num_threads(self._engine.threads)
        while (item := self._steps.get()) is not None:
            plan, launched = item
            self._go.wait()
            drawn, self._drawn = self._drawn, {}
            try:
                if self.error is not None:
                    error, self.error = self.error, None
                    raise error
                # a step behind a failed one finds no token; what it draws from any other is dropped
                known = [
                    replace(part, token_ids=(drawn.get(part.seq_id, 0),), continues=False) if part.continues else part
                    for part in plan.seqs
                ]
                result = self._engine.execute(StepPlan(seqs=tuple(known)))
                pairs = zip(plan.seqs, result.tokens, strict=True)
                self._drawn = {part.seq_id: token for part, token in pairs if token is not None}
            except BaseException as error:  # noqa: BLE001 -- whoever waits hears of it
                self._in_flight.popleft()
                launched.done.set_exception(error)
            else:
                self._in_flight.popleft()
                launched.done.set_result(result)
