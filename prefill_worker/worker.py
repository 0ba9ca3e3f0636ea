"""The prefill instance's shell: a ticket for each prompt that goes on elsewhere, and legs that live until it ends."""

import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from biphase.engine.legs import Leg
from biphase.engine.link import Link, OpenLeg
from biphase.engine.sequence import Refusal, SeqEnded, TokenOut
from biphase.engine.step import StepPlan
from biphase.engine.worker import StepRunner, Worker
from biphase.kvtransfer.exports import ExportEnded, ExportTable
from biphase.prefill_worker.scheduler import ChunkComputed, PrefillRequest, PrefillScheduler, PrefillStarted
from biphase.protos.ids import Incarnation, InstanceName, SeqId, TicketId
from biphase.protos.values import KvTicket, LegOutcome

TICKET_BYTES = 16


@dataclass(slots=True, eq=False, kw_only=True)
class PrefillLeg(Leg):
    """``seq_end``: the scheduler's last word. ``ending``: why we cut it short, if we did."""

    ticket: TicketId | None = None
    export_end: ExportEnded | None = None
    seq_end: SeqEnded | None = None
    ending: tuple[LegOutcome, str] | None = None


class PrefillWorker(Worker[PrefillScheduler, PrefillLeg]):
    """Owns the export table's tickets. ``kv_address`` is set once the KV endpoint listens."""

    def __init__(
        self,
        scheduler: PrefillScheduler,
        runner: StepRunner,
        exports: ExportTable,
        *,
        name: str,
        incarnation: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(scheduler, runner, clock=clock)
        self.kv_address = ""
        self.transfer_counters: Callable[[], dict[str, int]] = exports.counters
        self._exports = exports
        self._name = InstanceName(name)
        self._incarnation = Incarnation(incarnation)
        self._by_ticket: dict[TicketId, PrefillLeg] = {}
        self._handoffs = 0
        self._handoff_bytes = 0

    def offer(self, leg: OpenLeg, seq_id: SeqId) -> Refusal | None:
        request = PrefillRequest(
            seq_id=seq_id,
            token_ids=leg.token_ids,
            num_prompt_tokens=leg.num_prompt_tokens,
            sampling=leg.sampling,
            refusals=leg.refusals,
        )
        return self.scheduler.offer(request, self.clock())

    def new_leg(self, link: Link, leg: OpenLeg, seq_id: SeqId) -> PrefillLeg:
        return PrefillLeg(link=link, leg_id=leg.leg_id, request_id=leg.request_id, seq_id=seq_id)

    def cancel(self, leg: PrefillLeg, outcome: LegOutcome, reason: str, *, unless_handed_off: bool = False) -> None:
        """Revoke the ticket and stop computing; the leg ends when both have really ended."""
        if leg.ending is None:
            leg.ending = (outcome, reason)
            if leg.ticket is not None:
                self._exports.revoke(leg.ticket, self.clock())
            self.perform(self.scheduler.cancel(leg.seq_id, self.clock()))

    def phase_of(self, leg: PrefillLeg) -> str:
        return "exported" if leg.seq_end is not None else self.scheduler.phase_of(leg.seq_id)

    def perform_own(self, effect: Any, leg: PrefillLeg) -> None:
        match effect:
            case PrefillStarted():
                self._start(effect, leg)
            case ChunkComputed():
                if leg.ticket is not None:
                    self._exports.advance(leg.ticket, effect.computed_tokens)
            case TokenOut():
                if leg.ticket is not None and effect.finish is None:
                    self._exports.finish(leg.ticket, effect.token_id, self.clock())
                elif leg.ticket is not None:
                    self._exports.revoke(leg.ticket, self.clock())

    def layers_computed(self, plan: StepPlan, layers: int) -> None:
        """So many of rank 0's layers are computed for all tokens of a step that runs, or has run since."""
        for seq in plan.seqs:
            leg = self.legs.find_seq(seq.seq_id)
            if leg is not None and leg.ticket is not None:
                self._exports.advance_layers(leg.ticket, seq.start + len(seq.token_ids), layers)

    def _start(self, effect: PrefillStarted, leg: PrefillLeg) -> None:
        ticket = None
        if effect.handoff:
            leg.ticket = TicketId(secrets.token_bytes(TICKET_BYTES))
            self._by_ticket[leg.ticket] = leg
            self._exports.open(leg.ticket, effect.blocks, effect.num_tokens, self.clock(), effect.seq_id)
            ticket = KvTicket(
                id=leg.ticket,
                kv_address=self.kv_address,
                instance=self._name,
                incarnation=self._incarnation,
                num_tokens=effect.num_tokens,
            )
        leg.link.started(leg.leg_id, ticket, effect.queue_ms)

    def seq_ended(self, effect: SeqEnded, leg: PrefillLeg) -> None:
        leg.seq_end = effect
        if effect.outcome != "done" and leg.ticket is not None:
            self._exports.revoke(leg.ticket, self.clock())
        self._settle(leg)

    def export_ended(self, ended: ExportEnded) -> None:
        """A ticket is over and its blocks are back. Called in the loop by the KV endpoint."""
        leg = self._by_ticket.pop(ended.ticket)
        leg.export_end = ended
        if ended.outcome == "released":
            self._handoffs += 1
            self._handoff_bytes += ended.bytes
        self._settle(leg)
        self.announce_load()
        self.wake()

    def _settle(self, leg: PrefillLeg) -> None:
        """End the leg once neither scheduler nor ticket has anything of it."""
        end, export = leg.seq_end, leg.export_end
        if end is None or (leg.ticket is not None and export is None):
            return
        stats = end.stats
        if export is not None:
            stats = replace(stats, transfer_ms=export.ms, transfer_bytes=export.bytes)
        if export is not None and export.outcome == "released":
            self.end_leg(leg, "done", "", stats)
        elif export is not None and export.outcome == "expired":
            self.end_leg(leg, "lease_expired", "nobody pulled the KV within its lease", stats)
        else:
            self.end_leg(leg, *(leg.ending or (end.outcome, end.detail)), stats)

    def own_counters(self) -> dict[str, int]:
        return {"handoffs": self._handoffs, "handoff_bytes": self._handoff_bytes, **self.transfer_counters()}
