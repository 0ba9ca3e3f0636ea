"""DecodeScheduler: exact plans and block ids, pulls, local prefill, preemption, cancels."""

from biphase.decode_worker.requests import CancelPull, DecodeEffect, DecodeRequest, StartPull
from biphase.decode_worker.scheduler import DecodeScheduler
from biphase.engine.block_pool import BlockPool
from biphase.engine.limits import Limits
from biphase.engine.sequence import Refusal, SeqEnded, TokenOut
from biphase.engine.step import SeqStep, StepPlan, StepResult
from biphase.protos.ids import BlockId, Incarnation, InstanceName, SeqId, TicketId
from biphase.protos.values import FinishReason, KvTicket, LegStats, Sampling


def make_scheduler(num_blocks: int = 8, **settings: int) -> DecodeScheduler:
    pool = BlockPool(num_blocks=num_blocks, block_size=4)
    limits = Limits(vocab_size=1000, max_model_len=64, eos_token_ids=(2,), num_blocks=num_blocks, block_size=4)
    return DecodeScheduler(pool, limits, **{"max_num_batched_tokens": 16, "local_prefill_tokens": 4, **settings})


def make_ticket(num_tokens: int) -> KvTicket:
    return KvTicket(
        id=TicketId(b"t" * 16),
        kv_address="127.0.0.1:9",
        instance=InstanceName("prefill-0"),
        incarnation=Incarnation(1),
        num_tokens=num_tokens,
    )


def make_request(
    seq_id: int, tokens: int, *, max_tokens: int = 8, forced: int = 0, pull: bool = False
) -> DecodeRequest:
    return DecodeRequest(
        seq_id=SeqId(seq_id),
        token_ids=[10 * seq_id + position for position in range(tokens + forced)],
        num_prompt_tokens=tokens,
        sampling=Sampling(max_tokens=max_tokens),
        ticket=make_ticket(tokens + forced) if pull else None,
        pull_epoch=1 if pull else 0,
    )


def step(scheduler: DecodeScheduler, token: int = 500) -> tuple[StepPlan, list[DecodeEffect]]:
    """One whole step; every draw gives ``token``."""
    plan, effects = scheduler.schedule(0.0)
    assert plan is not None
    tokens = tuple(token if part.sampling else None for part in plan.seqs)
    return plan, effects + scheduler.complete(plan, StepResult(tokens=tokens, step_ms=1.0), 0.0)


def hand_off(scheduler: DecodeScheduler, seq_id: int, first_token: int = 300) -> list[DecodeEffect]:
    return scheduler.handed_off(SeqId(seq_id), first_token, 0.0, num_bytes=1000, transfer_ms=5.0, exposed_ms=1.0)


def parts(plan: StepPlan | None) -> list[tuple[int, int, int]]:
    """(sequence, start, tokens) of each part."""
    return [] if plan is None else [(part.seq_id, part.start, len(part.token_ids)) for part in plan.seqs]


def outs(effects: list[DecodeEffect]) -> list[tuple[int, int]]:
    """(sequence, output index) of each token."""
    return [(effect.seq_id, effect.index) for effect in effects if isinstance(effect, TokenOut)]


def test_a_ticket_is_pulled_into_blocks_reserved_whole_and_joins_at_the_next_step() -> None:
    scheduler = make_scheduler()
    assert scheduler.offer(make_request(1, 8, pull=True), 1.0) is None
    blocks = (BlockId(0), BlockId(1))
    start = StartPull(seq_id=SeqId(1), ticket=make_ticket(8), epoch=1, blocks=blocks, num_tokens=8)
    assert scheduler.schedule(3.0) == (None, [start])
    assert scheduler.schedule(3.0) == (None, [])
    assert hand_off(scheduler, 1, first_token=300) == []
    plan, effects = scheduler.schedule(4.0)
    sampling = Sampling(max_tokens=8)
    joined = SeqStep(
        seq_id=SeqId(1), token_ids=(300,), start=8, blocks=(*blocks, BlockId(2)), sampling=sampling, output_index=1
    )
    assert (plan, effects) == (StepPlan(seqs=(joined,)), [])
    assert plan is not None
    token = TokenOut(seq_id=SeqId(1), index=1, token_id=77)
    assert scheduler.complete(plan, StepResult(tokens=(77,), step_ms=1.0), 5.0) == [token]


