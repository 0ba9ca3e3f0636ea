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

from biphase.kvtransfer.export import Export
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
    ended_refusal,
    short,
)
from biphase.protos.ids import BlockId, TicketId

__all__ = ["ExportEnded", "ExportRefused", "ExportTable", "Outcome", "Pull", "Readable", "Refusal", "short"]

_REMEMBERED = 4096
"""Ended tickets whose end is remembered, so that a late reader is told what became of it."""


class ExportTable:
    """All live tickets of one prefill rank. Holds each ticket's blocks once, from open to the last running send."""

    def __init__(self, pool: BlockHolder, lease_s: float, followers: Followers | None = None) -> None:
        if not lease_s > 0:
            raise ValueError(f"lease_s is {lease_s}, it must be above 0")
        self._pool = pool
        self._lease_s = lease_s
        self._followers = followers or NoFollowers()
        self._exports: dict[TicketId, Export] = {}
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
        self._exports[ticket] = Export(ticket=ticket, blocks=tuple(blocks), num_tokens=num_tokens)
        self._followers.opened(ticket, seq_id, blocks, num_tokens)
        self._changed(ticket)

    def advance(self, ticket: TicketId, computed_tokens: int) -> None:
        """Positions below ``computed_tokens`` may be read. Never goes back; a ticket that has ended is left alone."""
        export = self._live(ticket)
        if export is None:
            return
        export.computed(computed_tokens)
        self._changed(ticket)

    def advance_layers(self, ticket: TicketId, tokens: int, layers: int) -> None:
        """Positions below ``tokens`` may be read in the first ``layers`` layers of this rank.

        Those of one chunk come in rising ``layers``; a chunk begins when the one before is computed in all of them.
        """
        export = self._live(ticket)
        if export is None or tokens <= export.computed_tokens:
            return
        export.computed_ahead(tokens, layers)
        self._changed(ticket)

    def finish(self, ticket: TicketId, first_token: int, now_s: float) -> None:
        """Everything is computed and token 0 sampled."""
        export = self._live(ticket)
        if export is None:
            return
        export.finish(first_token, now_s)
        self._followers.finished(ticket)
        self._changed(ticket)

    def leg_closed(self, ticket: TicketId, now_s: float) -> None:
        """The router's leg is gone; from now on the lease counts while no pull is open."""
        export = self._live(ticket)
        if export is None:
            return
        export.leg_open = False
        export.judge_lease(now_s, self._lease_s)
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
        ends = [e.lease_end_s for e in self._exports.values() if e.live and e.lease_end_s < math.inf]
        return min(ends, default=None)

    def expire(self, now_s: float) -> list[TicketId]:
        """End the tickets whose lease is over, and name them."""
        over = [t for t, e in self._exports.items() if e.live and e.lease_end_s <= now_s]
        for ticket in over:
            self._end(ticket, "expired", now_s)
        return over

    # What the server says.

    def watch(self, watcher: Callable[[TicketId], None]) -> None:
        """Have ``watcher`` called with the ticket after each change of one; it must only schedule work."""
        self._watcher = watcher

    def check_pull(self, ticket: TicketId, epoch: int, now_s: float) -> None:
        """Whether a reader may be opened; changes nothing of the ticket. Raises ExportRefused."""
        self.expire(now_s)
        self._readable(ticket, epoch)

    def begin_pull(self, ticket: TicketId, epoch: int, now_s: float) -> Pull:
        """Open a reader. A newer epoch ends the pulls of older ones. Raises ExportRefused."""
        self.check_pull(ticket, epoch, now_s)
        export = self._readable(ticket, epoch)
        self._begin_epoch(export, epoch, now_s)
        pull = Pull(ticket=ticket, epoch=epoch, blocks=export.blocks, num_tokens=export.num_tokens)
        export.pulls.add(pull)
        export.stop_lease()
        self._changed(ticket)
        return pull

    def end_pull(self, pull: Pull, now_s: float) -> None:
        """The reader is gone, for whatever reason. Idempotent."""
        export = self._exports.get(pull.ticket)
        if export is not None and pull in export.pulls:
            export.pulls.discard(pull)
            export.judge_lease(now_s, self._lease_s)
            self._changed(pull.ticket)

    def readable(self, pull: Pull) -> Readable:
        """What may be read now. Raises ExportRefused when the pull must end."""
        return self._readable(pull.ticket, pull.epoch).readable

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
        if not export.live:
            self._settle(export)

    def release(self, ticket: TicketId, epoch: int, now_s: float, num_bytes: int = 0) -> None:
        """The reader holds everything, which came in ``num_bytes`` of payload; 0: it does not say. Answered again the same way when asked again. Raises ExportRefused."""
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
        export.arrived_bytes = num_bytes
        self._end(ticket, "released", now_s)

    # What the other ranks say.

    def supersede(self, ticket: TicketId, epoch: int, now_s: float) -> None:
        """A reader of ``epoch`` has come to another rank: those of older ones are ended here too."""
        export = self._live(ticket)
        if export is not None and epoch > export.epoch:
            self._begin_epoch(export, epoch, now_s)
            self._changed(ticket)

    def follower_reading(self, ticket: TicketId, rank: int, num_open: int, epoch: int, now_s: float) -> None:
        """So many pulls are open at ``rank``, the newest of ``epoch``. The lease does not count while there is one."""
        export = self._live(ticket)
        if export is None:
            return
        export.reading[rank] = num_open
        if num_open:
            export.stop_lease()
        else:
            export.judge_lease(now_s, self._lease_s)
        self.supersede(ticket, epoch, now_s)
        self._changed(ticket)

    def follower_ended(self, ticket: TicketId, rank: int, num_bytes: int) -> None:
        """The last send of an ended ticket has really ended at ``rank``, which sent so much in its last epoch."""
        export = self._exports.get(ticket)
        if export is None or rank not in export.sending:
            return
        export.sending.discard(rank)
        export.epoch_bytes += num_bytes
        self._settle(export)

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

    def _live(self, ticket: TicketId) -> Export | None:
        export = self._exports.get(ticket)
        return export if export is not None and export.live else None

    def _readable(self, ticket: TicketId, epoch: int) -> Export:
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
        return ended_refusal(ticket, outcome)

    def _begin_epoch(self, export: Export, epoch: int, now_s: float) -> None:
        if epoch > export.epoch:
            export.begin_epoch(epoch, now_s)
            self._followers.superseded(export.ticket, epoch)

    def _end(self, ticket: TicketId, outcome: Outcome, now_s: float) -> None:
        export = self._exports[ticket]
        export.outcome = outcome
        export.ended_s = now_s
        export.sending = set(self._followers.ranks)
        self._followers.ended(ticket, outcome)
        self._settle(export)

    def _settle(self, export: Export) -> None:
        """Give an ended ticket's blocks back as soon as nothing reads them."""
        assert export.outcome is not None
        ticket = export.ticket
        if export.settled:
            del self._exports[ticket]
            self._pool.release(export.blocks)
            self._totals[export.outcome] += 1
            self._past[ticket] = (export.outcome, export.epoch)
            while len(self._past) > _REMEMBERED:
                self._past.popitem(last=False)
            self._ended.append(export.report())
        self._changed(ticket)

    def _changed(self, ticket: TicketId) -> None:
        if self._watcher is not None:
            self._watcher(ticket)
