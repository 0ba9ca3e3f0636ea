"""The shell around a phase's scheduler: legs in, engine steps, effects out. One asyncio loop owns all of it.

Nothing here polls: the step loop runs while the scheduler has a plan and sleeps until something changes otherwise. A
step's tokens leave in one message per link. What an engine error costs is the legs of that step. A lost engine and a stop
are no fault of any request, and a router goes on with it elsewhere: the legs of a lost engine end as cancelled by us, which
counts as a loss, those of a stop as drained, which does not.
"""

import asyncio
import contextlib
import logging
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, Generic, Protocol, TypeVar

from biphase.engine.block_pool import BlockPool
from biphase.engine.host_figures import ProcessFigures
from biphase.engine.legs import Leg, LegTable
from biphase.engine.link import Link, OpenLeg
from biphase.engine.sequence import Refusal, SeqEnded, TokenOut
from biphase.engine.signals import SignalReporter
from biphase.engine.step import StepPlan, StepResult
from biphase.engine.step_book import StepBook
from biphase.protos.errors import EngineLost, one_line
from biphase.protos.ids import LegId, SeqId
from biphase.protos.values import LegOutcome, LegStats, Load, WorkerSignals

_log = logging.getLogger(__name__)

CHECK_EVERY_S = 10.0
"""The block pool's books are checked when the last leg has ended, no more often than this."""


def lost_line(error: EngineLost) -> str:
    """What the requests of a lost engine are told."""
    return f"the instance is lost: {one_line(error)}"


class StepRunner(Protocol):
    """What computes a worker's steps: the engine thread."""

    @property
    def pipeline_depth(self) -> int:
        """How many steps may be launched and not over."""
        ...

    def launch(self, plan: StepPlan) -> asyncio.Future[StepResult]:
        """Begin a step after those launched before; the future raises what the engine raised."""
        ...


class Scheduler(Protocol):
    """What the shell needs of either phase's scheduler."""

    pool: BlockPool
    draining: bool
    superfluous_tokens: int

    @property
    def running_tokens(self) -> int:
        """Context held by what runs."""
        ...

    def schedule(self, now_s: float) -> tuple[StepPlan | None, list[Any]]: ...

    def complete(self, plan: StepPlan, result: StepResult, now_s: float) -> list[Any]: ...

    def fail(self, plan: StepPlan, detail: str, now_s: float, *, outcome: LegOutcome = "failed") -> list[Any]: ...

    def load(self) -> Load: ...

    def __len__(self) -> int: ...


L = TypeVar("L", bound=Leg)
S = TypeVar("S", bound=Scheduler)


