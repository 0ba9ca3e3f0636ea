"""The prefill scheduler with steps in flight: chunks and prompts scheduled ahead, and no block freed under a step."""

import random

from hypothesis import given, settings
from hypothesis import strategies as st
from support.checked_engine import EOS, CheckedEngine, output_of

from biphase.engine.block_pool import BlockPool
from biphase.engine.limits import Limits
from biphase.engine.sequence import SeqEnded, TokenOut
from biphase.engine.step import StepPlan, StepResult
from biphase.prefill_worker.scheduler import (
    ChunkComputed,
    PrefillEffect,
    PrefillRequest,
    PrefillScheduler,
    PrefillStarted,
)
from biphase.protos.ids import BlockId, SeqId
from biphase.protos.values import Sampling

BLOCK_SIZE = 4


def make_scheduler(num_blocks: int = 8, **changes: int) -> PrefillScheduler:
    pool = BlockPool(num_blocks=num_blocks, block_size=BLOCK_SIZE)
    limits = Limits(
        vocab_size=1000, max_model_len=80, eos_token_ids=(EOS,), num_blocks=num_blocks, block_size=BLOCK_SIZE
    )
    return PrefillScheduler(pool, limits, **{"max_num_batched_tokens": 8, "max_queued_tokens": 1000, **changes})


def offer(scheduler: PrefillScheduler, seq_id: int, tokens: int, *, refusals: int = 0) -> None:
    request = PrefillRequest(
        seq_id=SeqId(seq_id),
        token_ids=[10 * seq_id + position for position in range(tokens)],
        num_prompt_tokens=tokens,
        sampling=Sampling(max_tokens=4),
        refusals=refusals,
    )
    assert scheduler.offer(request, 0.0) is None


def planned(scheduler: PrefillScheduler) -> StepPlan:
    plan, _ = scheduler.schedule(0.0)
    assert plan is not None
    return plan


def done(plan: StepPlan, token: int = 500) -> StepResult:
    return StepResult(tokens=tuple(token if part.sampling else None for part in plan.seqs), step_ms=1.0)


def parts(plan: StepPlan) -> list[tuple[int, int, int]]:
    return [(part.seq_id, part.start, len(part.token_ids)) for part in plan.seqs]


def test_chunks_and_prompts_follow_the_step_in_flight_and_are_said_when_computed() -> None:
    scheduler = make_scheduler()
    offer(scheduler, 1, 12)
    offer(scheduler, 2, 6)
    first, second = planned(scheduler), planned(scheduler)
    assert (parts(first), parts(second)) == ([(1, 0, 8)], [(1, 8, 4), (2, 0, 4)])
    assert not any(part.continues for part in (*first.seqs, *second.seqs))
    assert scheduler.queued_tokens == 18
    assert scheduler.complete(first, done(first), 0.0) == [ChunkComputed(seq_id=SeqId(1), computed_tokens=8)]
    assert scheduler.queued_tokens == 10
    third = planned(scheduler)
    assert parts(third) == [(2, 4, 2)]
    effects = scheduler.complete(second, done(second), 0.0)
    assert [type(effect) for effect in effects] == [ChunkComputed, TokenOut, SeqEnded, ChunkComputed]
    # all is drawn or in flight
    assert scheduler.schedule(0.0) == (None, [])
    effects = scheduler.complete(third, done(third), 0.0)
    assert [type(effect) for effect in effects] == [ChunkComputed, TokenOut, SeqEnded]
    assert repr(scheduler.pool) == "<BlockPool [0 used, 8 free]>" and scheduler.queued_tokens == 0


def test_a_full_step_of_short_prompts_leaves_room_for_one_behind_it() -> None:
    scheduler = make_scheduler(max_num_seqs=2)
    for seq_id in (1, 2):
        offer(scheduler, seq_id, 2)
    first = planned(scheduler)
    for seq_id in (3, 4):
        offer(scheduler, seq_id, 2)
    assert (parts(first), parts(planned(scheduler))) == ([(1, 0, 2), (2, 0, 2)], [(3, 0, 2), (4, 0, 2)])


def test_a_cancelled_prompt_keeps_its_blocks_until_its_last_step_and_the_next_gets_them_then() -> None:
    scheduler = make_scheduler(num_blocks=6)
    offer(scheduler, 1, 20)
    first, second = planned(scheduler), planned(scheduler)
    offer(scheduler, 2, 8, refusals=3)
    assert scheduler.cancel(SeqId(1), 0.0) == []
    assert scheduler.schedule(0.0) == (None, [])
    assert scheduler.complete(first, done(first), 0.0) == []
    assert scheduler.schedule(0.0) == (None, [])
    (ended,) = scheduler.complete(second, done(second), 0.0)
    assert isinstance(ended, SeqEnded) and (ended.seq_id, ended.outcome) == (1, "cancelled")
    after = planned(scheduler)
    assert set(after.seqs[0].blocks) < set(first.seqs[0].blocks)
    scheduler.complete(after, done(after), 0.0)
    assert scheduler.queued_tokens == 0 and scheduler.superfluous_tokens == 0