def test_a_request_without_ticket_is_prefilled_here_from_index_0() -> None:
    scheduler = make_scheduler()
    scheduler.offer(make_request(1, 5, max_tokens=2), 0.0)
    plan, effects = step(scheduler)
    assert plan.seqs[0].blocks == (0, 1) and parts(plan) == [(1, 0, 5)]
    assert effects == [TokenOut(seq_id=SeqId(1), index=0, token_id=500)]
    plan, effects = step(scheduler)
    assert parts(plan) == [(1, 5, 1)]
    assert effects == [
        TokenOut(seq_id=SeqId(1), index=1, token_id=500, finish=FinishReason.LENGTH),
        SeqEnded(seq_id=SeqId(1), outcome="done", stats=LegStats()),
    ]
    assert repr(scheduler.pool) == "<BlockPool [0 used, 8 free]>"


def test_forced_tokens_are_computed_not_emitted_and_the_draw_goes_on_after_them() -> None:
    scheduler = make_scheduler()
    scheduler.offer(make_request(1, 3, forced=2), 0.0)
    plan, effects = step(scheduler)
    assert parts(plan) == [(1, 0, 5)] and plan.seqs[0].output_index == 2
    assert outs(effects) == [(1, 2)]


def test_local_prefill_is_bounded_while_others_decode_and_whole_when_nothing_does() -> None:
    scheduler = make_scheduler()
    scheduler.offer(make_request(1, 12), 0.0)
    scheduler.offer(make_request(2, 8), 0.0)
    assert parts(step(scheduler)[0]) == [(1, 0, 12), (2, 0, 4)]
    assert parts(step(scheduler)[0]) == [(1, 12, 1), (2, 4, 4)]
    assert parts(step(scheduler)[0]) == [(1, 13, 1), (2, 8, 1)]


def test_the_watermark_stays_free_unless_the_request_is_alone() -> None:
    scheduler = make_scheduler(num_blocks=4, watermark_blocks=2)
    scheduler.offer(make_request(1, 8, max_tokens=4), 0.0)
    scheduler.offer(make_request(2, 4, max_tokens=4), 0.0)
    assert parts(step(scheduler)[0]) == [(1, 0, 8)]
    assert scheduler.num_waiting == 1
    scheduler.cancel(SeqId(1), 0.0)
    scheduler.offer(make_request(3, 4, max_tokens=4), 0.0)
    assert parts(step(scheduler)[0]) == [(2, 0, 4), (3, 0, 4)]


def test_youngest_yields_when_blocks_run_out_and_goes_on_where_it_stood() -> None:
    scheduler = make_scheduler(num_blocks=5, max_num_seqs=2)
    scheduler.offer(make_request(1, 8, max_tokens=9), 0.0)
    scheduler.offer(make_request(2, 4, max_tokens=9), 0.0)
    seen: list[tuple[int, int]] = []
    plans = []
    while len(scheduler):
        plan, effects = step(scheduler)
        plans.append(parts(plan))
        seen += outs(effects)
    # 5 blocks: 1 holds three and 2 holds two until 1 needs a fourth; 2 comes back with its 4 + 5 tokens when 1 is done
    assert plans == [
        [(1, 0, 8), (2, 0, 4)],
        *[[(1, 8 + n, 1), (2, 4 + n, 1)] for n in range(4)],
        *[[(1, 12 + n, 1)] for n in range(4)],
        [(2, 0, 9)],
        *[[(2, 9 + n, 1)] for n in range(3)],
    ]
    assert sorted(seen) == [(1, n) for n in range(9)] + [(2, n) for n in range(9)]
    assert (scheduler.preemptions, scheduler.preemptions_handed_off) == (1, 0)


