"""Steps over real channels, the ranks' engines played by hand: what a step gives, what ends it, who is blamed."""

import asyncio
import queue
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import pytest_asyncio

from biphase.engine.plan_limits import PlanLimits
from biphase.engine.ranks.channel import FollowerChannel, LeaderChannel
from biphase.engine.ranks.connection import Message
from biphase.engine.ranks.greeting import Membership
from biphase.engine.ranks.leader_engine import LeaderEngine
from biphase.engine.ranks.step_message import done_message, failed_message, plan_of
from biphase.engine.step import DoneStep, PendingStep, SeqStep, StepPlan, StepResult
from biphase.protos.errors import EngineLost, InvalidRequest
from biphase.protos.ids import BlockId, SeqId
from biphase.protos.parallel_plan import ParallelPlan
from biphase.protos.values import Sampling

PLAN = ParallelPlan(tp=1, pp=3)
SAMPLING = Sampling(temperature=0.7, seed=2**64 - 1, top_p=0.9, stop_token_ids=(5, 7))


def step_plan(*seq_ids: int, continues: bool = False) -> StepPlan:
    return StepPlan(
        seqs=tuple(
            SeqStep(
                seq_id=SeqId(seq_id),
                token_ids=(seq_id, 2**17),
                start=4,
                blocks=(BlockId(0), BlockId(63)),
                sampling=SAMPLING,
                output_index=3,
                forbid_ids=(2,),
                continues=continues,
            )
            for seq_id in seq_ids
        )
    )


class HeldStep:
    """Not over before it is let go, as on a device that hangs."""

    def __init__(self, go: threading.Event) -> None:
        self._go = go

    def wait(self) -> StepResult:
        self._go.wait()
        return StepResult(tokens=(None,), step_ms=1.0)


class HandEngine:
    """Rank 0's own: draws nothing, as a first stage; ``error`` makes a launch raise, ``hold`` a step wait."""

    plan = PLAN
    pipeline_depth = 4
    may_continue = False
    plan_limits = PlanLimits(block_size=4, num_blocks=64, vocab_size=2**18, max_model_len=64)

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.hold: threading.Event | None = None

    def launch(self, plan: StepPlan) -> PendingStep:
        if self.error is not None:
            raise self.error
        if self.hold is not None:
            return HeldStep(self.hold)
        return DoneStep(result=StepResult(tokens=(None,) * len(plan.seqs), step_ms=1.0))


@dataclass
class Instance:
    leader: LeaderChannel
    followers: list[FollowerChannel]
    own: HandEngine
    engine: LeaderEngine
    steps: queue.SimpleQueue[Message] = field(default_factory=queue.SimpleQueue)
    """That reached rank 2."""

    async def wait(self, pending: PendingStep) -> StepResult:
        return await asyncio.wait_for(asyncio.to_thread(pending.wait), 10)

    async def lost(self) -> str:
        return await asyncio.wait_for(asyncio.wrap_future(self.leader.lost), 10)


@pytest_asyncio.fixture
async def make() -> AsyncIterator[Callable[..., Any]]:
    channels: list[LeaderChannel | FollowerChannel] = []

    async def made(step_timeout_s: float = 60.0) -> Instance:
        def member(rank: int) -> Membership:
            return Membership(instance="prefill-0", plan=PLAN, rank=rank, key="0" * 32)

        leader = LeaderChannel(member(0), "127.0.0.1")

        async def find() -> str:
            return f"127.0.0.1:{leader.port}"

        gathering = asyncio.create_task(leader.gather(10))
        followers = [await FollowerChannel.join(member(rank), find, 10) for rank in (1, 2)]
        await gathering
        channels.extend([*followers, leader])
        own: Any = HandEngine()
        engine = LeaderEngine(own, leader, step_timeout_s=step_timeout_s, kv_bytes=1, threads=3)
        instance = Instance(leader, followers, own, engine)
        followers[1].subscribe("step", instance.steps.put, direct=True)
        return instance

    yield made
    for channel in channels:
        channel.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("rank beats")]


async def test_a_step_is_over_when_every_rank_says_so_and_has_the_tokens_of_the_last_stage(make: Any) -> None:
    instance: Instance = await make()
    plans = [step_plan(1, 2), step_plan(3)]
    seen: asyncio.Queue[StepPlan] = asyncio.Queue()
    instance.followers[0].subscribe("step", lambda message: seen.put_nowait(plan_of(message)))
    first, second = [instance.engine.launch(plan) for plan in plans]
    for plan in plans:
        got = await asyncio.wait_for(seen.get(), 10)
        for mine, theirs in zip(plan.seqs, got.seqs, strict=True):
            assert (list(mine.token_ids), list(mine.blocks)) == (theirs.token_ids, theirs.blocks)
            for name in ("seq_id", "start", "sampling", "output_index", "forbid_ids", "continues"):
                assert getattr(mine, name) == getattr(theirs, name)
    one, two = instance.followers
    two.send(done_message(0, (11, None)))
    two.send(done_message(1, (13,)))
    one.send(done_message(0, None))
    assert (await instance.wait(first)).tokens == (11, None)
    waiting = asyncio.create_task(instance.wait(second))
    one.send(done_message(1, None))
    assert (await waiting).tokens == (13,)
    assert not instance.leader.lost.done()


