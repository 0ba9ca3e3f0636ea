"""What an instance's steps were, and took. Pure: the worker says when each began and ended.

Steps may overlap: each counts from its launch or the end of the one before, whichever came last, so that together they are
the time in which the engine was busy, and alone what one more step costs.
"""

from collections import deque

from biphase.engine.step import StepPlan
from biphase.engine.step_fit import RecentWindow, StepFit, is_prefill, work_of
from biphase.protos.step_time import RecentSteps, StepTime
from biphase.protos.values import Load, WorkerSignals

LONG_STEP_S = 1.0
"""A step that has run for so long is told before it is over: an instance that hangs books nothing any more."""


class StepFits:
    """The fits of one engine, for as long as it is loaded, whatever roles it serves meanwhile."""

    def __init__(self) -> None:
        self.prefill = StepFit()
        self.decode = StepFit()

    def of(self, plan: StepPlan) -> StepFit:
        return self.prefill if is_prefill(plan) else self.decode


class StepBook:
    """The totals of one life of an instance, which began at ``now_s``. Steps end in the order of their launches."""

    def __init__(self, now_s: float) -> None:
        self.fits = StepFits()
        self.num_steps = 0
        self.prefill_tokens = 0
        self.decode_tokens = 0
        self._began_s = now_s
        self._busy_s = 0.0
        self._last_end_s = now_s
        self._under_way: deque[tuple[StepPlan, float]] = deque()
        self._recent = RecentWindow()

    def launched(self, plan: StepPlan, now_s: float) -> None:
        self._under_way.append((plan, now_s))

    def over(self, now_s: float, *, failed: bool = False) -> None:
        """The oldest step under way has ended; one that ``failed`` tells nothing but the time it took."""
        plan, seconds = self._under_way[0][0], self._running_s(now_s)
        self._under_way.popleft()
        self._last_end_s = now_s
        self._busy_s += seconds
        if failed:
            return
        self.num_steps += 1
        for seq in plan.seqs:
            count = len(seq.token_ids)
            if count > 1:
                self.prefill_tokens += count
            else:
                self.decode_tokens += 1
        tokens, context = work_of(plan)
        self.fits.of(plan).add(tokens, context, seconds)
        self._recent.add(tokens, context, seconds, now_s)

    def signals(self, load: Load, running_tokens: int, now_s: float) -> WorkerSignals:
        running_s = self._running_s(now_s)
        return WorkerSignals(
            uptime_s=now_s - self._began_s,
            prefill_tokens=self.prefill_tokens,
            decode_tokens=self.decode_tokens,
            num_steps=self.num_steps,
            busy_s=self._busy_s + running_s,
            queued=load.queued,
            queued_tokens=load.queued_tokens,
            running=load.running,
            running_tokens=running_tokens,
            free_blocks=load.free_blocks,
            prefill_step=self._known(self.fits.prefill),
            decode_step=self._known(self.fits.decode),
            recent=self._recent_with(running_s, now_s),
            step_s=running_s,
            step_expected_s=self._expected_s(),
        )

    def _running_s(self, now_s: float) -> float:
        """How long the oldest step under way has run."""
        return max(0.0, now_s - max(self._under_way[0][1], self._last_end_s)) if self._under_way else 0.0

    def _expected_s(self) -> float:
        """What a step like the oldest one under way took so far; 0: not known."""
        if not self._under_way:
            return 0.0
        plan = self._under_way[0][0]
        known = self._known(self.fits.of(plan))
        return known.seconds(*work_of(plan)) if known.is_known else 0.0

    def _recent_with(self, running_s: float, now_s: float) -> RecentSteps:
        recent = self._recent.total(now_s)
        if running_s < LONG_STEP_S:
            return recent
        tokens, context = work_of(self._under_way[0][0])
        return RecentSteps(
            num_steps=recent.num_steps + 1,
            seconds=recent.seconds + running_s,
            tokens=recent.tokens + tokens,
            context_tokens=recent.context_tokens + context,
        )

    @staticmethod
    def _known(fit: StepFit) -> StepTime:
        return fit.step_time() if fit.num_steps else StepTime()

    def __repr__(self) -> str:
        return f"<StepBook [{self.num_steps} steps, {len(self._under_way)} under way]>"
