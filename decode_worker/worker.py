"""The decode instance's shell: it pulls what the scheduler has reserved blocks for, and reports how that ended."""

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from biphase.decode_worker.requests import CancelPull, DecodeEffect, DecodeRequest, StartPull
from biphase.decode_worker.scheduler import DecodeScheduler
from biphase.engine.legs import Leg
from biphase.engine.link import Link, OpenLeg
from biphase.engine.sequence import Refusal, SeqEnded
from biphase.engine.worker import StepRunner, Worker
from biphase.kvtransfer.puller import KvPuller, PullResult
from biphase.protos.errors import HandoffFailed, one_line
from biphase.protos.ids import SeqId
from biphase.protos.values import LegOutcome

_log = logging.getLogger(__name__)

LOST_SOURCE_GRACE_S = 0.1
"""How long a pull may still finish when its source is said to be dead: it may hold all pieces and only wait for the
answer to its Release."""


@dataclass(slots=True, eq=False, kw_only=True)
class DecodeLeg(Leg):
    """``pull``: the task of its running pull. ``local``: it came without a ticket."""

    local: bool
    pull: "asyncio.Task[None] | None" = None


class DecodeWorker(Worker[DecodeScheduler, DecodeLeg]):
    """Owns the pulls' tasks; a pull's blocks are freed only after its task has ended."""

    def __init__(
        self,
        scheduler: DecodeScheduler,
        runner: StepRunner,
        puller: KvPuller,
        *,
        pull_timeout_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(scheduler, runner, clock=clock)
        self._puller = puller
        self._pull_timeout_s = pull_timeout_s
        self._pulls: set[asyncio.Task[None]] = set()
        self._handoffs = 0
        self._handoff_bytes = 0
        self._handoffs_failed = 0
        self._local_prefills = 0

    def offer(self, leg: OpenLeg, seq_id: SeqId) -> Refusal | None:
        if leg.ticket is not None and leg.pull_epoch < 1:
            return Refusal(reason="invalid", detail=f"pull_epoch is {leg.pull_epoch}, it must be at least 1")
        request = DecodeRequest(
            seq_id=seq_id,
            token_ids=leg.token_ids,
            num_prompt_tokens=leg.num_prompt_tokens,
            sampling=leg.sampling,
            ticket=leg.ticket,
            pull_epoch=leg.pull_epoch,
        )
        return self.scheduler.offer(request, self.clock())

    def new_leg(self, link: Link, leg: OpenLeg, seq_id: SeqId) -> DecodeLeg:
        local = leg.ticket is None
        self._local_prefills += local
        return DecodeLeg(link=link, leg_id=leg.leg_id, request_id=leg.request_id, seq_id=seq_id, local=local)

    def cancel(self, leg: DecodeLeg, outcome: LegOutcome, reason: str, *, unless_handed_off: bool = False) -> None:
        effects = self.scheduler.cancel(
            leg.seq_id, self.clock(), outcome=outcome, detail=reason, unless_handed_off=unless_handed_off
        )
        self.perform(effects)

    def phase_of(self, leg: DecodeLeg) -> str:
        return self.scheduler.phase_of(leg.seq_id)

    def perform_own(self, effect: Any, leg: DecodeLeg) -> None:
        match effect:
            case StartPull():
                leg.pull = asyncio.create_task(self._pull(effect, leg), name=f"pull-{leg.leg_id}")
                self._pulls.add(leg.pull)
                leg.pull.add_done_callback(lambda task: self._pull_over(task, effect.seq_id, leg))
            case CancelPull():
                assert leg.pull is not None
                if effect.source_lost:
                    asyncio.get_running_loop().call_later(LOST_SOURCE_GRACE_S, leg.pull.cancel)
                else:
                    leg.pull.cancel()

    async def _pull(self, start: StartPull, leg: DecodeLeg) -> None:
        """One pull from its start to its report. Whatever happens in it, the scheduler hears how it ended."""
        effects: list[DecodeEffect]
        try:
            result = await self._puller.pull(start.ticket, start.epoch, start.blocks, timeout_s=self._pull_timeout_s)
        except HandoffFailed as error:
            effects = self._pull_failed(start.seq_id, one_line(error))
        except asyncio.CancelledError:
            effects = self.scheduler.pull_failed(start.seq_id, "the pull was cancelled", self.clock())
        except Exception as error:  # noqa: BLE001 -- the scheduler must hear of it
            _log.exception("request %s: the pull of leg %d broke", leg.request_id, leg.leg_id)
            effects = self._pull_failed(start.seq_id, f"the pull broke: {one_line(error)}")
        else:
            effects = self._pull_done(start.seq_id, leg, result)
        leg.pull = None
        self.perform(effects)
        self.wake()

    def _pull_over(self, task: "asyncio.Task[None]", seq_id: SeqId, leg: DecodeLeg) -> None:
        """Forget the task. One that was cancelled before its first step has run nothing of _pull: report for it."""
        self._pulls.discard(task)
        if leg.pull is task:
            leg.pull = None
            self.perform(self.scheduler.pull_failed(seq_id, "the pull was cancelled", self.clock()))
            self.wake()

    def _pull_failed(self, seq_id: SeqId, detail: str) -> list[DecodeEffect]:
        self._handoffs_failed += 1
        return self.scheduler.pull_failed(seq_id, detail, self.clock())

    def _pull_done(self, seq_id: SeqId, leg: DecodeLeg, result: PullResult) -> list[DecodeEffect]:
        self._handoffs += 1
        self._handoff_bytes += result.bytes
        effects = self.scheduler.handed_off(
            seq_id,
            result.first_token,
            self.clock(),
            num_bytes=result.bytes,
            transfer_ms=result.ms,
            exposed_ms=result.exposed_ms,
        )
        if not any(isinstance(effect, SeqEnded) and effect.outcome != "done" for effect in effects):
            leg.link.handed_off(
                leg.leg_id,
                num_bytes=result.bytes,
                ms=result.ms,
                exposed_ms=result.exposed_ms,
                first_token=result.first_token,
            )
        return effects

    def seq_ended(self, effect: SeqEnded, leg: DecodeLeg) -> None:
        self.end_leg(leg, effect.outcome, effect.detail, effect.stats)

    async def close(self) -> None:
        """After the last leg's end was asked for: wait until no pull writes any more."""
        for pull in self._pulls:
            pull.cancel()
        if self._pulls:
            await asyncio.wait(self._pulls)

    def transports(self) -> dict[str, str]:
        return self._puller.transports

    def own_counters(self) -> dict[str, int]:
        scheduler = self.scheduler
        return {
            "waiting": scheduler.num_waiting,
            "pulling": scheduler.num_pulling,
            "decoding": scheduler.num_running,
            "preemptions": scheduler.preemptions,
            "preemptions_handed_off": scheduler.preemptions_handed_off,
            "handoffs": self._handoffs,
            "handoff_bytes": self._handoff_bytes,
            "handoffs_failed": self._handoffs_failed,
            "local_prefills": self._local_prefills,
            **self._puller.counters(),
        }