async def test_what_cannot_be_computed_is_refused_before_it_is_sent(make: Any) -> None:
    instance: Instance = await make()
    with pytest.raises(InvalidRequest, match="pool holds 0 .. 63"):
        bad = SeqStep(seq_id=SeqId(1), token_ids=(1,), start=0, blocks=(BlockId(64),))
        instance.engine.launch(StepPlan(seqs=(bad,)))
    with pytest.raises(InvalidRequest, match="continues a running step, which tp 1 x pp 3 does not do"):
        instance.engine.launch(step_plan(1, continues=True))
    last = instance.engine.launch(step_plan(5))
    for follower in instance.followers:
        follower.send(done_message(0, (7,)))
    assert (await instance.wait(last)).tokens == (7,)
    # a connection keeps the order: a refused step would have reached rank 2 first
    arrived = await asyncio.to_thread(instance.steps.get, timeout=10)
    assert plan_of(arrived).seqs[0].seq_id == 5
    assert instance.steps.empty()


async def test_a_plan_that_every_rank_refuses_costs_that_step_alone(make: Any) -> None:
    instance: Instance = await make()
    instance.own.error = InvalidRequest("no")
    refused = instance.engine.launch(step_plan(1))
    for follower in instance.followers:
        follower.send(failed_message(0, InvalidRequest("no")))
    with pytest.raises(InvalidRequest, match="no"):
        await instance.wait(refused)
    instance.own.error = None
    fine = instance.engine.launch(step_plan(2))
    for follower in instance.followers:
        follower.send(done_message(1, (9,)))
    assert (await instance.wait(fine)).tokens == (9,)


async def test_an_error_on_one_rank_is_the_end_of_the_instance(make: Any) -> None:
    instance: Instance = await make()
    steps = [instance.engine.launch(step_plan(n)) for n in (1, 2)]
    instance.followers[0].send(failed_message(0, ValueError("bad kernel")))
    assert await instance.lost() == "rank 1: ValueError: bad kernel"
    for step in steps:
        with pytest.raises(EngineLost, match="bad kernel"):
            await instance.wait(step)
    with pytest.raises(EngineLost, match="bad kernel"):
        instance.engine.launch(step_plan(3))


async def test_rank_0_failing_in_a_step_is_the_end_too(make: Any) -> None:
    instance: Instance = await make()
    instance.own.error = RuntimeError("out of memory")
    with pytest.raises(EngineLost, match="rank 0: RuntimeError: out of memory"):
        await asyncio.to_thread(instance.engine.launch, step_plan(1))
    assert await instance.lost() == "rank 0: RuntimeError: out of memory"


async def test_who_is_gone_is_blamed_and_not_who_noticed_it_first(make: Any) -> None:
    instance: Instance = await make()
    step = instance.engine.launch(step_plan(1))
    instance.followers[0].send(failed_message(0, EngineLost("a sum: another rank is lost")))
    instance.followers[1].close()
    assert await instance.lost() == "rank 2 has closed its connection"
    with pytest.raises(EngineLost, match="rank 2 has closed its connection"):
        await instance.wait(step)


async def test_a_step_that_is_not_over_in_time_is_the_end(make: Any) -> None:
    instance: Instance = await make(step_timeout_s=0.4)
    instance.engine.launch(step_plan(1))
    instance.followers[0].send(done_message(0, None))
    assert await instance.lost() == "a step has taken more than 0.4 s, ranks 2 have not ended it"


async def test_an_answer_to_no_step_is_the_end(make: Any) -> None:
    instance: Instance = await make()
    instance.followers[0].send(done_message(4, None))
    assert "step 4 is not under way" in await instance.lost()


async def test_rank_0_has_the_same_time_for_its_part_as_the_others(make: Any) -> None:
    instance: Instance = await make(step_timeout_s=0.4)
    instance.own.hold = threading.Event()
    waiting = asyncio.create_task(instance.wait(instance.engine.launch(step_plan(1))))
    for follower in instance.followers:
        follower.send(done_message(0, (7,)))
    try:
        assert await instance.lost() == "a step has taken more than 0.4 s, ranks 0 have not ended it"
    finally:
        instance.own.hold.set()
        await waiting


@pytest.mark.parametrize("refusing", [0, 2])
async def test_a_plan_that_only_some_ranks_refuse_is_the_end(make: Any, refusing: int) -> None:
    instance: Instance = await make()
    instance.own.error = InvalidRequest("no") if refusing == 0 else None
    step = instance.engine.launch(step_plan(1))
    for rank, follower in enumerate(instance.followers, start=1):
        follower.send(failed_message(0, InvalidRequest("no")) if rank == refusing else done_message(0, (7,)))
    line = f"rank {refusing} refused a step that others computed: no"
    with pytest.raises(EngineLost, match=line):
        await instance.wait(step)
    assert await instance.lost() == line
