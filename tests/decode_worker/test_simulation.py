"""Thousands of random steps through both schedulers: nothing leaks, nothing is said twice, everybody finishes."""

import random
from collections import defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from biphase.decode_worker.requests import CancelPull, DecodeEffect, DecodeRequest, StartPull
from biphase.decode_worker.scheduler import DecodeScheduler
from biphase.engine.block_pool import BlockPool
from biphase.engine.limits import Limits
from biphase.engine.sequence import SeqEnded, TokenOut
from biphase.engine.step import StepPlan, StepResult
from biphase.prefill_worker.scheduler import PrefillEffect, PrefillRequest, PrefillScheduler, PrefillStarted
from biphase.protos.ids import BlockId, Incarnation, InstanceName, SeqId, TicketId
from biphase.protos.values import KvTicket, Sampling

BLOCK_SIZE = 4
EOS = 2


def drawn(seq_id: int, index: int) -> int:
    """What the simulated engine draws: a function of the request and the position alone, as the real draw is."""
    return random.Random(f"{seq_id} {index}").choice([EOS, *range(10, 40)])


class Content:
    """Stands for KV memory: which (sequence, position, token) was last written to each slot of each block."""

    def __init__(self) -> None:
        self.slots: dict[tuple[BlockId, int], tuple[int, int]] = {}

    def run(self, plan: StepPlan) -> StepResult:
        tokens: list[int | None] = []
        for part in plan.seqs:
            assert len(part.blocks) * BLOCK_SIZE >= part.start + len(part.token_ids)
            for position, token in enumerate(part.token_ids, start=part.start):
                self.slots[part.blocks[position // BLOCK_SIZE], position % BLOCK_SIZE] = (position, token)
            for position in range(part.start):
                written = self.slots[part.blocks[position // BLOCK_SIZE], position % BLOCK_SIZE]
                assert written[0] == position, f"sequence {part.seq_id} reads a slot that holds another position"
            tokens.append(drawn(part.seq_id, part.output_index) if part.sampling else None)
        return StepResult(tokens=tuple(tokens), step_ms=1.0)

    def pull(self, start: StartPull, token_ids: list[int]) -> None:
        for position, token in enumerate(token_ids):
            self.slots[start.blocks[position // BLOCK_SIZE], position % BLOCK_SIZE] = (position, token)


class Decode:
    """Drives a DecodeScheduler with random arrivals, cancels and pull ends, and checks every effect."""

    def __init__(self, seed: int, num_blocks: int, max_num_seqs: int) -> None:
        self.random = random.Random(seed)
        self.pool = BlockPool(num_blocks=num_blocks, block_size=BLOCK_SIZE)
        self.limits = Limits(
            vocab_size=100, max_model_len=80, eos_token_ids=(EOS,), num_blocks=num_blocks, block_size=BLOCK_SIZE
        )
        self.scheduler = DecodeScheduler(
            self.pool, self.limits, max_num_seqs=max_num_seqs, max_num_batched_tokens=24, local_prefill_tokens=8
        )
        self.content = Content()
        self.requests: dict[int, DecodeRequest] = {}
        self.tokens: dict[int, list[int]] = defaultdict(list)
        self.finished: dict[int, bool] = {}
        self.ended: dict[int, str] = {}
        self.pulls: dict[int, StartPull] = {}
        self.refused = 0

    def arrive(self, seq_id: int) -> None:
        prompt = self.random.randint(1, 30)
        forced = self.random.choice([0, 0, 3])
        max_tokens = forced + self.random.randint(2, 24)
        total = prompt + forced
        pull = self.random.random() < 0.6
        ticket = KvTicket(
            id=TicketId(b"x" * 16),
            kv_address="h:1",
            instance=InstanceName("p"),
            incarnation=Incarnation(1),
            num_tokens=total,
        )
        request = DecodeRequest(
            seq_id=SeqId(seq_id),
            token_ids=[50] * prompt + [drawn(seq_id, index) for index in range(forced)],
            num_prompt_tokens=prompt,
            sampling=Sampling(max_tokens=max_tokens, ignore_eos=self.random.random() < 0.7),
            ticket=ticket if pull else None,
            pull_epoch=1,
        )
        if self.scheduler.offer(request, 0.0) is None:
            self.requests[seq_id] = request
        else:
            self.refused += 1

    def perform(self, effects: list[DecodeEffect]) -> None:
        for effect in effects:
            assert effect.seq_id not in self.ended, f"{effect} after its end"
            request = self.requests[effect.seq_id]
            if isinstance(effect, TokenOut):
                said = self.tokens[effect.seq_id]
                first = len(request.token_ids) - request.num_prompt_tokens + (request.ticket is not None)
                assert effect.index == first + len(said)
                assert effect.token_id == drawn(effect.seq_id, effect.index)
                assert effect.seq_id not in self.finished
                said.append(effect.token_id)
                if effect.finish is not None:
                    self.finished[effect.seq_id] = True
            elif isinstance(effect, StartPull):
                assert len(effect.blocks) == self.pool.blocks_for(len(request.token_ids))
                self.pulls[effect.seq_id] = effect
            elif isinstance(effect, CancelPull):
                assert effect.seq_id in self.pulls
            else:
                assert isinstance(effect, SeqEnded)
                assert effect.seq_id not in self.pulls
                self.ended[effect.seq_id] = effect.outcome

    def end_a_pull(self, chance_of_failure: float) -> None:
        seq_id = self.random.choice(sorted(self.pulls))
        start = self.pulls.pop(seq_id)
        if self.random.random() < chance_of_failure:
            self.perform(self.scheduler.pull_failed(SeqId(seq_id), "lost", 0.0))
            return
        request = self.requests[seq_id]
        self.content.pull(start, request.token_ids)
        first = drawn(seq_id, len(request.token_ids) - request.num_prompt_tokens)
        self.perform(self.scheduler.handed_off(SeqId(seq_id), first, 0.0, num_bytes=1, transfer_ms=1.0, exposed_ms=0.0))

    def cancel_one(self) -> None:
        live = [seq_id for seq_id in self.requests if seq_id not in self.ended]
        if live:
            unless = self.random.random() < 0.3
            self.perform(self.scheduler.cancel(SeqId(self.random.choice(live)), 0.0, unless_handed_off=unless))

    def step(self, during: float) -> bool:
        plan, effects = self.scheduler.schedule(0.0)
        self.perform(effects)
        assert self.scheduler.num_running + self.scheduler.num_pulling <= self.scheduler.max_num_seqs
        if plan is None:
            return False
        assert len({part.seq_id for part in plan.seqs}) == len(plan.seqs)
        writable = [part.blocks for part in plan.seqs]
        assert len({block for blocks in writable for block in blocks}) == sum(len(blocks) for blocks in writable)
        if self.random.random() < during:
            self.cancel_one()
        if self.pulls and self.random.random() < during:
            self.end_a_pull(0.1)
        if self.random.random() < during / 20:
            self.perform(self.scheduler.fail(plan, "no", 0.0))
        else:
            self.perform(self.scheduler.complete(plan, self.content.run(plan), 0.0))
        return True

    def drain(self) -> int:
        """Run until everything has ended; returns the steps it took."""
        for steps in range(20_000):
            while self.pulls and self.random.random() < 0.5:
                self.end_a_pull(0.0)
            if not self.step(during=0.0) and not self.pulls:
                return steps
        raise AssertionError(f"still busy after 20000 steps: {self.scheduler!r}")


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32), num_blocks=st.integers(14, 40), max_num_seqs=st.integers(1, 12))
def test_decode_leaks_nothing_and_everybody_finishes(seed: int, num_blocks: int, max_num_seqs: int) -> None:
    world = Decode(seed, num_blocks, max_num_seqs)
    for turn in range(300):
        if world.random.random() < 0.4:
            world.arrive(turn)
        world.step(during=0.15)
        if world.pulls and world.random.random() < 0.3:
            world.end_a_pull(0.1)
        world.pool.check()
    world.drain()
    assert repr(world.pool) == f"<BlockPool [0 used, {num_blocks} free]>"
    assert len(world.scheduler) == 0 and world.scheduler.queued_tokens == 0
    assert set(world.ended) == set(world.requests)
    for seq_id, outcome in world.ended.items():
        assert (outcome == "done") == world.finished.get(seq_id, False) or len(world.tokens[seq_id]) == 0


def test_pressure_preempts_often_and_loses_nothing() -> None:
    world = Decode(seed=5, num_blocks=16, max_num_seqs=8)
    for turn in range(4000):
        world.arrive(turn)
        world.step(during=0.0)
        if world.pulls:
            world.end_a_pull(0.0)
    world.drain()
    assert set(world.ended.values()) == {"done"}
    assert world.scheduler.preemptions >= 50 and world.scheduler.preemptions_handed_off >= 20
    for seq_id, request in world.requests.items():
        n0 = len(request.token_ids) - request.num_prompt_tokens + (request.ticket is not None)
        assert world.tokens[seq_id] == [drawn(seq_id, n0 + n) for n in range(len(world.tokens[seq_id]))]
    assert world.pool.num_free == 16


@pytest.mark.parametrize("prompt", [1, 4, 5, 40])
def test_a_lone_request_gets_the_whole_pool(prompt: int) -> None:
    world = Decode(seed=1, num_blocks=11, max_num_seqs=4)
    request = DecodeRequest(
        seq_id=SeqId(0),
        token_ids=[50] * prompt,
        num_prompt_tokens=prompt,
        sampling=Sampling(max_tokens=45 - prompt, ignore_eos=True),
    )
    assert world.scheduler.offer(request, 0.0) is None
    world.requests[0] = request
    world.drain()
    assert world.ended == {0: "done"} and len(world.tokens[0]) == 45 - prompt
    assert world.scheduler.preemptions == 0


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32), num_blocks=st.integers(12, 40))
def test_prefill_leaks_nothing_and_every_prompt_is_computed_once(seed: int, num_blocks: int) -> None:
    rng = random.Random(seed)
    pool = BlockPool(num_blocks=num_blocks, block_size=BLOCK_SIZE)
    limits = Limits(
        vocab_size=100, max_model_len=80, eos_token_ids=(EOS,), num_blocks=num_blocks, block_size=BLOCK_SIZE
    )
    scheduler = PrefillScheduler(pool, limits, max_num_batched_tokens=16, max_num_seqs=6)
    content = Content()
    tickets: list[tuple[BlockId, ...]] = []
    accepted: list[int] = []
    started: list[int] = []
    ended: dict[int, str] = {}

    def perform(effects: list[PrefillEffect]) -> None:
        for effect in effects:
            assert effect.seq_id not in ended
            if isinstance(effect, PrefillStarted):
                started.append(effect.seq_id)
                if effect.handoff:
                    pool.hold(effect.blocks)
                    tickets.append(effect.blocks)
            elif isinstance(effect, SeqEnded):
                ended[effect.seq_id] = effect.outcome

    def step(busy: bool) -> bool:
        plan, effects = scheduler.schedule(0.0)
        perform(effects)
        if plan is None:
            return False
        assert plan.num_tokens <= 16 and len(plan.seqs) <= 6
        if busy and rng.random() < 0.2:
            perform(scheduler.cancel(SeqId(rng.choice(accepted)), 0.0))
        result = content.run(plan)
        perform(
            scheduler.fail(plan, "no", 0.0) if busy and rng.random() < 0.02 else scheduler.complete(plan, result, 0.0)
        )
        return True

    for turn in range(300):
        if rng.random() < 0.6:
            prompt = rng.randint(1, 40)
            request = PrefillRequest(
                seq_id=SeqId(turn),
                token_ids=[50] * prompt,
                num_prompt_tokens=prompt,
                sampling=Sampling(max_tokens=rng.randint(1, 8)),
                refusals=rng.choice([0, 0, 0, 3]),
            )
            if scheduler.offer(request, 0.0) is None:
                accepted.append(turn)
        step(busy=True)
        if tickets and rng.random() < 0.3:
            pool.release(tickets.pop(rng.randrange(len(tickets))))
        pool.check()
    while step(busy=False) or tickets:
        if tickets:
            pool.release(tickets.pop())
    assert set(ended) == set(accepted) and len(scheduler) == 0
    assert started == sorted(started), "a younger prompt started before an older one"
    assert (scheduler.queued_tokens, scheduler.load().room_blocks, pool.num_free) == (0, num_blocks, num_blocks)
