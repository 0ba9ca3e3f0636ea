"""What a worker's steps take, fitted while it runs. Pure: the worker books each step here, no clock is read.

Steps are kept by size, one bucket per power of two of new tokens and of context, each with the mean of its last steps. So
an old load is forgotten only where a new one of its size contradicts it: a worker that has decoded small batches for an
hour still knows what a large one took, and an idle one forgets nothing. A bucket's weight halves with every
``HALF_LIFE_STEPS`` steps booked elsewhere. The coefficients are the non-negative least squares of the relative error over
the buckets, so that small steps count as much as large ones and one stalled step bends little.
"""

import itertools
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from biphase.engine.step import StepPlan
from biphase.protos.step_time import RecentSteps, StepTime, attended

MEMORY_STEPS = 64
"""A bucket's mean covers about so many steps."""

HALF_LIFE_STEPS = 20_000
RIDGE = 1e-6
"""Of the relative error: where the steps seen leave a coefficient open it stays small, and the solution unique."""

Vector = tuple[float, float, float]


def work_of(plan: StepPlan) -> tuple[int, int]:
    """A step's new tokens and the tokens that they attend to."""
    return plan.num_tokens, sum(attended(seq.start, len(seq.token_ids)) for seq in plan.seqs)


def is_prefill(plan: StepPlan) -> bool:
    """Whether a step counts as prefill-like: any sequence computes more than the one token that decoding does."""
    return any(len(seq.token_ids) > 1 for seq in plan.seqs)


@dataclass(slots=True)
class _Bucket:
    tokens: float
    context: float
    seconds: float
    count: int
    last_step: int

    def add(self, tokens: int, context: int, seconds: float, step: int) -> None:
        self.count = min(self.count + 1, MEMORY_STEPS)
        share = 1 / self.count
        self.tokens += (tokens - self.tokens) * share
        self.context += (context - self.context) * share
        self.seconds += (seconds - self.seconds) * share
        self.last_step = step


class StepFit:
    """The steps of one kind (prefill-like or decode-like) on one instance."""

    def __init__(self) -> None:
        self.num_steps = 0
        self._buckets: dict[tuple[int, int], _Bucket] = {}
        self._fitted = StepTime()

    def add(self, new_tokens: int, context_tokens: int, seconds: float) -> None:
        """Book one step that took ``seconds``. What can be no measurement is left out."""
        if new_tokens < 1 or context_tokens < 0 or not 0 < seconds < 1e6:
            return
        self.num_steps += 1
        key = (new_tokens.bit_length(), context_tokens.bit_length())
        bucket = self._buckets.get(key)
        if bucket is None:
            self._buckets[key] = _Bucket(new_tokens, context_tokens, seconds, 1, self.num_steps)
        else:
            bucket.add(new_tokens, context_tokens, seconds, self.num_steps)

    def step_time(self) -> StepTime:
        """The fit so far; cheap enough for once a second, and free while nothing was booked."""
        if self._fitted.num_steps != self.num_steps:
            fixed_s, per_token_s, per_context_s = _fit(
                [
                    (bucket, bucket.count * 0.5 ** ((self.num_steps - bucket.last_step) / HALF_LIFE_STEPS))
                    for bucket in self._buckets.values()
                ]
            )
            self._fitted = StepTime(
                fixed_s=fixed_s, per_token_s=per_token_s, per_context_s=per_context_s, num_steps=self.num_steps
            )
        return self._fitted

    def __repr__(self) -> str:
        return f"<StepFit [{self.num_steps} steps in {len(self._buckets)} buckets]>"


class RecentWindow:
    """The steps of the last ``within_s`` seconds, summed by whole seconds so that its size is bounded."""

    def __init__(self, within_s: float = 10.0) -> None:
        self.within_s = within_s
        self._seconds: deque[tuple[int, RecentSteps]] = deque()

    def add(self, new_tokens: int, context_tokens: int, seconds: float, now_s: float) -> None:
        """Book a step that ended at ``now_s``."""
        second = int(now_s)
        before = RecentSteps()
        if self._seconds and self._seconds[-1][0] == second:
            before = self._seconds.pop()[1]
        step = RecentSteps(num_steps=1, seconds=seconds, tokens=new_tokens, context_tokens=context_tokens)
        self._seconds.append((second, _sum([before, step])))
        self._forget(now_s)

    def total(self, now_s: float) -> RecentSteps:
        self._forget(now_s)
        return _sum([steps for _, steps in self._seconds])

    def _forget(self, now_s: float) -> None:
        while self._seconds and self._seconds[0][0] < now_s - self.within_s:
            self._seconds.popleft()


def _sum(parts: Sequence[RecentSteps]) -> RecentSteps:
    return RecentSteps(
        num_steps=sum(part.num_steps for part in parts),
        seconds=sum(part.seconds for part in parts),
        tokens=sum(part.tokens for part in parts),
        context_tokens=sum(part.context_tokens for part in parts),
    )


def _fit(buckets: Sequence[tuple[_Bucket, float]]) -> Vector:
    """Non-negative least squares of (prediction / seconds - 1): of all choices of coefficients that may be above 0, the
    best that is admissible. Three coefficients are seven choices."""
    total = sum(weight for _, weight in buckets)
    scales = tuple(max(column) or 1.0 for column in zip(*((1.0, b.tokens, b.context) for b, _ in buckets), strict=True))
    rows = [
        (
            tuple(x / scale / b.seconds for x, scale in zip((1.0, b.tokens, b.context), scales, strict=True)),
            weight / total,
        )
        for b, weight in buckets
    ]
    slowest_s = max(bucket.seconds for bucket, _ in buckets)
    ridge = RIDGE / slowest_s**2
    gram = [[sum(w * x[i] * x[j] for x, w in rows) + ridge * (i == j) for j in range(3)] for i in range(3)]
    right = [sum(w * x[i] for x, w in rows) for i in range(3)]
    best, best_error = (slowest_s, 0.0, 0.0), float("inf")
    for size in (1, 2, 3):
        for chosen in itertools.combinations(range(3), size):
            part = _solve([[gram[i][j] for j in chosen] for i in chosen], [right[i] for i in chosen])
            if part is None or min(part) < 0:
                continue
            solution = [0.0, 0.0, 0.0]
            for index, value in zip(chosen, part, strict=True):
                solution[index] = value
            error = sum(
                solution[i] * (sum(gram[i][j] * solution[j] for j in range(3)) - 2 * right[i]) for i in range(3)
            )
            if error < best_error:
                best, best_error = (solution[0], solution[1], solution[2]), error
    return best[0] / scales[0], best[1] / scales[1], best[2] / scales[2]


def _solve(matrix: list[list[float]], right: list[float]) -> list[float] | None:
    """Gaussian elimination with pivots; None where the matrix is singular."""
    size = len(right)
    rows = [[*row, value] for row, value in zip(matrix, right, strict=True)]
    for column in range(size):
        pivot = max(range(column, size), key=lambda row: abs(rows[row][column]))
        if abs(rows[pivot][column]) < 1e-300:
            return None
        rows[column], rows[pivot] = rows[pivot], rows[column]
        for row in range(size):
            if row != column:
                factor = rows[row][column] / rows[column][column]
                rows[row] = [a - factor * b for a, b in zip(rows[row], rows[column], strict=True)]
    return [rows[index][size] / rows[index][index] for index in range(size)]
