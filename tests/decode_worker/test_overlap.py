"""The decode scheduler with steps in flight: what it schedules ahead, and that no block is freed under a step."""

import random
from collections import defaultdict

from hypothesis import given, settings
from hypothesis import strategies as st
from support.checked_engine import EOS, CheckedEngine, draw, output_of

from biphase.decode_worker.requests import CancelPull, DecodeEffect, DecodeRequest, StartPull
from biphase.decode_worker.scheduler import DecodeScheduler
from biphase.engine.block_pool import BlockPool
from biphase.engine.limits import Limits
from biphase.engine.sequence import SeqEnded, TokenOut
from biphase.engine.step import SeqStep, StepPlan, StepResult
from biphase.protos.ids import Incarnation, InstanceName, SeqId, TicketId
from biphase.protos.values import FinishReason, KvTicket, Sampling

BLOCK_SIZE = 4
TICKET = KvTicket(
    id=TicketId(b"t" * 16),
    kv_address="127.0.0.1:9",
    instance=InstanceName("prefill-0"),
    incarnation=Incarnation(1),
    num_tokens=0,
)


def make_scheduler(num_blocks: int = 8, **changes: int) -> DecodeScheduler:
    pool = BlockPool(num_blocks=num_blocks, block_size=BLOCK_SIZE)
    limits = Limits(
        vocab_size=1000, max_model_len=64, eos_token_ids=(EOS,), num_blocks=num_blocks, block_size=BLOCK_SIZE
    )
    return DecodeScheduler(
        pool, limits, **{"max_num_batched_tokens": 16, "local_prefill_tokens": 4, "watermark_blocks": 0, **changes}
    )


def offer(scheduler: DecodeScheduler, seq_id: int, tokens: int, *, max_tokens: int = 8, min_tokens: int = 0) -> None:
    request = DecodeRequest(
        seq_id=SeqId(seq_id),
        token_ids=[10 * seq_id + position for position in range(tokens)],
        num_prompt_tokens=tokens,
        sampling=Sampling(max_tokens=max_tokens, min_tokens=min_tokens),
    )
    assert scheduler.offer(request, 0.0) is None


def planned(scheduler: DecodeScheduler, now_s: float = 0.0) -> StepPlan:
    plan, effects = scheduler.schedule(now_s)
    assert plan is not None and effects == []
    return plan


def result(*tokens: int | None) -> StepResult:
    return StepResult(tokens=tokens, step_ms=1.0)


def parts(plan: StepPlan | None) -> list[tuple[int, int, int, bool]]:
    """(sequence, start, tokens, whether it goes on from a token being drawn) of each part."""
    return [] if plan is None else [(p.seq_id, p.start, len(p.token_ids), p.continues) for p in plan.seqs]


def test_a_sequence_goes_on_from_the_token_that_is_being_drawn() -> None:
    scheduler = make_scheduler()
    offer(scheduler, 1, 4, min_tokens=2)
    first = planned(scheduler)
    second = planned(scheduler)
    assert parts(first) == [(1, 0, 4, False)] and first.seqs[0].forbid_ids == (EOS,)
    # the placeholder goes to position 4, which needs a block of its own, and min_tokens counts the token in flight
    assert second.seqs == (
        SeqStep(
            seq_id=SeqId(1),
            token_ids=(0,),
            start=4,
            blocks=(*first.seqs[0].blocks, second.seqs[0].blocks[1]),
            sampling=Sampling(max_tokens=8, min_tokens=2),
            output_index=1,
            forbid_ids=(EOS,),
            continues=True,
        ),
    )
    assert scheduler.complete(first, result(300), 0.0) == [TokenOut(seq_id=SeqId(1), index=0, token_id=300)]
    third = planned(scheduler)
    assert parts(third) == [(1, 5, 1, True)] and third.seqs[0].forbid_ids == ()
    assert scheduler.complete(second, result(301), 0.0) == [TokenOut(seq_id=SeqId(1), index=1, token_id=301)]
    assert scheduler.complete(third, result(302), 0.0) == [TokenOut(seq_id=SeqId(1), index=2, token_id=302)]
    # nothing is in flight: the token is known
    assert parts(planned(scheduler)) == [(1, 6, 1, False)]


