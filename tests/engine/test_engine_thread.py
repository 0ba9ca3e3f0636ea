"""The engine thread with an engine whose launches return early: order, errors, and what runs where."""

import asyncio
import threading
from collections.abc import AsyncIterator
from queue import SimpleQueue
from typing import Any

import pytest_asyncio

from biphase.engine.config import EngineConfig
from biphase.engine.engine_thread import EngineThread
from biphase.engine.step import DoneStep, PendingStep, SeqStep, StepPlan, StepResult
from biphase.protos.errors import InvalidRequest
from biphase.protos.ids import BlockId, SeqId


def plan_of(seq_id: int) -> StepPlan:
    return StepPlan(seqs=(SeqStep(seq_id=SeqId(seq_id), token_ids=(1,), start=0, blocks=(BlockId(0),)),))


class HandStep:
    """Over when the test says so."""

    def __init__(self) -> None:
        self.outcome: SimpleQueue[StepResult | Exception] = SimpleQueue()
        self.waited_in = ""

    def wait(self) -> StepResult:
        self.waited_in = threading.current_thread().name
        outcome = self.outcome.get()
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def end(self, token: int) -> None:
        self.outcome.put(StepResult(tokens=(token,), step_ms=1.0))


class HandEngine:
    pipeline_depth = 2

    def __init__(self) -> None:
        self.steps: dict[int, HandStep] = {}
        self.launched: SimpleQueue[int] = SimpleQueue()

    def launch(self, plan: StepPlan) -> PendingStep:
        (part,) = plan.seqs
        if part.seq_id < 0:
            raise InvalidRequest("no such step")
        if part.seq_id == 0:
            return DoneStep(result=StepResult(tokens=(0,), step_ms=1.0))
        self.steps[part.seq_id] = HandStep()
        self.launched.put(part.seq_id)
        return self.steps[part.seq_id]


@pytest_asyncio.fixture
async def hand() -> AsyncIterator[tuple[EngineThread, Any]]:
    engine = HandEngine()
    thread = EngineThread(EngineConfig(model="none"), load=lambda config, progress: engine)  # type: ignore[arg-type, return-value]
    assert thread.pipeline_depth == 1
    await thread.load(lambda detail, done: None)
    assert thread.pipeline_depth == 2
    yield thread, engine
    await thread.close()
    assert not {"engine", "completions"} & {thread.name for thread in threading.enumerate()}


async def launched(engine: HandEngine) -> int:
    return await asyncio.get_running_loop().run_in_executor(None, engine.launched.get)


async def test_the_next_step_is_launched_while_the_last_one_runs(hand: tuple[EngineThread, HandEngine]) -> None:
    thread, engine = hand
    first, second = thread.launch(plan_of(1)), thread.launch(plan_of(2))
    assert [await launched(engine), await launched(engine)] == [1, 2]
    assert not first.done() and not second.done()
    engine.steps[1].end(11)
    assert (await first).tokens == (11,) and not second.done()
    engine.steps[2].end(12)
    assert (await second).tokens == (12,)
    assert engine.steps[1].waited_in == engine.steps[2].waited_in == "completions"


async def test_an_error_of_a_launch_or_of_a_step_is_that_steps_alone(hand: tuple[EngineThread, HandEngine]) -> None:
    thread, engine = hand
    steps = [thread.launch(plan_of(n)) for n in (1, -1, 2)]
    await launched(engine), await launched(engine)
    engine.steps[1].outcome.put(RuntimeError("kernel says no"))
    engine.steps[2].end(12)
    failed, refused, done = await asyncio.gather(*steps, return_exceptions=True)
    assert str(failed) == "kernel says no" and isinstance(refused, InvalidRequest)
    assert isinstance(done, StepResult) and done.tokens == (12,)


async def test_a_cancelled_await_stops_no_step_and_no_thread(hand: tuple[EngineThread, HandEngine]) -> None:
    thread, engine = hand
    first, second = thread.launch(plan_of(1)), thread.launch(plan_of(2))
    await launched(engine), await launched(engine)
    first.cancel()
    engine.steps[1].end(11)
    engine.steps[2].end(12)
    assert (await second).tokens == (12,)


async def test_a_step_that_is_over_at_once_needs_no_second_thread(hand: tuple[EngineThread, HandEngine]) -> None:
    thread, _ = hand
    assert (await thread.run(plan_of(0))).tokens == (0,)
    assert "completions" not in {thread.name for thread in threading.enumerate()}