def test_a_preempted_sequence_that_was_handed_off_is_recomputed_here_and_counted() -> None:
    scheduler = make_scheduler(num_blocks=4, max_num_seqs=2)
    scheduler.offer(make_request(1, 8), 0.0)
    scheduler.offer(make_request(2, 3, pull=True), 0.0)
    assert isinstance(step(scheduler)[1][0], StartPull)
    assert repr(scheduler.pool) == "<BlockPool [3 used, 1 free]>"
    hand_off(scheduler, 2, first_token=300)
    assert parts(step(scheduler)[0]) == [(1, 8, 1), (2, 3, 1)]
    assert parts(step(scheduler)[0]) == [(1, 9, 1)]
    assert (scheduler.preemptions, scheduler.preemptions_handed_off) == (1, 1)
    scheduler.cancel(SeqId(1), 0.0)
    plan, effects = step(scheduler)
    assert parts(plan) == [(2, 0, 5)] and plan.seqs[0].token_ids == (20, 21, 22, 300, 500)
    assert outs(effects) == [(2, 2)]
    assert scheduler.cancel(SeqId(2), 0.0, unless_handed_off=True) == []


def test_one_under_a_pull_is_never_preempted_the_needy_gives_way_itself() -> None:
    scheduler = make_scheduler(num_blocks=4, watermark_blocks=0)
    scheduler.offer(make_request(1, 8), 0.0)
    scheduler.offer(make_request(2, 8, pull=True), 0.0)
    step(scheduler)
    assert repr(scheduler.pool) == "<BlockPool [4 used, 0 free]>"
    assert scheduler.schedule(0.0) == (None, [])
    assert repr(scheduler) == "<DecodeScheduler [1 waiting, 1 pulling, 0 running]>"
    assert scheduler.preemptions == 1
    hand_off(scheduler, 2)
    assert parts(step(scheduler)[0]) == [(2, 8, 1)]


def test_the_queue_is_bounded() -> None:
    scheduler = make_scheduler(max_num_seqs=1)
    assert scheduler.offer(make_request(1, 4), 0.0) is None
    assert scheduler.offer(make_request(2, 4), 0.0) == Refusal(
        reason="busy", detail="1 requests wait already, the limit is 1", queued_tokens=4
    )
    step(scheduler)
    assert scheduler.offer(make_request(2, 4), 0.0) is None
    assert parts(step(scheduler)[0]) == [(1, 4, 1)]


def test_a_ticket_for_another_number_of_tokens_is_refused() -> None:
    request = make_request(1, 4)
    wrong = DecodeRequest(
        seq_id=SeqId(1),
        token_ids=request.token_ids,
        num_prompt_tokens=4,
        sampling=request.sampling,
        ticket=make_ticket(5),
    )
    refusal = make_scheduler().offer(wrong, 0.0)
    assert refusal == Refusal(reason="invalid", detail="the ticket is for 5 tokens, 4 were sent")


def test_a_cancel_ends_every_state_once_and_frees() -> None:
    scheduler = make_scheduler(num_blocks=8, max_num_seqs=2)
    scheduler.offer(make_request(1, 4), 0.0)
    scheduler.offer(make_request(2, 4, pull=True), 0.0)
    scheduler.offer(make_request(3, 4), 0.0) if scheduler.num_waiting < 2 else None
    plan, _ = scheduler.schedule(0.0)
    scheduler.offer(make_request(3, 4), 0.0)
    assert plan is not None
    assert [type(effect) for effect in scheduler.cancel(SeqId(3), 0.0)] == [SeqEnded]
    assert scheduler.cancel(SeqId(2), 0.0) == [CancelPull(seq_id=SeqId(2))]
    assert scheduler.cancel(SeqId(2), 0.0) == []
    assert scheduler.cancel(SeqId(1), 0.0) == []
    (ended,) = scheduler.complete(plan, StepResult(tokens=(9,), step_ms=1.0), 0.0)
    assert isinstance(ended, SeqEnded) and (ended.seq_id, ended.outcome) == (1, "cancelled")
    assert repr(scheduler.pool) == "<BlockPool [1 used, 7 free]>"
    (ended,) = scheduler.pull_failed(SeqId(2), "cancelled", 0.0)
    assert isinstance(ended, SeqEnded) and (ended.seq_id, ended.outcome) == (2, "cancelled")
    assert repr(scheduler.pool) == "<BlockPool [0 used, 8 free]>"
    assert len(scheduler) == 0