class Worker(ABC, Generic[S, L]):
    """One instance's loop. A phase adds how a leg is offered and cancelled, and what its own effects mean."""

    def __init__(self, scheduler: S, runner: StepRunner, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.scheduler = scheduler
        self.clock = clock
        self.legs: LegTable[L] = LegTable()
        self.steps = StepBook(clock())
        self.no_legs = asyncio.Event()
        self.no_legs.set()
        self.turned_ms = 0
        """How long this instance took to turn into what it is; 0: it began so."""
        self.on_drain: Callable[[], None] = lambda: None
        self.on_drained: Callable[[], None] = lambda: None
        self.on_resume: Callable[[], None] = lambda: None
        self._runner = runner
        self._links: list[Link] = []
        self._next_seq = 0
        self._wake = asyncio.Event()
        self._stopping = False
        self._last_load: Load | None = None
        self._load_due = False
        self._checked_s = clock()
        self._grace: asyncio.TimerHandle | None = None
        self._reporter = SignalReporter(self.signals, lambda: not self.legs)
        self._figures = ProcessFigures()
        self._totals = {"steps": 0, "failed_steps": 0, "tokens": 0, "prefill_tokens": 0, "legs_opened": 0, "refused": 0}

    # What a phase adds.

    @abstractmethod
    def offer(self, leg: OpenLeg, seq_id: SeqId) -> Refusal | None:
        """Offer it to the scheduler."""

    @abstractmethod
    def new_leg(self, link: Link, leg: OpenLeg, seq_id: SeqId) -> L:
        """The book entry of an accepted leg."""

    @abstractmethod
    def cancel(self, leg: L, outcome: LegOutcome, reason: str, *, unless_handed_off: bool = False) -> None:
        """End a leg, whatever state it is in."""

    @abstractmethod
    def phase_of(self, leg: L) -> str:
        """Where a leg is, in a word for a counter's name."""

    @abstractmethod
    def perform_own(self, effect: Any, leg: L) -> None:
        """An effect that only this phase has, or its part in a TokenOut."""

    @abstractmethod
    def seq_ended(self, effect: SeqEnded, leg: L) -> None:
        """The scheduler is done with a leg's sequence; the leg may live on."""

    @abstractmethod
    def own_counters(self) -> dict[str, int]:
        """Counters of this phase."""

    # The step loop.

    async def run(self) -> None:
        """Step until stopped. Ends when all steps are over, never in one.

        The next step is scheduled and launched while up to ``pipeline_depth`` - 1 are under way; they are booked in
        their order. Where nothing can be scheduled ahead, the oldest one's end or any change wakes the loop.
        """
        under_way: deque[tuple[StepPlan, asyncio.Future[StepResult]]] = deque()
        while under_way or not self._stopping:
            if not self._stopping and len(under_way) < self._runner.pipeline_depth:
                if not (under_way and under_way[0][1].done()):
                    self._wake.clear()
                plan, effects = self.scheduler.schedule(self.clock())
                self.perform(effects)
                if plan is not None:
                    self.steps.launched(plan, self.clock())
                    step = self._runner.launch(plan)
                    if self._runner.pipeline_depth > 1:
                        step.add_done_callback(lambda _: self.wake())
                    under_way.append((plan, step))
                    continue
                await self._wake.wait()
                if not (under_way and under_way[0][1].done()):
                    continue
            try:
                await self._book(*under_way.popleft())
            except EngineLost:
                for plan, step in under_way:  # no leg of theirs may stay
                    with contextlib.suppress(EngineLost):
                        await self._book(plan, step)
                raise

    async def _book(self, plan: StepPlan, step: asyncio.Future[StepResult]) -> None:
        """Wait for a step and carry out what follows from it. Raises EngineLost after that."""
        try:
            result = await step
        except EngineLost as error:
            _log.error("a step of %d sequences is lost: %s", len(plan.seqs), one_line(error))
            self._failed()
            self.perform(self.scheduler.fail(plan, lost_line(error), self.clock(), outcome="cancelled"))
            raise
        except Exception as error:  # noqa: BLE001 -- whatever it is, it costs this step's legs alone
            _log.exception("a step of %d sequences failed", len(plan.seqs))
            self._failed()
            self.perform(self.scheduler.fail(plan, f"the engine failed: {one_line(error)}", self.clock()))
            return
        self.steps.over(self.clock())
        self._totals["steps"] += 1
        self._totals["prefill_tokens"] = self.steps.prefill_tokens
        self.perform(self.scheduler.complete(plan, result, self.clock()))

    def _failed(self) -> None:
        self.steps.over(self.clock(), failed=True)
        self._totals["failed_steps"] += 1

    def stop(self, reason: str = "the instance stops", outcome: LegOutcome = "drained") -> None:
        """End every leg, by default as an orderly move, and, after the running step, the loop."""
        self._stopping = True
        self.scheduler.draining = True
        self._end_grace()
        self._reporter.stop()
        for leg in self.legs:
            self.cancel(leg, outcome, reason)
        self.wake()

    async def legs_ended(self, within_s: float | None = None) -> None:
        """Wait until no leg is left, of those under a running transfer too, or the time is up. Sense it makes once nothing
        new is taken."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                await self.no_legs.wait()

    def wake(self) -> None:
        self._wake.set()

    def perform(self, effects: Iterable[Any]) -> None:
        """Carry effects out: what the phase does of its own, then one message of tokens per link, then the ends."""
        tokens: dict[Link, list[tuple[LegId, TokenOut]]] = {}
        ends: list[SeqEnded] = []
        for effect in effects:
            if isinstance(effect, SeqEnded):
                ends.append(effect)
                continue
            leg = self.legs.of_seq(effect.seq_id)
            if isinstance(effect, TokenOut):
                tokens.setdefault(leg.link, []).append((leg.leg_id, effect))
            self.perform_own(effect, leg)
        for link, of_link in tokens.items():
            link.tokens(of_link)
            self._totals["tokens"] += len(of_link)
        for end in ends:
            self.seq_ended(end, self.legs.of_seq(end.seq_id))
        self.announce_load()

    def end_leg(self, leg: L, outcome: LegOutcome, detail: str, stats: LegStats) -> None:
        """The leg's last word; everything it had here is free."""
        self.legs.remove(leg)
        leg.link.ended(leg.leg_id, outcome, detail, stats)
        _log.info(
            "request %s: leg %d %s%s (queue %.1f ms, prefill %.1f ms, transfer %d bytes in %.1f ms, decode %.1f ms)",
            leg.request_id,
            leg.leg_id,
            outcome,
            f": {detail}" if detail else "",
            stats.queue_ms,
            stats.prefill_ms,
            stats.transfer_bytes,
            stats.transfer_ms,
            stats.decode_ms,
        )
        if not self.legs:
            self.no_legs.set()
            if self.draining and not self._stopping:
                self.on_drained()

    # What the links say.

    def link_opened(self, link: Link) -> None:
        self._links.append(link)
        link.load(self._load())
        self._reporter.link_opened(link)

    def link_closed(self, link: Link) -> None:
        self._links.remove(link)
        self._reporter.link_closed(link)
        for leg in self.legs.of_link(link):
            self.cancel(leg, "cancelled", f"the link of {link.peer_name} broke")
        self.wake()

    def open_leg(self, link: Link, leg: OpenLeg) -> None:
        refusal = self._reason_against(link, leg)
        if refusal is None:
            seq_id = SeqId(self._next_seq)
            refusal = self.offer(leg, seq_id)
        if refusal is not None:
            self._totals["refused"] += 1
            _log.info("request %s: leg %d refused, %s: %s", leg.request_id, leg.leg_id, refusal.reason, refusal.detail)
            link.refused(leg.leg_id, refusal)
            return
        self._next_seq += 1
        self._totals["legs_opened"] += 1
        self.legs.add(self.new_leg(link, leg, seq_id))
        self.no_legs.clear()
        _log.info("request %s: leg %d of %d tokens opened", leg.request_id, leg.leg_id, len(leg.token_ids))
        self.announce_load()
        self.wake()

    def _reason_against(self, link: Link, leg: OpenLeg) -> Refusal | None:
        if self.legs.find(link, leg.leg_id) is not None:
            return Refusal(reason="invalid", detail=f"leg {leg.leg_id} is open already")
        return None

    def cancel_leg(self, link: Link, leg_id: LegId, reason: str, *, unless_handed_off: bool) -> None:
        leg = self.legs.find(link, leg_id)
        if leg is not None:
            phase = f"cancelled_{self.phase_of(leg)}"
            self._totals[phase] = self._totals.get(phase, 0) + 1
            self.cancel(leg, "cancelled", reason, unless_handed_off=unless_handed_off)
            self.wake()

    # What orders say.

    @property
    def draining(self) -> bool:
        return self.scheduler.draining

    def drain(self, grace_s: float = 0.0) -> None:
        """Take no new leg. Those that are left after ``grace_s`` end as drained; 0: they may take as long as they do. Said
        again, the newest grace counts."""
        if self._stopping:
            return
        self._end_grace()
        if grace_s > 0:
            self._grace = asyncio.get_running_loop().call_later(grace_s, self._grace_over, grace_s)
        if not self.draining:
            self.scheduler.draining = True
            self.on_drain()
            if not self.legs:
                self.on_drained()
            self.announce_load()

    def resume(self) -> None:
        """New legs are welcome again."""
        if self._stopping or not self.draining:
            return
        self._end_grace()
        self.scheduler.draining = False
        self.on_resume()
        self.announce_load()

    def _grace_over(self, grace_s: float) -> None:
        self._grace = None
        if self.legs:
            _log.warning("%d legs are left after a grace of %g s, they end as drained", len(self.legs), grace_s)
        for leg in self.legs:
            self.cancel(leg, "drained", f"the instance drains, its grace of {grace_s:g} s is over")
        self.wake()

    def _end_grace(self) -> None:
        if self._grace is not None:
            self._grace.cancel()
            self._grace = None

    # What the worker says of itself.

    def announce_load(self) -> None:
        """Tell every link the load if it has changed, once per turn of the event loop."""
        self._reporter.something_happened()
        if not self._load_due:
            self._load_due = True
            asyncio.get_running_loop().call_soon(self._announce_load)

    def _announce_load(self) -> None:
        self._load_due = False
        load = self._load()
        if load == self._last_load:
            return
        self._last_load = load
        for link in self._links:
            link.load(load)
        if not self.legs and self.clock() - self._checked_s >= CHECK_EVERY_S:
            self._checked_s = self.clock()
            self.scheduler.pool.check()

    def _load(self) -> Load:
        return replace(self.scheduler.load(), legs=len(self.legs))

    def signals(self) -> WorkerSignals:
        return self.steps.signals(self.scheduler.load(), self.scheduler.running_tokens, self.clock())

    def transports(self) -> dict[str, str]:
        """What KV comes by, and why, by pair of ranks; where none comes: nothing."""
        return {}

    def counters(self) -> dict[str, int]:
        """Live counts and totals, by name."""
        pool, load = self.scheduler.pool, self.scheduler.load()
        return {
            "blocks_used": pool.num_used,
            "blocks_free": pool.num_free,
            "blocks_total": pool.num_blocks,
            "legs": len(self.legs),
            "sequences": len(self.scheduler),
            "queued": load.queued,
            "queued_tokens": load.queued_tokens,
            "running": load.running,
            "tasks": len(asyncio.all_tasks()),
            "python_threads": threading.active_count(),
            **self._figures.counters(),
            "turned_ms": self.turned_ms,
            "superfluous_tokens": self.scheduler.superfluous_tokens,
            **self._totals,
            **self.own_counters(),
        }
