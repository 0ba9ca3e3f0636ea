"""What makes every kernel variant a server can need: run before it is ready, so that nothing is compiled later."""

from collections.abc import Iterator

from biphase.engine.plan_limits import PlanLimits
from biphase.engine.step import SeqStep, StepPlan
from biphase.kernels.kv_pack import KvMemory
from biphase.protos.ids import BlockId, SeqId
from biphase.protos.values import Sampling

_GREEDY = Sampling()
_FILTERED = Sampling(temperature=0.8, top_k=50, top_p=0.9, min_p=0.01, seed=1)
_PLAIN = Sampling(temperature=1.0, seed=2)


def warm_up_plans(limits: PlanLimits, *, max_rows: int, max_seqs: int, buckets: tuple[int, ...]) -> Iterator[StepPlan]:
    """Chunks of as many rows in all as ``row_counts`` says, those beside decode rows; a chunk behind a cached part, one
    that draws nothing; decode rows of each bucket's number of which one draws nothing, so that no graph has them; every
    kind of sampling. All in block 0, whatever their length.
    """
    longest = min(limits.max_model_len, limits.num_blocks * limits.block_size)
    most = min(max_rows, max_seqs * longest)
    for count in row_counts(most):
        yield StepPlan(seqs=tuple(_packed(count, longest, limits, max_seqs)))
    for count in buckets:
        if count <= max_rows:
            yield _decode(count, limits)
    for sampling in (_FILTERED, _PLAIN):
        yield StepPlan(seqs=(_seq(0, 1, limits, sampling=sampling),))
    if longest > 2 and most > 1:
        yield StepPlan(seqs=(_seq(0, 2, limits),))
        yield StepPlan(seqs=(_seq(0, 2, limits, start=longest - 2, sampling=_GREEDY),))
        if max_seqs > 1 and max_rows > 2:
            yield StepPlan(seqs=(_seq(0, 1, limits, sampling=_FILTERED), _seq(1, 2, limits, sampling=_PLAIN)))


def row_counts(most: int) -> list[int]:
    """Powers of two, one more than each, and ``most``.

    Kernels choose among variants by a step's rows: at bounds that are powers of two, and at others that are at least a
    factor of two apart. Of the numbers between two bounds one is then always among these.
    """
    found = {most}
    power = 1
    while power <= most:
        found |= {power, min(most, power + 1)}
        power *= 2
    return sorted(found)


def warm_up_handoff(memory: KvMemory) -> None:
    """One token of block 0 out of the pool and back, as a handoff moves it: the event loop must never wait for a compiler."""
    layout = memory.layout
    box = layout.box(1)
    packed = bytearray(box.num_bytes(layout))
    memory.pack([0], box, packed)
    memory.unpack([0], box, packed)


def _packed(count: int, longest: int, limits: PlanLimits, max_seqs: int) -> Iterator[SeqStep]:
    """Sequences of ``count`` rows in all, decode rows first where there is room for some."""
    num_chunks = -(-count // longest)
    num_decode = min(max_seqs - num_chunks, 2) if count > num_chunks + 3 else 0
    for number in range(num_decode):
        yield _seq(number, 1, limits, sampling=_GREEDY)
    left = count - num_decode
    for number in range(num_decode, max_seqs):
        length = min(left, longest)
        if length:
            yield _seq(number, length, limits, sampling=_GREEDY)
        left -= length


def _decode(count: int, limits: PlanLimits) -> StepPlan:
    """``count`` sequences of one token, of which all but the last draw."""
    return StepPlan(
        seqs=tuple(_seq(i, 1, limits, sampling=_GREEDY if i < count - 1 else None) for i in range(count)),
    )


def _seq(number: int, count: int, limits: PlanLimits, *, start: int = 0, sampling: Sampling | None = None) -> SeqStep:
    blocks = [BlockId(0)] * (-(-(start + count) // limits.block_size))
    return SeqStep(seq_id=SeqId(-1 - number), token_ids=[0] * count, start=start, blocks=blocks, sampling=sampling)