def test_one_that_is_certain_to_end_by_length_is_not_scheduled_again() -> None:
    scheduler = make_scheduler()
    offer(scheduler, 1, 4, max_tokens=2)
    first, second = planned(scheduler), planned(scheduler)
    assert scheduler.complete(first, result(300), 0.0)
    assert scheduler.schedule(0.0) == (None, [])
    said, ended = scheduler.complete(second, result(301), 0.0)
    assert isinstance(said, TokenOut) and said.finish is FinishReason.LENGTH
    assert isinstance(ended, SeqEnded) and scheduler.superfluous_tokens == 0


def test_one_that_reaches_the_context_is_not_scheduled_again() -> None:
    scheduler = make_scheduler(num_blocks=16, max_num_batched_tokens=64)
    offer(scheduler, 1, 62, max_tokens=3)  # 62 + 2 fill the context of 64
    first, second = planned(scheduler), planned(scheduler)
    assert scheduler.complete(first, result(300), 0.0)
    assert scheduler.schedule(0.0) == (None, [])
    said, ended = scheduler.complete(second, result(301), 0.0)
    assert isinstance(said, TokenOut) and said.finish is FinishReason.LENGTH and isinstance(ended, SeqEnded)


def test_the_next_chunk_of_a_local_prefill_follows_the_one_in_flight() -> None:
    scheduler = make_scheduler()
    offer(scheduler, 1, 17)
    first, second = planned(scheduler), planned(scheduler)
    assert (parts(first), parts(second)) == ([(1, 0, 16, False)], [(1, 16, 1, False)])
    assert scheduler.complete(first, result(None), 0.0) == []
    assert scheduler.queued_tokens == 0
    assert parts(planned(scheduler)) == [(1, 17, 1, True)]


def test_two_chunks_in_flight_count_as_queued_until_they_are_computed() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=8)
    offer(scheduler, 1, 20)
    first, second = planned(scheduler), planned(scheduler)
    assert (parts(first), parts(second), scheduler.queued_tokens) == ([(1, 0, 8, False)], [(1, 8, 8, False)], 20)
    scheduler.complete(first, result(None), 0.0)
    assert scheduler.queued_tokens == 12


def immediate_reuse(scheduler: DecodeScheduler) -> tuple[StepPlan, StepPlan]:
    """1 and a pool just large enough for it, two steps in flight; 2 waits and would take the blocks of 1 at once."""
    offer(scheduler, 1, 6, max_tokens=3)
    first, second = planned(scheduler), planned(scheduler)
    assert repr(scheduler.pool) == "<BlockPool [2 used, 0 free]>"
    offer(scheduler, 2, 8, max_tokens=1)
    return first, second


def assert_kept_until(scheduler: DecodeScheduler, second: StepPlan) -> None:
    """Nobody gets the blocks of 1 before the second step is booked; 2 gets just these after it."""
    blocks = second.seqs[0].blocks
    assert scheduler.schedule(0.0) == (None, [])
    assert all(scheduler.pool.references(block) == 1 for block in blocks)
    (ended,) = scheduler.complete(second, result(77), 5.0)
    assert isinstance(ended, SeqEnded) and ended.seq_id == 1
    after = planned(scheduler)
    assert parts(after) == [(2, 0, 8, False)] and set(after.seqs[0].blocks) == set(blocks)


def test_a_finish_is_said_at_once_and_the_blocks_are_kept_for_the_superfluous_step() -> None:
    scheduler = make_scheduler(num_blocks=2)
    first, second = immediate_reuse(scheduler)
    said = scheduler.complete(first, result(EOS), 3.0)
    assert said == [TokenOut(seq_id=SeqId(1), index=0, token_id=EOS, finish=FinishReason.STOP)]
    assert scheduler.cancel(SeqId(1), 3.0) == []
    assert_kept_until(scheduler, second)
    assert scheduler.superfluous_tokens == 1


