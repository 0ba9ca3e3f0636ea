"""The decode scheduler before a pipeline of stages: steps in flight share no sequence, and every stage has its part."""

import random
from collections import deque

import pytest

from biphase.decode_worker.requests import DecodeRequest
from biphase.decode_worker.scheduler import DecodeScheduler
from biphase.engine.block_pool import BlockPool
from biphase.engine.limits import Limits
from biphase.engine.sequence import SeqEnded, TokenOut
from biphase.engine.step import StepPlan, StepResult
from biphase.protos.ids import SeqId
from biphase.protos.values import Sampling

BLOCK_SIZE = 4


def scheduler(*, micro_batches: int, num_blocks: int = 200, local_prefill_tokens: int = 8) -> DecodeScheduler:
    limits = Limits(vocab_size=100, max_model_len=200, eos_token_ids=(2,), num_blocks=num_blocks, block_size=BLOCK_SIZE)
    return DecodeScheduler(
        BlockPool(num_blocks=num_blocks, block_size=BLOCK_SIZE),
        limits,
        max_num_seqs=16,
        max_num_batched_tokens=32,
        local_prefill_tokens=local_prefill_tokens,
        micro_batches=micro_batches,
        may_continue=False,
    )


def offer(to: DecodeScheduler, seq_id: int, prompt: int, max_tokens: int) -> None:
    sampling = Sampling(max_tokens=max_tokens, ignore_eos=True)
    request = DecodeRequest(seq_id=SeqId(seq_id), token_ids=[5] * prompt, num_prompt_tokens=prompt, sampling=sampling)
    assert to.offer(request, 0.0) is None


def over(plan: StepPlan) -> StepResult:
    return StepResult(tokens=tuple(9 if part.sampling else None for part in plan.seqs), step_ms=1.0)


def scheduled(to: DecodeScheduler) -> StepPlan:
    plan, _ = to.schedule(0.0)
    assert plan is not None
    return plan


def decoding(plan: StepPlan) -> list[int]:
    return [part.seq_id for part in plan.seqs if part.start]


@pytest.mark.parametrize(
    ("stages", "running", "sizes"), [(2, 6, [3, 3]), (2, 5, [3, 2]), (3, 7, [3, 3, 1]), (4, 2, [1, 1])]
)
def test_those_that_decode_are_dealt_out_over_the_stages(stages: int, running: int, sizes: list[int]) -> None:
    to = scheduler(micro_batches=stages)
    for seq_id in range(running):
        offer(to, seq_id, 3, 50)
    first = scheduled(to)
    assert len(first.seqs) == running
    assert to.schedule(0.0)[0] is None  # every token is being drawn
    to.complete(first, over(first), 0.0)
    in_flight = deque(scheduled(to) for _ in sizes)
    assert [len(plan.seqs) for plan in in_flight] == sizes
    assert to.schedule(0.0)[0] is None
    for _ in range(20):
        plan = in_flight.popleft()
        to.complete(plan, over(plan), 0.0)
        again = scheduled(to)
        assert [part.seq_id for part in again.seqs] == [part.seq_id for part in plan.seqs]
        assert not any(part.continues for part in again.seqs)
        in_flight.append(again)


def test_a_prompt_is_computed_beside_every_micro_batch_and_between_them_only_where_a_stage_is_free() -> None:
    to = scheduler(micro_batches=2)
    for seq_id in range(2):
        offer(to, seq_id, 3, 50)
    first = scheduled(to)
    to.complete(first, over(first), 0.0)
    offer(to, 2, 60, 10)
    waiting = scheduled(to)
    assert (decoding(waiting), waiting.num_tokens) == ([0], 1 + 8)
    second = scheduled(to)
    assert (second.seqs[0].seq_id, second.num_tokens, second.seqs[1].start) == (1, 1 + 8, 8)
    assert to.schedule(0.0)[0] is None  # both stages have work, and those in it wait for their next token
    to.complete(waiting, over(waiting), 0.0)
    to.cancel(SeqId(0), 0.0)
    alone = scheduled(to)
    assert (alone.num_tokens, alone.seqs[0].start) == (8, 16)


@pytest.mark.parametrize("seed", range(20))
def test_random_pipelines_finish_everything_and_share_no_sequence(seed: int) -> None:
    rng = random.Random(seed)
    stages = rng.randint(1, 4)
    to = scheduler(micro_batches=stages, num_blocks=rng.randint(50, 80))
    tokens: dict[int, int] = {}
    wanted: dict[int, int] = {}
    ended: set[int] = set()
    in_flight: deque[StepPlan] = deque()
    for turn in range(2000):
        if turn < 400 and rng.random() < 0.3 and len(wanted) < 60 and to.num_waiting < 16:
            wanted[len(wanted)] = rng.randint(1, 30)
            offer(to, len(wanted) - 1, rng.randint(1, 60), wanted[len(wanted) - 1])
        if len(in_flight) < stages + 1 and rng.random() < 0.7:
            plan, _ = to.schedule(float(turn))
            if plan is not None:
                drawing = [part.seq_id for step in in_flight for part in step.seqs if part.sampling]
                assert not set(drawing) & {part.seq_id for part in plan.seqs}
                in_flight.append(plan)
        if in_flight and rng.random() < 0.5:
            plan = in_flight.popleft()
            for effect in to.complete(plan, over(plan), float(turn)):
                if isinstance(effect, TokenOut):
                    assert effect.index == tokens.get(effect.seq_id, 0)
                    tokens[effect.seq_id] = effect.index + 1
                elif isinstance(effect, SeqEnded):
                    assert effect.outcome == "done"
                    ended.add(effect.seq_id)
    assert tokens == wanted and ended == wanted.keys() and not in_flight
    assert to.pool.num_free == to.pool.num_blocks
    to.pool.check()
