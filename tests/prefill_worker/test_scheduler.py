"""PrefillScheduler: exact plans and block ids, refusals, cancels, and blocks that tickets keep."""

from biphase.engine.block_pool import BlockPool
from biphase.engine.limits import Limits
from biphase.engine.sequence import Refusal, SeqEnded, TokenOut
from biphase.engine.step import SeqStep, StepPlan, StepResult
from biphase.prefill_worker.scheduler import (
    ChunkComputed,
    PrefillEffect,
    PrefillRequest,
    PrefillScheduler,
    PrefillStarted,
)
from biphase.protos.ids import BlockId, SeqId
from biphase.protos.values import FinishReason, LegStats, Sampling


def make_scheduler(num_blocks: int = 8, **settings: int) -> PrefillScheduler:
    pool = BlockPool(num_blocks=num_blocks, block_size=4)
    limits = Limits(vocab_size=1000, max_model_len=64, eos_token_ids=(2,), num_blocks=num_blocks, block_size=4)
    return PrefillScheduler(pool, limits, **{"max_num_batched_tokens": 8, **settings})


def make_request(
    seq_id: int, tokens: int, *, max_tokens: int = 4, refusals: int = 0, forced: int = 0
) -> PrefillRequest:
    return PrefillRequest(
        seq_id=SeqId(seq_id),
        token_ids=[10 * seq_id + position for position in range(tokens + forced)],
        num_prompt_tokens=tokens,
        sampling=Sampling(max_tokens=max_tokens),
        refusals=refusals,
    )


def step(scheduler: PrefillScheduler, now_s: float = 0.0, token: int = 500) -> tuple[StepPlan, list[PrefillEffect]]:
    """One whole step; every draw gives ``token``."""
    plan, effects = scheduler.schedule(now_s)
    assert plan is not None
    tokens = tuple(token if part.sampling else None for part in plan.seqs)
    return plan, effects + scheduler.complete(plan, StepResult(tokens=tokens, step_ms=1.0), now_s)


def parts(plan: StepPlan | None) -> list[tuple[int, int, int]]:
    """(sequence, start, tokens) of each part."""
    return [] if plan is None else [(part.seq_id, part.start, len(part.token_ids)) for part in plan.seqs]


def test_prompts_are_packed_and_chunked_first_come_first_served() -> None:
    scheduler = make_scheduler()
    for request in (make_request(1, 5), make_request(2, 6), make_request(3, 2)):
        assert scheduler.offer(request, 0.0) is None
    plan, effects = scheduler.schedule(2.0)
    sampling = Sampling(max_tokens=4)
    blocks = (BlockId(0), BlockId(1))
    first = SeqStep(seq_id=SeqId(1), token_ids=(10, 11, 12, 13, 14), start=0, blocks=blocks, sampling=sampling)
    second = SeqStep(seq_id=SeqId(2), token_ids=(20, 21, 22), start=0, blocks=(BlockId(2), BlockId(3)))
    assert plan == StepPlan(seqs=(first, second))
    assert effects == [
        PrefillStarted(seq_id=SeqId(1), blocks=blocks, num_tokens=5, handoff=True, queue_ms=2000.0),
        PrefillStarted(seq_id=SeqId(2), blocks=(BlockId(2), BlockId(3)), num_tokens=6, handoff=True, queue_ms=2000.0),
    ]
    assert scheduler.complete(plan, StepResult(tokens=(77, None), step_ms=9.0), 3.0) == [
        ChunkComputed(seq_id=SeqId(1), computed_tokens=5),
        TokenOut(seq_id=SeqId(1), index=0, token_id=77),
        SeqEnded(seq_id=SeqId(1), outcome="done", stats=LegStats(queue_ms=2000.0, prefill_ms=1000.0)),
        ChunkComputed(seq_id=SeqId(2), computed_tokens=3),
    ]
    assert scheduler.queued_tokens == 5
    assert parts(scheduler.schedule(3.0)[0]) == [(2, 3, 3), (3, 0, 2)]


def test_a_step_has_no_more_than_the_budget_and_max_num_seqs() -> None:
    scheduler = make_scheduler(max_num_seqs=2)
    for seq_id in (1, 2):
        assert scheduler.offer(make_request(seq_id, 2), 0.0) is None
    refusal = scheduler.offer(make_request(3, 2), 0.0)
    assert refusal is not None and refusal.detail == "2 prompts wait already, the limit is 2"
    assert parts(step(scheduler)[0]) == [(1, 0, 2), (2, 0, 2)]


def test_the_queue_is_bounded_in_tokens_and_says_how_many_wait() -> None:
    scheduler = make_scheduler(num_blocks=16)
    assert scheduler.offer(make_request(1, 12), 0.0) is None
    assert scheduler.offer(make_request(2, 4), 0.0) is None
    assert scheduler.offer(make_request(3, 1), 0.0) == Refusal(
        reason="busy", detail="16 tokens are queued, 1 more would pass 16", queued_tokens=16
    )