def test_a_cancel_ends_with_the_last_step_that_has_it_and_its_blocks_are_kept_so_long() -> None:
    scheduler = make_scheduler(num_blocks=2)
    first, second = immediate_reuse(scheduler)
    assert scheduler.cancel(SeqId(1), 0.0) == []
    assert scheduler.schedule(0.0) == (None, [])
    assert scheduler.complete(first, result(77), 3.0) == []
    assert_kept_until(scheduler, second)
    assert scheduler.superfluous_tokens == 1


def test_a_failed_step_ends_its_sequences_after_the_later_step_that_has_them() -> None:
    scheduler = make_scheduler(num_blocks=2)
    first, second = immediate_reuse(scheduler)
    assert scheduler.fail(first, "kernel says no", 3.0) == []
    assert_kept_until(scheduler, second)


def test_the_steps_after_a_failed_one_are_booked_whether_they_fail_too_or_not() -> None:
    scheduler = make_scheduler()
    offer(scheduler, 1, 4)
    first = planned(scheduler)
    offer(scheduler, 2, 4)
    second = planned(scheduler)
    assert parts(second) == [(1, 4, 1, True), (2, 0, 4, False)]
    assert scheduler.fail(first, "kernel says no", 0.0) == []
    third = planned(scheduler)
    assert parts(third) == [(2, 4, 1, True)]
    said, ended = sorted(scheduler.complete(second, result(8, 9), 0.0), key=lambda effect: -effect.seq_id)
    assert said == TokenOut(seq_id=SeqId(2), index=0, token_id=9)
    assert isinstance(ended, SeqEnded) and (ended.outcome, ended.detail) == ("failed", "kernel says no")
    (ended,) = scheduler.fail(third, "again", 0.0)
    assert isinstance(ended, SeqEnded) and (ended.seq_id, ended.detail) == (2, "again")
    assert repr(scheduler.pool) == "<BlockPool [0 used, 8 free]>" and len(scheduler) == 0


def test_the_time_of_the_superfluous_step_is_not_the_requests() -> None:
    scheduler = make_scheduler()
    offer(scheduler, 1, 4)
    first, second = planned(scheduler, 1.0), planned(scheduler, 1.0)
    scheduler.complete(first, result(300), 2.0)
    third = planned(scheduler, 2.0)
    scheduler.complete(second, result(EOS), 4.0)
    (ended,) = scheduler.complete(third, result(9), 9.0)
    assert isinstance(ended, SeqEnded) and ended.stats.decode_ms == 2000.0


def test_nobody_is_preempted_while_a_step_is_in_flight() -> None:
    scheduler = make_scheduler(num_blocks=4)
    offer(scheduler, 1, 8)
    offer(scheduler, 2, 7)
    first = planned(scheduler)
    assert parts(first) == [(1, 0, 8, False), (2, 0, 7, False)]
    # 1 needs a third block for its next token; 2, who would give way, is in flight
    assert scheduler.schedule(0.0) == (None, [])
    assert scheduler.preemptions == 0
    scheduler.complete(first, result(8, 9), 0.0)
    second = planned(scheduler)
    assert parts(second) == [(1, 8, 1, False)] and scheduler.preemptions == 1
    assert parts(planned(scheduler)) == [(1, 9, 1, True)]


def test_a_preempted_sequence_goes_on_where_it_stood_and_ahead_again() -> None:
    scheduler = make_scheduler(num_blocks=4)
    offer(scheduler, 1, 8, max_tokens=2)
    offer(scheduler, 2, 7)
    scheduler.complete(planned(scheduler), result(8, 9), 0.0)
    second = planned(scheduler)
    assert scheduler.preemptions == 1 and len(second.seqs) == 1
    scheduler.complete(second, result(9), 0.0)
    third = planned(scheduler)
    assert third.seqs[0].token_ids == (20, 21, 22, 23, 24, 25, 26, 9)
    assert parts(planned(scheduler)) == [(2, 8, 1, True)]