def test_a_failed_chunk_ends_its_prompt_after_the_chunk_behind_it() -> None:
    scheduler = make_scheduler()
    offer(scheduler, 1, 12)
    first, second = planned(scheduler), planned(scheduler)
    assert scheduler.fail(first, "kernel says no", 0.0) == []
    (ended,) = scheduler.complete(second, done(second), 0.0)
    assert isinstance(ended, SeqEnded) and (ended.outcome, ended.detail) == ("failed", "kernel says no")
    assert repr(scheduler.pool) == "<BlockPool [0 used, 8 free]>"
    assert (scheduler.queued_tokens, scheduler.superfluous_tokens) == (0, 1)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    depth=st.integers(1, 3),
    num_blocks=st.integers(11, 30),
    trouble=st.sampled_from([0.0, 0.1]),
)
def test_every_depth_draws_the_same_tokens_and_frees_no_block_under_a_step(
    seed: int, depth: int, num_blocks: int, trouble: float
) -> None:
    rng = random.Random(seed)
    scheduler = make_scheduler(num_blocks=num_blocks, max_num_batched_tokens=16, max_num_seqs=6)
    pool = scheduler.pool
    engine = CheckedEngine(pool)
    tickets: list[tuple[BlockId, ...]] = []
    requests: dict[SeqId, PrefillRequest] = {}
    tokens: dict[SeqId, int] = {}
    computed: dict[SeqId, int] = {}
    ended: dict[SeqId, str] = {}

    def perform(effects: list[PrefillEffect]) -> None:
        for effect in effects:
            assert effect.seq_id not in ended
            match effect:
                case PrefillStarted(handoff=True):
                    pool.hold(effect.blocks)
                    tickets.append(effect.blocks)
                case ChunkComputed():
                    assert effect.computed_tokens > computed.get(effect.seq_id, 0)
                    computed[effect.seq_id] = effect.computed_tokens
                case TokenOut():
                    assert effect.seq_id not in tokens
                    tokens[effect.seq_id] = effect.token_id
                case SeqEnded():
                    ended[effect.seq_id] = effect.outcome

    def turn(trouble: float) -> bool:
        if requests and rng.random() < trouble:
            perform(scheduler.cancel(rng.choice(list(requests)), 0.0))
        if tickets and rng.random() < 0.4:
            pool.release(tickets.pop(rng.randrange(len(tickets))))
        plan = None
        if len(engine.plans) < depth:
            plan, effects = scheduler.schedule(0.0)
            perform(effects)
            if plan is not None:
                assert plan.num_tokens <= 16 and len(plan.seqs) <= 6
                engine.launch(plan)
        engine.check()
        pool.check()
        if not engine.plans:
            return bool(tickets)
        if plan is None or len(engine.plans) == depth or rng.random() < 0.3:
            run, result = engine.run()
            later = {part.seq_id for behind in engine.plans for part in behind.seqs}
            fails = rng.random() < trouble / 4
            perform(scheduler.fail(run, "no", 0.0) if fails else scheduler.complete(run, result, 0.0))
            assert not later & set(ended)
            engine.check()
        return True

    for n in range(60):
        prompt, forced = rng.randint(1, 40), rng.choice([0, 0, 1, 3])
        request = PrefillRequest(
            seq_id=SeqId(n),
            token_ids=[rng.randint(50, 60) for _ in range(prompt + forced)],
            num_prompt_tokens=prompt,
            sampling=Sampling(max_tokens=rng.randint(1, 4), min_tokens=rng.choice([0, 2])),
            refusals=rng.choice([0, 3]),
        )
        if scheduler.offer(request, 0.0) is None:
            requests[request.seq_id] = request
        for _ in range(rng.randint(0, 4)):
            turn(trouble)
    while turn(0.0) or len(scheduler):
        pass
    assert set(ended) == set(requests)
    assert (scheduler.queued_tokens, scheduler.load().room_blocks, pool.num_free) == (0, num_blocks, num_blocks)
    for seq_id, request in requests.items():
        if ended[seq_id] == "done":
            whole = output_of(request.token_ids, request.num_prompt_tokens, request.sampling, scheduler.limits)
            assert (tokens[seq_id], computed[seq_id]) == (whole[0], len(request.token_ids))
    if depth == 1:
        assert scheduler.superfluous_tokens == 0