def test_a_prompt_longer_than_the_queue_is_taken_when_it_is_empty() -> None:
    scheduler = make_scheduler()
    assert scheduler.offer(make_request(1, 29), 0.0) is None
    assert [len(step(scheduler)[0].seqs[0].token_ids) for _ in range(4)] == [8, 8, 8, 5]
    assert repr(scheduler.pool) == "<BlockPool [0 used, 8 free]>"


def test_blocks_are_reserved_whole_before_the_first_chunk() -> None:
    scheduler = make_scheduler(num_blocks=8, max_queued_tokens=99)
    assert scheduler.offer(make_request(1, 20), 0.0) is None
    assert scheduler.offer(make_request(2, 16), 0.0) == Refusal(
        reason="busy", detail="the prompt needs 4 blocks, 3 are not promised yet", queued_tokens=20
    )
    assert scheduler.offer(make_request(3, 12), 0.0) is None
    assert scheduler.load().room_blocks == 0 and scheduler.load().free_blocks == 8
    step(scheduler)
    assert repr(scheduler.pool) == "<BlockPool [5 used, 3 free]>"


def test_after_three_refusals_a_prompt_gets_a_place_and_none_younger_takes_its_blocks() -> None:
    scheduler = make_scheduler(num_blocks=8, max_queued_tokens=99)
    assert scheduler.offer(make_request(1, 20), 0.0) is None
    assert scheduler.offer(make_request(2, 16, refusals=2), 0.0) is not None
    assert scheduler.offer(make_request(2, 16, refusals=3), 0.0) is None
    younger = scheduler.offer(make_request(3, 1), 0.0)
    assert younger is not None and younger.reason == "busy"
    assert scheduler.offer(make_request(4, 1, refusals=3), 0.0) is None
    assert [parts(step(scheduler)[0]) for _ in range(6)] == [
        [(1, 0, 8)],
        [(1, 8, 8)],
        [(1, 16, 4)],
        [(2, 0, 8)],
        [(2, 8, 8)],
        [(4, 0, 1)],
    ]


def test_a_replay_starts_before_prompts_that_wait_for_their_first_token_not_before_what_has_started() -> None:
    scheduler = make_scheduler(num_blocks=16, max_num_batched_tokens=4, max_queued_tokens=64)
    assert scheduler.offer(make_request(1, 5), 0.0) is None
    assert parts(step(scheduler)[0]) == [(1, 0, 4)]
    for seq_id, forced in ((2, 0), (3, 1), (4, 2), (5, 0)):
        assert scheduler.offer(make_request(seq_id, 5, forced=forced, max_tokens=8), 0.0) is None
    served = [part for _ in range(6) for part in parts(step(scheduler)[0])]
    assert list(dict.fromkeys(seq_id for seq_id, _, _ in served)) == [1, 3, 4, 2, 5]
    assert scheduler.queued_tokens == 0


def test_half_a_queue_of_replayed_tokens_passes_a_prompt() -> None:
    scheduler = make_scheduler(num_blocks=32, max_num_batched_tokens=6, max_queued_tokens=60)
    assert scheduler.offer(make_request(1, 6), 0.0) is None
    for seq_id in range(2, 10):  # six tokens each: five are half of sixty
        assert scheduler.offer(make_request(seq_id, 5, forced=1, max_tokens=8), 0.0) is None
    served = [parts(step(scheduler)[0]) for _ in range(9)]
    assert [seq_id for ((seq_id, _, _),) in served] == [2, 3, 4, 5, 6, 1, 7, 8, 9]


def test_a_replay_takes_no_block_that_a_prompt_before_it_waits_for() -> None:
    scheduler = make_scheduler(num_blocks=8, max_queued_tokens=99)
    assert scheduler.offer(make_request(1, 20), 0.0) is None
    assert scheduler.offer(make_request(2, 16, refusals=3), 0.0) is None
    replay = scheduler.offer(make_request(3, 3, forced=1), 0.0)
    assert replay is not None and replay.detail == "the prompt needs 1 blocks, 0 are not promised yet"
    assert scheduler.offer(make_request(3, 3, forced=1, refusals=3), 0.0) is None
    served = [part for _ in range(6) for part in parts(step(scheduler)[0])]
    assert list(dict.fromkeys(seq_id for seq_id, _, _ in served)) == [1, 2, 3]
    assert scheduler.load().room_blocks == scheduler.pool.num_free == 8