class World:
    """Drives a DecodeScheduler at a pipeline depth with random arrivals, cancels, pull ends and engine errors."""

    def __init__(self, seed: int, depth: int, num_blocks: int, max_num_seqs: int, *, trouble: float) -> None:
        self.random = random.Random(seed)
        self.requests_random = random.Random(seed)
        self.depth = depth
        self.trouble = trouble
        self.pool = BlockPool(num_blocks=num_blocks, block_size=BLOCK_SIZE)
        self.limits = Limits(
            vocab_size=1000, max_model_len=80, eos_token_ids=(EOS,), num_blocks=num_blocks, block_size=BLOCK_SIZE
        )
        self.scheduler = DecodeScheduler(
            self.pool, self.limits, max_num_seqs=max_num_seqs, max_num_batched_tokens=24, local_prefill_tokens=8
        )
        self.engine = CheckedEngine(self.pool)
        self.waiting: list[DecodeRequest] = []
        self.requests: dict[SeqId, DecodeRequest] = {}
        self.tokens: dict[SeqId, list[int]] = defaultdict(list)
        self.finished: set[SeqId] = set()
        self.ended: dict[SeqId, str] = {}
        self.pulls: dict[SeqId, StartPull] = {}
        self.ahead = 0

    def arrive(self, seq_id: int) -> None:
        """The same requests at every depth."""
        rng = self.requests_random
        prompt, forced, pull = rng.randint(1, 30), rng.choice([0, 0, 3]), rng.random() < 0.5
        prompt_ids = [rng.randint(50, 60) for _ in range(prompt)]
        sampling = Sampling(
            max_tokens=forced + rng.randint(2, 24), min_tokens=rng.choice([0, 0, 6]), ignore_eos=rng.random() < 0.4
        )
        token_ids = prompt_ids + [30 + n for n in range(forced)]
        ticket = KvTicket(
            id=TICKET.id,
            kv_address=TICKET.kv_address,
            instance=TICKET.instance,
            incarnation=TICKET.incarnation,
            num_tokens=len(token_ids),
        )
        self.waiting.append(
            DecodeRequest(
                seq_id=SeqId(seq_id),
                token_ids=token_ids,
                num_prompt_tokens=prompt,
                sampling=sampling,
                ticket=ticket if pull else None,
                pull_epoch=1,
            )
        )

    def turn(self) -> bool:
        """One random thing; False when there was nothing to do at all."""
        rng = self.random
        while self.waiting and self.scheduler.offer(self.waiting[0], 0.0) is None:
            self.requests[self.waiting[0].seq_id] = self.waiting[0]
            self.waiting.pop(0)
        if self.trouble and rng.random() < self.trouble and self.requests:
            self.perform(self.scheduler.cancel(rng.choice(list(self.requests)), 0.0))
        if self.pulls and rng.random() < 0.5:
            self.end_a_pull()
        plan = None
        if len(self.engine.plans) < self.depth:
            plan, effects = self.scheduler.schedule(0.0)
            self.perform(effects)
            if plan is not None:
                self.ahead += bool(self.engine.plans)
                self.engine.launch(plan)
        self.check()
        if self.engine.plans and (plan is None or len(self.engine.plans) == self.depth or rng.random() < 0.3):
            self.book()
        elif plan is None:
            return bool(self.pulls)
        return True

    def book(self) -> None:
        before = {part.seq_id for plan in list(self.engine.plans)[1:] for part in plan.seqs}
        plan, done = self.engine.run()
        if self.random.random() < self.trouble / 4:
            self.perform(self.scheduler.fail(plan, "no", 0.0))
        else:
            self.perform(self.scheduler.complete(plan, done, 0.0))
        assert not before & set(self.ended), "a sequence ended that is in a step in flight"
        self.check()

    def check(self) -> None:
        self.engine.check({seq_id: start.blocks for seq_id, start in self.pulls.items()})
        self.pool.check()

    def end_a_pull(self) -> None:
        seq_id = self.random.choice(sorted(self.pulls))
        start, request = self.pulls.pop(seq_id), self.requests[seq_id]
        self.engine.write(seq_id, start.blocks, 0, request.token_ids)
        if self.random.random() < self.trouble:
            self.perform(self.scheduler.pull_failed(seq_id, "no", 0.0))
            return
        index = len(request.token_ids) - request.num_prompt_tokens
        token = draw(request.token_ids, index, self.limits.forbidden(index, request.sampling))
        self.tokens[seq_id].append(token)
        done = self.scheduler.handed_off(seq_id, token, 0.0, num_bytes=1, transfer_ms=1.0, exposed_ms=1.0)
        self.perform(done)

    def perform(self, effects: list[DecodeEffect]) -> None:
        for effect in effects:
            seq_id = effect.seq_id
            assert seq_id not in self.ended, f"{effect} after its end"
            match effect:
                case TokenOut():
                    request = self.requests[seq_id]
                    forced = len(request.token_ids) - request.num_prompt_tokens
                    assert seq_id not in self.finished and effect.index == forced + len(self.tokens[seq_id])
                    self.tokens[seq_id].append(effect.token_id)
                    if effect.finish is not None:
                        self.finished.add(seq_id)
                case StartPull():
                    self.pulls[seq_id] = effect
                    # a transfer may write from now on
                    self.engine.write(seq_id, effect.blocks, 0, [-1] * effect.num_tokens)
                case CancelPull():
                    assert seq_id in self.pulls
                case SeqEnded():
                    assert seq_id not in self.pulls
                    self.ended[seq_id] = effect.outcome

    def play(self, num_requests: int) -> None:
        for n in range(num_requests):
            self.arrive(n)
            for _ in range(self.random.randint(0, 6)):
                self.turn()
        for _ in range(20_000):
            if not self.turn() and not self.waiting:
                break
        assert len(self.scheduler) == 0, f"still there: {self.scheduler!r}"
        assert self.pool.num_free == self.pool.num_blocks
        assert len(self.ended) == num_requests
        for seq_id, request in self.requests.items():
            whole = output_of(request.token_ids, request.num_prompt_tokens, request.sampling, self.limits)
            said = self.tokens[seq_id]
            assert said == (whole if self.ended[seq_id] == "done" else whole[: len(said)])


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    depth=st.integers(1, 3),
    num_blocks=st.integers(14, 40),
    max_num_seqs=st.integers(1, 12),
    trouble=st.sampled_from([0.0, 0.1]),
)
def test_every_depth_gives_the_same_tokens_and_no_block_is_freed_under_a_step(
    seed: int, depth: int, num_blocks: int, max_num_seqs: int, trouble: float
) -> None:
    world = World(seed, depth, num_blocks, max_num_seqs, trouble=trouble)
    world.play(30)
    if depth == 1:
        assert world.scheduler.superfluous_tokens == world.ahead == 0
    if not trouble:
        assert set(world.ended.values()) == {"done"}
        pulled = sum(request.ticket is not None for request in world.requests.values())
        said = sum(map(len, world.tokens.values())) - pulled
        assert world.engine.draws == said + world.scheduler.superfluous_tokens


def test_tight_pools_preempt_and_run_ahead_and_run_in_vain() -> None:
    """The property above is about something: in these worlds everything that it guards happens, often."""
    ahead = preemptions = superfluous = 0
    for seed in range(20):
        world = World(seed, 2, 16, 8, trouble=0.0)
        world.play(30)
        ahead += world.ahead
        preemptions += world.scheduler.preemptions
        superfluous += world.scheduler.superfluous_tokens
    assert ahead > 1000 and preemptions > 50 and superfluous > 50
