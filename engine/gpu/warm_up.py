"""Steps that make every kernel variant a server can need: run before it is ready, so that nothing is compiled later."""

from collections.abc import Iterator

from biphase.engine.plan_limits import PlanLimits
from biphase.engine.step import SeqStep, StepPlan
from biphase.protos.ids import BlockId, SeqId
from biphase.protos.values import Sampling

_GREEDY = Sampling()
_FILTERED = Sampling(temperature=0.8, top_k=50, top_p=0.9, min_p=0.01, seed=1)
_PLAIN = Sampling(temperature=1.0, seed=2)


def warm_up_plans(limits: PlanLimits, *, max_rows: int, max_seqs: int) -> Iterator[StepPlan]:
    """Prefill of lengths at and around the powers of two (settings change with a step's tokens), with and without a draw
    and a cached part, mixed with decode rows; decode rows alone that do not all draw; every kind of sampling."""
    longest = min(max_rows, limits.max_model_len, limits.num_blocks * limits.block_size)
    lengths = {longest}
    power = 2
    while power <= longest:
        lengths |= {power, min(longest, power + 1)}
        power *= 2
    for length in sorted(lengths):
        yield _plan(_seq(0, length, limits, sampling=_GREEDY))
    some = min(limits.block_size + 3, longest)
    yield _plan(_seq(0, some, limits))
    for sampling in (_FILTERED, _PLAIN):
        yield _plan(_seq(0, 1, limits, sampling=sampling))
    if max_seqs > 1:
        yield _plan(_seq(0, 1, limits), _seq(1, 1, limits, sampling=_FILTERED))
        if 1 < some < max_rows:
            yield _plan(_seq(0, 1, limits, sampling=_GREEDY), _seq(1, some, limits, sampling=_PLAIN))
    if longest > 2:
        yield _plan(_seq(0, longest - 1, limits, start=1, sampling=_GREEDY))


def _plan(*seqs: SeqStep) -> StepPlan:
    return StepPlan(seqs=seqs)


def _seq(number: int, count: int, limits: PlanLimits, *, start: int = 0, sampling: Sampling | None = None) -> SeqStep:
    blocks = [BlockId(0)] * (-(-(start + count) // limits.block_size))
    return SeqStep(seq_id=SeqId(-1 - number), token_ids=[0] * count, start=start, blocks=blocks, sampling=sampling)
