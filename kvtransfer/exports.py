"""The prefill side's tickets: what is computed, who reads, when blocks may be freed.

Pure: no clock, no gRPC, no torch, no threads. Owned by the worker's loop; time comes in as ``now_s``, seconds on any
clock that only goes forward.

    open ──► pulled by epoch e ──► released      by the reader's Release of the newest epoch
                                   revoked       by the worker
                                   expired       leg closed, no pull open, lease_s gone by

An ended ticket serves no further read. Its blocks go back to the pool when the last running send of it has ended, on
every rank: each has a table of its own, that of rank 0 alone holds blocks, counts leases and decides. What it decides it
tells the others (Followers), and they tell it who reads there and when their sends have ended.
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from biphase.kvtransfer.tickets import (
    BlockHolder,
    ExportEnded,
    ExportRefused,
    Followers,
    NoFollowers,
    Outcome,
    Pull,
    Readable,
    Refusal,
    short,
)
from biphase.protos.ids import BlockId, TicketId

__all__ = ["ExportEnded", "ExportRefused", "ExportTable", "Outcome", "Pull", "Readable", "Refusal", "short"]

_REMEMBERED = 4096
"""Ended tickets whose end is remembered, so that a late reader is told what became of it."""


@dataclass(slots=True, kw_only=True)
class _Export:
    blocks: tuple[BlockId, ...]
    num_tokens: int
    computed_tokens: int = 0
    ahead_tokens: int = 0
    ahead_layers: int = 0
    first_token: int | None = None
    finished_s: float = 0.0
    leg_open: bool = True
    lease_end_s: float = math.inf
    epoch: int = 0
    epoch_began_s: float | None = None
    epoch_bytes: int = 0
    pulls: set[Pull] = field(default_factory=set)
    running_sends: int = 0
    reading: dict[int, int] = field(default_factory=dict)
    sending: set[int] = field(default_factory=set)
    outcome: Outcome | None = None
    ended_s: float = 0.0


_ENDS: dict[Outcome, tuple[Refusal, str]] = {
    "released": (Refusal.RELEASED, "was released: its KV has been handed over"),
    "revoked": (Refusal.REVOKED, "was revoked"),
    "expired": (Refusal.LEASE_EXPIRED, "outlived its lease"),
}


class ExportTable:
    """All live tickets of one prefill rank. Holds each ticket's blocks once, from open to the last running send."""

    def __init__(self, pool: BlockHolder, lease_s: float, followers: Followers | None = None) -> None:
        if not lease_s > 0:
            raise ValueError(f"lease_s is {lease_s}, it must be above 0")
        self._pool = pool
        self._lease_s = lease_s
        self._followers = followers or NoFollowers()
        self._exports: dict[TicketId, _Export] = {}
        self._past: OrderedDict[TicketId, tuple[Outcome, int]] = OrderedDict()
        self._ended: list[ExportEnded] = []
        self._watcher: Callable[[TicketId], None] | None = None
        self._totals = {"released": 0, "revoked": 0, "expired": 0}

    # What the worker says.

    def open(self, ticket: TicketId, blocks: Sequence[BlockId], num_tokens: int, now_s: float, seq_id: int = 0) -> None:
        """A new ticket over ``num_tokens`` tokens in ``blocks``, its leg open. Takes a hold of its own on the blocks.

        ``seq_id``: by which the other ranks know the sequence in step plans.
        """
        if ticket in self._exports or ticket in self._past:
            raise ValueError(f"ticket {short(ticket)} is already open or has ended")
        if num_tokens < 1:
            raise ValueError(f"num_tokens is {num_tokens}, it must be at least 1")
        self._pool.hold(blocks)
        self._exports[ticket] = _Export(blocks=tuple(blocks), num_tokens=num_tokens)
        self._followers.opened(ticket, seq_id, blocks, num_tokens)
        self._changed(ticket)

    def advance(self, ticket: TicketId, computed_tokens: int) -> None:
        """Positions below ``computed_tokens`` may be read. Never goes back; a ticket that has ended is left alone."""
        export = self._live(ticket)
        if export is None:
            return
        if computed_tokens > export.num_tokens:
            raise ValueError(f"{computed_tokens} tokens computed of ticket {short(ticket)} over {export.num_tokens}")
        export.computed_tokens = max(export.computed_tokens, computed_tokens)
        self._changed(ticket)

    def advance_layers(self, ticket: TicketId, tokens: int, layers: int) -> None:
        """Positions below ``tokens`` may be read in the first ``layers`` layers of this rank.

        Those of one chunk come in rising ``layers``; a chunk begins when the one before is computed in all of them.
        """
        export = self._live(ticket)
        if export is None or tokens <= export.computed_tokens:
            return
        if tokens > export.num_tokens:
            raise ValueError(f"{tokens} tokens computed of ticket {short(ticket)} over {export.num_tokens}")
        if tokens != export.ahead_tokens:
            export.ahead_tokens, export.ahead_layers = tokens, 0
        export.ahead_layers = max(export.ahead_layers, layers)
        self._changed(ticket)

    def finish(self, ticket: TicketId, first_token: int, now_s: float) -> None:
        """Everything is computed and token 0 sampled."""
        export = self._live(ticket)
        if export is None:
            return
        export.computed_tokens = export.num_tokens
        export.first_token = first_token
        export.finished_s = now_s
        self._followers.finished(ticket)
        self._changed(ticket)

    def leg_closed(self, ticket: TicketId, now_s: float) -> None:
        """The router's leg is gone; from now on the lease counts while no pull is open."""
        export = self._live(ticket)
        if export is None:
            return
        export.leg_open = False
        self._judge_lease(export, now_s)
        self._changed(ticket)

    def revoke(self, ticket: TicketId, now_s: float) -> None:
        """No new reads; the blocks go back once running sends have ended. Idempotent."""
        if self._live(ticket) is not None:
            self._end(ticket, "revoked", now_s)

    def end(self, ticket: TicketId, outcome: Outcome, now_s: float) -> None:
        """On a rank that is not rank 0: what that has decided. Idempotent."""
        if self._live(ticket) is not None:
            self._end(ticket, outcome, now_s)

    def next_expiry_s(self) -> float | None:
        """When the next lease ends, None where none counts."""
        ends = [e.lease_end_s for e in self._exports.values() if e.outcome is None and e.lease_end_s < math.inf]
        return min(ends, default=None)

    def expire(self, now_s: float) -> list[TicketId]:
        """End the tickets whose lease is over, and name them."""
        over = [t for t, e in self._exports.items() if e.outcome is None and e.lease_end_s <= now_s]
        for ticket in over:
            self._end(ticket, "expired", now_s)
        return over

    # What the server says.

    def watch(self, watcher: Callable[[TicketId], None]) -> None:
        """Have ``watcher`` called with the ticket after each change of one; it must only schedule work."""
        self._watcher = watcher

    def begin_pull(self, ticket: TicketId, epoch: int, now_s: float) -> Pull:
        """Open a reader. A newer epoch ends the pulls of older ones. Raises ExportRefused."""
        self.expire(now_s)
        export = self._readable(ticket, epoch)
        self._begin_epoch(ticket, export, epoch, now_s)
        pull = Pull(ticket=ticket, epoch=epoch, blocks=export.blocks, num_tokens=export.num_tokens)
        export.pulls.add(pull)
        export.lease_end_s = math.inf
        self._changed(ticket)
        return pull

    def end_pull(self, pull: Pull, now_s: float) -> None:
        """The reader is gone, for whatever reason. Idempotent."""
        export = self._exports.get(pull.ticket)
        if export is not None and pull in export.pulls:
            export.pulls.discard(pull)
            self._judge_lease(export, now_s)
            self._changed(pull.ticket)

    def readable(self, pull: Pull) -> Readable:
        """What may be read now. Raises ExportRefused when the pull must end."""
        export = self._readable(pull.ticket, pull.epoch)
        ahead_layers = export.ahead_layers if export.ahead_tokens > export.computed_tokens else 0
        return Readable(
            tokens=export.computed_tokens,
            ahead_tokens=export.ahead_tokens if ahead_layers else export.computed_tokens,
            ahead_layers=ahead_layers,
        )

    def readable_tokens(self, pull: Pull) -> int:
        """Positions below this may be read now, in all layers. Raises ExportRefused when the pull must end."""
        return self._readable(pull.ticket, pull.epoch).computed_tokens

    def first_token(self, pull: Pull) -> tuple[int, float] | None:
        """Token 0 and when it was sampled, None while it is not. Raises ExportRefused when the pull must end."""
        export = self._readable(pull.ticket, pull.epoch)
        return None if export.first_token is None else (export.first_token, export.finished_s)

    def begin_send(self, pull: Pull) -> None:
        """A copy out of the blocks begins; they stay held until end_send. Raises ExportRefused."""
        self._readable(pull.ticket, pull.epoch).running_sends += 1

    def end_send(self, pull: Pull, num_bytes: int) -> None:
        """That copy has really ended. ``num_bytes`` is 0 where it came to nothing."""
        export = self._exports[pull.ticket]
        export.running_sends -= 1
        if pull.epoch == export.epoch:
            export.epoch_bytes += num_bytes
        if export.outcome is not None:
            self._settle(pull.ticket, export)

    def release(self, ticket: TicketId, epoch: int, now_s: float) -> None:
        """The reader holds everything. Answered again the same way when asked again. Raises ExportRefused."""
        if self._past.get(ticket) == ("released", epoch):
            return
        ending = self._exports.get(ticket)  # released already, while a copy out of its blocks still runs
        if ending is not None and (ending.outcome, ending.epoch) == ("released", epoch):
            return
        self.expire(now_s)
        export = self._readable(ticket, epoch)
        if epoch != export.epoch or export.first_token is None:
            raise ExportRefused(
                Refusal.STALE_EPOCH, f"epoch {epoch} of ticket {short(ticket)} has not been pulled to its end"
            )
        self._end(ticket, "released", now_s)

    # What the other ranks say.

    def supersede(self, ticket: TicketId, epoch: int, now_s: float) -> None:
        """A reader of ``epoch`` has come to another rank: those of older ones are ended here too."""
        export = self._live(ticket)
        if export is not None and epoch > export.epoch:
            self._begin_epoch(ticket, export, epoch, now_s)
            self._changed(ticket)

    def follower_reading(self, ticket: TicketId, rank: int, num_open: int, epoch: int, now_s: float) -> None:
        """So many pulls are open at ``rank``, the newest of ``epoch``. The lease does not count while there is one."""
        export = self._live(ticket)
        if export is None:
            return
        export.reading[rank] = num_open
        if num_open:
            export.lease_end_s = math.inf
        else:
            self._judge_lease(export, now_s)
        self.supersede(ticket, epoch, now_s)
        self._changed(ticket)

    def follower_ended(self, ticket: TicketId, rank: int, num_bytes: int) -> None:
        """The last send of an ended ticket has really ended at ``rank``, which sent so much in its last epoch."""
        export = self._exports.get(ticket)
        if export is None or rank not in export.sending:
            return
        export.sending.discard(rank)
        export.epoch_bytes += num_bytes
        self._settle(ticket, export)

    def take_ended(self) -> list[ExportEnded]:
        """Tickets that ended, with their blocks back, since the last call."""
        ended, self._ended = self._ended, []
        return ended

    # What others may look at.

    def counters(self) -> dict[str, int]:
        exports = self._exports.values()
        return {
            "tickets": len(self._exports),
            "open_pulls": sum(len(export.pulls) for export in exports),
            "running_sends": sum(export.running_sends + len(export.sending) for export in exports),
            "leases_expired": self._totals["expired"],
            "released": self._totals["released"],
            "revoked": self._totals["revoked"],
        }

    def __repr__(self) -> str:
        now = self.counters()
        return (
            f"<ExportTable [{now['tickets']} tickets, {now['open_pulls']} pulls, {now['running_sends']} running sends]>"
        )

    # Inside.

    def _live(self, ticket: TicketId) -> _Export | None:
        export = self._exports.get(ticket)
        return export if export is not None and export.outcome is None else None

    def _readable(self, ticket: TicketId, epoch: int) -> _Export:
        export = self._live(ticket)
        if export is None:
            raise self._refused(ticket)
        if epoch < 1 or epoch < export.epoch:
            raise ExportRefused(
                Refusal.STALE_EPOCH, f"epoch {epoch} of ticket {short(ticket)} has given way to epoch {export.epoch}"
            )
        return export

    def _refused(self, ticket: TicketId) -> ExportRefused:
        export = self._exports.get(ticket)
        outcome = export.outcome if export is not None else self._past.get(ticket, (None, 0))[0]
        if outcome is None:
            return ExportRefused(Refusal.UNKNOWN, f"no ticket {short(ticket)} was ever open here, or long ago")
        refusal, text = _ENDS[outcome]
        return ExportRefused(refusal, f"ticket {short(ticket)} {text}")

    def _begin_epoch(self, ticket: TicketId, export: _Export, epoch: int, now_s: float) -> None:
        if epoch > export.epoch:
            export.epoch = epoch
            export.epoch_began_s = now_s
            export.epoch_bytes = 0
            self._followers.superseded(ticket, epoch)

    def _judge_lease(self, export: _Export, now_s: float) -> None:
        read = bool(export.pulls) or any(export.reading.values())
        if not export.leg_open and not read and export.lease_end_s == math.inf:
            export.lease_end_s = now_s + self._lease_s

    def _end(self, ticket: TicketId, outcome: Outcome, now_s: float) -> None:
        export = self._exports[ticket]
        export.outcome = outcome
        export.ended_s = now_s
        export.sending = set(self._followers.ranks)
        self._followers.ended(ticket, outcome)
        self._settle(ticket, export)

    def _settle(self, ticket: TicketId, export: _Export) -> None:
        """Give an ended ticket's blocks back as soon as nothing reads them."""
        assert export.outcome is not None
        if export.running_sends == 0 and not export.sending:
            del self._exports[ticket]
            self._pool.release(export.blocks)
            self._totals[export.outcome] += 1
            self._past[ticket] = (export.outcome, export.epoch)
            while len(self._past) > _REMEMBERED:
                self._past.popitem(last=False)
            began_s = export.ended_s if export.epoch_began_s is None else export.epoch_began_s
            self._ended.append(
                ExportEnded(
                    ticket=ticket,
                    outcome=export.outcome,
                    bytes=export.epoch_bytes,
                    ms=(export.ended_s - began_s) * 1000.0,
                )
            )
        self._changed(ticket)

    def _changed(self, ticket: TicketId) -> None:
        if self._watcher is not None:
            self._watcher(ticket)