def test_a_lost_prefill_instance_ends_what_is_not_handed_off_yet() -> None:
    scheduler = make_scheduler(max_num_seqs=2)
    for seq_id in (1, 2):
        scheduler.offer(make_request(seq_id, 4, pull=True), 0.0)
    scheduler.schedule(0.0)
    scheduler.offer(make_request(3, 4, pull=True), 0.0)
    scheduler.offer(make_request(4, 4), 0.0)
    (waiting,) = scheduler.cancel(SeqId(3), 0.0, unless_handed_off=True)
    assert isinstance(waiting, SeqEnded)
    assert (waiting.outcome, waiting.detail) == ("handoff_failed", "prefill instance lost")
    assert scheduler.cancel(SeqId(4), 0.0, unless_handed_off=True) == []
    assert [scheduler.cancel(SeqId(n), 0.0, unless_handed_off=True) for n in (1, 2)] == [
        [CancelPull(seq_id=SeqId(1), source_lost=True)],
        [CancelPull(seq_id=SeqId(2), source_lost=True)],
    ]
    # 1 was complete when the word came, 2 was not
    assert hand_off(scheduler, 1) == []
    (failed,) = scheduler.pull_failed(SeqId(2), "", 0.0)
    assert isinstance(failed, SeqEnded) and failed.outcome == "handoff_failed"
    assert parts(step(scheduler)[0]) == [(1, 4, 1), (4, 0, 4)]


def test_a_plain_cancel_wins_over_a_lost_prefill_instance() -> None:
    scheduler = make_scheduler()
    scheduler.offer(make_request(1, 4, pull=True), 0.0)
    scheduler.schedule(0.0)
    scheduler.cancel(SeqId(1), 0.0, unless_handed_off=True)
    assert scheduler.cancel(SeqId(1), 0.0) == [CancelPull(seq_id=SeqId(1))]
    assert scheduler.cancel(SeqId(1), 0.0) == []
    (ended,) = hand_off(scheduler, 1)
    assert isinstance(ended, SeqEnded) and ended.outcome == "cancelled"
    assert repr(scheduler.pool) == "<BlockPool [0 used, 8 free]>"


def test_a_failed_pull_ends_the_leg_and_nothing_is_computed_in_its_stead() -> None:
    scheduler = make_scheduler()
    scheduler.offer(make_request(1, 4, pull=True), 0.0)
    scheduler.schedule(0.0)
    (ended,) = scheduler.pull_failed(SeqId(1), "cannot reach 127.0.0.1:9", 0.0)
    assert isinstance(ended, SeqEnded)
    assert (ended.outcome, ended.detail) == ("handoff_failed", "cannot reach 127.0.0.1:9")
    assert scheduler.schedule(0.0) == (None, [])


def test_a_failed_step_ends_its_sequences_and_no_other() -> None:
    scheduler = make_scheduler(max_num_seqs=1)
    scheduler.offer(make_request(1, 4), 0.0)
    plan, _ = scheduler.schedule(0.0)
    scheduler.offer(make_request(2, 4), 0.0)
    assert plan is not None
    (ended,) = scheduler.fail(plan, "kernel says no", 0.0)
    assert isinstance(ended, SeqEnded) and (ended.seq_id, ended.outcome, ended.detail) == (
        1,
        "failed",
        "kernel says no",
    )
    assert parts(step(scheduler)[0]) == [(2, 0, 4)]


def test_load_counts_what_is_promised() -> None:
    scheduler = make_scheduler(num_blocks=8, max_num_seqs=1)
    assert scheduler.load().room_blocks == 8
    scheduler.offer(make_request(1, 8), 0.0)
    step(scheduler)
    scheduler.offer(make_request(2, 9), 0.0)
    load = scheduler.load()
    assert (load.free_blocks, load.room_blocks, load.queued, load.running, load.queued_tokens) == (6, 2, 1, 1, 9)


def test_the_timeline_is_told_when_the_leg_ends() -> None:
    scheduler = make_scheduler()
    scheduler.offer(make_request(1, 4, max_tokens=2, pull=True), 1.0)
    scheduler.schedule(2.0)
    scheduler.handed_off(SeqId(1), 300, 3.0, num_bytes=1000, transfer_ms=900.0, exposed_ms=100.0)
    plan, _ = scheduler.schedule(3.5)
    assert plan is not None
    effects = scheduler.complete(plan, StepResult(tokens=(9,), step_ms=1.0), 4.0)
    assert effects[-1] == SeqEnded(
        seq_id=SeqId(1),
        outcome="done",
        stats=LegStats(queue_ms=1000.0, transfer_ms=900.0, transfer_bytes=1000, exposed_ms=600.0, decode_ms=500.0),
    )