def test_a_replay_that_is_cancelled_in_the_queue_keeps_nothing_promised() -> None:
    scheduler = make_scheduler(num_blocks=4, max_queued_tokens=16)
    assert scheduler.offer(make_request(1, 8), 0.0) is None
    assert scheduler.offer(make_request(2, 7, forced=1), 0.0) is None
    assert [type(effect) for effect in scheduler.cancel(SeqId(2), 0.0)] == [SeqEnded]
    assert (scheduler.queued_tokens, scheduler.load().room_blocks) == (8, 2)
    assert scheduler.offer(make_request(3, 7, forced=1), 0.0) is None
    assert parts(step(scheduler)[0]) == [(3, 0, 8)]


def test_a_pool_full_of_unpulled_prompts_starts_nothing_until_a_ticket_ends() -> None:
    scheduler = make_scheduler(num_blocks=3)
    assert scheduler.offer(make_request(1, 8), 0.0) is None
    assert scheduler.offer(make_request(2, 8, refusals=3), 0.0) is None
    plan, effects = scheduler.schedule(0.0)
    assert plan is not None and isinstance(effects[0], PrefillStarted)
    exported = effects[0].blocks
    scheduler.pool.hold(exported)
    scheduler.complete(plan, StepResult(tokens=(5,), step_ms=1.0), 0.0)
    assert scheduler.schedule(0.0) == (None, [])
    scheduler.pool.release(exported)
    assert parts(scheduler.schedule(0.0)[0]) == [(2, 0, 8)]


def test_no_ticket_when_the_first_token_is_the_last() -> None:
    scheduler = make_scheduler(num_blocks=16)
    scheduler.offer(make_request(1, 3, max_tokens=1), 0.0)
    scheduler.offer(make_request(2, 3, max_tokens=2, forced=1), 0.0)
    _, effects = step(scheduler)
    assert [effect.handoff for effect in effects if isinstance(effect, PrefillStarted)] == [False, False]
    assert [effect for effect in effects if isinstance(effect, TokenOut)] == [
        TokenOut(seq_id=SeqId(2), index=1, token_id=500, finish=FinishReason.LENGTH),
        TokenOut(seq_id=SeqId(1), index=0, token_id=500, finish=FinishReason.LENGTH),
    ]


def test_an_end_token_finishes_and_is_forbidden_before_min_tokens() -> None:
    scheduler = make_scheduler()
    scheduler.offer(make_request(1, 3), 0.0)
    _, effects = step(scheduler, token=2)
    assert TokenOut(seq_id=SeqId(1), index=0, token_id=2, finish=FinishReason.STOP) in effects
    request = make_request(2, 3)
    sampling = Sampling(max_tokens=4, min_tokens=1, stop_token_ids=(9,))
    scheduler.offer(
        PrefillRequest(seq_id=SeqId(2), token_ids=request.token_ids, num_prompt_tokens=3, sampling=sampling), 0.0
    )
    assert step(scheduler)[0].seqs[0].forbid_ids == (2, 9)


def test_a_cancel_frees_at_once_unless_the_step_is_running() -> None:
    scheduler = make_scheduler()
    scheduler.offer(make_request(1, 12), 0.0)
    scheduler.offer(make_request(2, 4), 0.0)
    plan, _ = scheduler.schedule(0.0)
    assert plan is not None
    assert scheduler.cancel(SeqId(1), 0.0) == []
    assert scheduler.cancel(SeqId(1), 0.0) == []
    assert scheduler.cancel(SeqId(99), 0.0) == []
    assert [effect.seq_id for effect in scheduler.cancel(SeqId(2), 0.0)] == [2]
    effects = scheduler.complete(plan, StepResult(tokens=(None,), step_ms=1.0), 0.0)
    assert [(effect.seq_id, effect.outcome) for effect in effects if isinstance(effect, SeqEnded)] == [(1, "cancelled")]
    assert repr(scheduler.pool) == "<BlockPool [0 used, 8 free]>"
    assert (scheduler.queued_tokens, len(scheduler), scheduler.load().room_blocks) == (0, 0, 8)


def test_a_failed_step_ends_its_sequences_and_no_other() -> None:
    scheduler = make_scheduler()
    scheduler.offer(make_request(1, 8), 0.0)
    scheduler.offer(make_request(2, 4), 0.0)
    plan, _ = scheduler.schedule(0.0)
    assert plan is not None
    (ended,) = scheduler.fail(plan, "kernel says no", 0.0)
    assert isinstance(ended, SeqEnded) and (ended.seq_id, ended.outcome, ended.detail) == (
        1,
        "failed",
        "kernel says no",
    )
    assert parts(step(scheduler)[0]) == [(2, 0, 4)]


def test_a_draining_instance_takes_nothing_new() -> None:
    scheduler = make_scheduler()
    scheduler.draining = True
    refusal = scheduler.offer(make_request(1, 4), 0.0)
    assert refusal is not None and refusal.reason == "draining"
    invalid = scheduler.offer(make_request(1, 99), 0.0)
    assert invalid is not None and invalid.reason == "invalid"
