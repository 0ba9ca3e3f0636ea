"""The tickets of a prefill instance on all its ranks: rank 0 decides, the others serve what it opens and say who reads.

    rank 0      kv.open    {ticket, seq_id, blocks, num_tokens}
                kv.finish  {ticket}                   everything is computed
                kv.epoch   {ticket, epoch}            readers of older epochs are to be ended
                kv.end     {ticket, outcome}
    the others  kv.reading {ticket, open, epoch}      after a reader has come or gone
                kv.ended   {ticket, bytes}            the last send of an ended ticket has really ended

Lives in the worker's loop, like the tables.
"""

import math
import time
from collections.abc import Callable, Sequence

from biphase.kvtransfer.exports import ExportEnded, ExportTable, Outcome
from biphase.kvtransfer.ranks import FollowerLink, LeaderLink, Message
from biphase.protos.ids import BlockId, TicketId


class LeaderExports:
    """The other ranks as rank 0's table sees them (exports.Followers). ``attach`` it to that table."""

    def __init__(self, link: LeaderLink, clock: Callable[[], float] = time.monotonic) -> None:
        self._link = link
        self._clock = clock

    @property
    def ranks(self) -> Sequence[int]:
        return self._link.followers

    def attach(self, table: ExportTable) -> None:
        """Pass on what the other ranks say."""

        def reading(rank: int, message: Message) -> None:
            ticket = TicketId(message["ticket"])
            table.follower_reading(ticket, rank, message["open"], message["epoch"], self._clock())

        def ended(rank: int, message: Message) -> None:
            table.follower_ended(TicketId(message["ticket"]), rank, message["bytes"])

        self._link.subscribe("kv.reading", reading)
        self._link.subscribe("kv.ended", ended)

    def detach(self) -> None:
        self._link.unsubscribe("kv.reading")
        self._link.unsubscribe("kv.ended")

    def opened(self, ticket: TicketId, seq_id: int, blocks: Sequence[BlockId], num_tokens: int) -> None:
        message = {"ticket": ticket, "seq_id": seq_id, "blocks": list(blocks), "num_tokens": num_tokens}
        self._link.broadcast({"kind": "kv.open", **message})

    def finished(self, ticket: TicketId) -> None:
        self._link.broadcast({"kind": "kv.finish", "ticket": ticket})

    def superseded(self, ticket: TicketId, epoch: int) -> None:
        self._link.broadcast({"kind": "kv.epoch", "ticket": ticket, "epoch": epoch})

    def ended(self, ticket: TicketId, outcome: Outcome) -> None:
        self._link.broadcast({"kind": "kv.end", "ticket": ticket, "outcome": outcome})


class _BlocksOfRank0:
    """Rank 0 holds the blocks of all ranks, whose ids are common, until this rank has said that its sends are over."""

    def hold(self, blocks: Sequence[BlockId]) -> None:
        pass

    def release(self, blocks: Sequence[BlockId]) -> None:
        pass


class FollowerExports:
    """The table of a rank that is not rank 0, which opens and ends its tickets."""

    def __init__(self, link: FollowerLink, clock: Callable[[], float] = time.monotonic) -> None:
        self.table = ExportTable(_BlocksOfRank0(), lease_s=math.inf)
        self._link = link
        self._clock = clock
        self._by_seq: dict[int, tuple[TicketId, int]] = {}
        self._seqs: dict[TicketId, int] = {}

    def follow(self) -> None:
        """Begin to do what rank 0 says. After the table is watched."""
        self._link.subscribe("kv.open", self._open)
        self._link.subscribe("kv.finish", self._finish)
        self._link.subscribe("kv.epoch", self._epoch)
        self._link.subscribe("kv.end", self._end)

    def leave(self) -> None:
        """Rank 0 has no ticket left, and opens none any more."""
        for kind in ("kv.open", "kv.finish", "kv.epoch", "kv.end"):
            self._link.unsubscribe(kind)

    def layers_computed(self, seq_id: int, tokens: int, layers: int, of_layers: int) -> None:
        """Positions below ``tokens`` of a sequence are computed in so many of this rank's layers."""
        ticket, _ = self._by_seq.get(seq_id, (None, 0))
        if ticket is not None and layers < of_layers:
            self.table.advance_layers(ticket, tokens, layers)
        elif ticket is not None:
            self.table.advance(ticket, tokens)

    def on_readers(self, ticket: TicketId, num_open: int, epoch: int) -> None:
        """See KvService."""
        self._link.send({"kind": "kv.reading", "ticket": ticket, "open": num_open, "epoch": epoch})

    def on_ended(self, ended: ExportEnded) -> None:
        """See KvService."""
        self._link.send({"kind": "kv.ended", "ticket": ended.ticket, "bytes": ended.bytes})

    def _open(self, message: Message) -> None:
        ticket = TicketId(message["ticket"])
        self.table.open(ticket, message["blocks"], message["num_tokens"], self._clock())
        self._by_seq[message["seq_id"]] = (ticket, message["num_tokens"])
        self._seqs[ticket] = message["seq_id"]

    def _finish(self, message: Message) -> None:
        ticket = TicketId(message["ticket"])
        if ticket in self._seqs:
            self.table.advance(ticket, self._by_seq[self._seqs[ticket]][1])

    def _epoch(self, message: Message) -> None:
        self.table.supersede(TicketId(message["ticket"]), message["epoch"], self._clock())

    def _end(self, message: Message) -> None:
        ticket = TicketId(message["ticket"])
        seq_id = self._seqs.pop(ticket, None)
        if seq_id is not None:
            del self._by_seq[seq_id]
        self.table.end(ticket, message["outcome"], self._clock())
