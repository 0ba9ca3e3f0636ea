"""The export table: blocks are held exactly while needed, leases count only when nobody holds the ticket."""

from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, precondition, rule

from biphase.kvtransfer.exports import ExportEnded, ExportRefused, ExportTable, Pull, Readable, Refusal
from biphase.protos.ids import BlockId, TicketId

LEASE_S = 10.0


class CountingPool:
    """References per block, as a block pool counts them."""

    def __init__(self) -> None:
        self.references: Counter[BlockId] = Counter()

    def hold(self, blocks: Sequence[BlockId]) -> None:
        self.references.update(blocks)

    def release(self, blocks: Sequence[BlockId]) -> None:
        self.references.subtract(blocks)
        assert min(self.references.values()) >= 0
        self.references = +self.references


def make_table() -> tuple[ExportTable, CountingPool]:
    pool = CountingPool()
    return ExportTable(pool, LEASE_S), pool


def make_ticket(number: int = 1) -> TicketId:
    return TicketId(number.to_bytes(16, "big"))


def refusal_of(call: object, *arguments: object) -> Refusal:
    with pytest.raises(ExportRefused) as caught:
        call(*arguments)  # type: ignore[operator]
    assert str(caught.value).startswith(caught.value.refusal.value)
    return caught.value.refusal


def test_a_ticket_from_open_to_release() -> None:
    table, pool = make_table()
    ticket = make_ticket()
    table.open(ticket, [BlockId(4), BlockId(2)], 40, now_s=0.0)
    pull = table.begin_pull(ticket, 1, now_s=1.0)
    assert table.readable_tokens(pull) == 0
    table.advance(ticket, 32)
    assert (table.readable_tokens(pull), table.first_token(pull)) == (32, None)
    table.begin_send(pull)
    table.end_send(pull, 1000)
    table.finish(ticket, first_token=7, now_s=2.0)
    assert (table.readable_tokens(pull), table.first_token(pull)) == (40, (7, 2.0))
    assert pool.references == {4: 1, 2: 1}
    assert repr(table) == "<ExportTable [1 tickets, 1 pulls, 0 running sends]>"
    table.end_pull(pull, now_s=3.0)
    table.release(ticket, 1, now_s=3.5)
    assert not pool.references
    assert table.take_ended() == [ExportEnded(ticket=ticket, outcome="released", bytes=1000, ms=2500.0)]
    table.release(ticket, 1, now_s=4.0)  # asked again: answered again
    assert refusal_of(table.begin_pull, ticket, 2, 5.0) is Refusal.RELEASED
    assert refusal_of(table.release, ticket, 2, 5.0) is Refusal.RELEASED


def test_a_running_send_holds_the_blocks_of_a_revoked_ticket() -> None:
    table, pool = make_table()
    ticket = make_ticket()
    table.open(ticket, [BlockId(0)], 8, now_s=0.0)
    table.advance(ticket, 8)
    pull = table.begin_pull(ticket, 1, now_s=0.0)
    table.begin_send(pull)
    table.revoke(ticket, now_s=1.0)
    assert pool.references == {0: 1}
    assert refusal_of(table.readable_tokens, pull) is Refusal.REVOKED
    assert refusal_of(table.begin_send, pull) is Refusal.REVOKED
    table.end_pull(pull, now_s=1.0)
    assert table.take_ended() == []
    table.end_send(pull, 64)
    assert not pool.references
    assert [ended.outcome for ended in table.take_ended()] == ["revoked"]


def test_a_release_asked_twice_is_answered_twice_while_a_send_runs() -> None:
    table, pool = make_table()
    ticket = make_ticket()
    table.open(ticket, [BlockId(0)], 8, now_s=0.0)
    table.finish(ticket, first_token=3, now_s=0.0)
    pull = table.begin_pull(ticket, 1, now_s=0.0)
    table.begin_send(pull)
    table.release(ticket, 1, now_s=1.0)
    table.release(ticket, 1, now_s=1.5)
    assert refusal_of(table.release, ticket, 2, 1.5) is Refusal.RELEASED
    assert pool.references == {0: 1}
    table.end_send(pull, 64)
    assert not pool.references
    assert [ended.outcome for ended in table.take_ended()] == ["released"]


def test_the_lease_counts_only_while_neither_leg_nor_pull_is_open() -> None:
    table, pool = make_table()
    ticket = make_ticket()
    table.open(ticket, [BlockId(0)], 8, now_s=0.0)
    assert table.next_expiry_s() is None
    pull = table.begin_pull(ticket, 1, now_s=1.0)
    table.leg_closed(ticket, now_s=2.0)
    assert table.next_expiry_s() is None
    table.end_pull(pull, now_s=5.0)
    assert table.next_expiry_s() == 15.0
    again = table.begin_pull(ticket, 2, now_s=14.0)
    assert table.next_expiry_s() is None
    assert table.expire(100.0) == []
    table.end_pull(again, now_s=100.0)
    assert table.expire(109.9) == []
    assert table.expire(110.0) == [ticket]
    assert not pool.references
    assert refusal_of(table.begin_pull, ticket, 3, 111.0) is Refusal.LEASE_EXPIRED
    assert table.counters()["leases_expired"] == 1


def test_a_reader_that_comes_after_the_lease_is_late_even_when_nobody_called_expire() -> None:
    table, pool = make_table()
    ticket = make_ticket()
    table.open(ticket, [BlockId(0)], 8, now_s=0.0)
    table.leg_closed(ticket, now_s=0.0)
    assert refusal_of(table.begin_pull, ticket, 1, LEASE_S) is Refusal.LEASE_EXPIRED
    assert not pool.references


def test_only_the_newest_epoch_is_served() -> None:
    table, _ = make_table()
    ticket = make_ticket()
    table.open(ticket, [BlockId(0)], 8, now_s=0.0)
    old = table.begin_pull(ticket, 1, now_s=0.0)
    new = table.begin_pull(ticket, 2, now_s=0.0)
    table.finish(ticket, first_token=1, now_s=0.0)
    assert refusal_of(table.readable_tokens, old) is Refusal.STALE_EPOCH
    assert table.readable_tokens(new) == 8
    assert refusal_of(table.begin_pull, ticket, 1, 0.0) is Refusal.STALE_EPOCH
    assert refusal_of(table.release, ticket, 1, 0.0) is Refusal.STALE_EPOCH
    assert refusal_of(table.release, ticket, 3, 0.0) is Refusal.STALE_EPOCH
    assert table.begin_pull(ticket, 2, now_s=0.0) is not new  # the same epoch again, from the start
    table.release(ticket, 2, now_s=0.0)


def test_no_release_before_token_0_and_none_of_an_unknown_ticket() -> None:
    table, _ = make_table()
    ticket = make_ticket()
    table.open(ticket, [BlockId(0)], 8, now_s=0.0)
    table.begin_pull(ticket, 1, now_s=0.0)
    assert refusal_of(table.release, ticket, 1, 0.0) is Refusal.STALE_EPOCH
    assert refusal_of(table.release, make_ticket(2), 1, 0.0) is Refusal.UNKNOWN
    assert refusal_of(table.begin_pull, make_ticket(2), 1, 0.0) is Refusal.UNKNOWN
    assert refusal_of(table.begin_pull, ticket, 0, 0.0) is Refusal.STALE_EPOCH


def test_a_ticket_is_opened_once_and_its_id_never_shown_whole() -> None:
    table, _ = make_table()
    ticket = make_ticket(0xABCDEF << 100)
    table.open(ticket, [BlockId(0)], 8, now_s=0.0)
    with pytest.raises(ValueError) as caught:
        table.open(ticket, [BlockId(0)], 8, now_s=0.0)
    assert ticket.hex() not in str(caught.value)
    with pytest.raises(ValueError, match="9 tokens computed"):
        table.advance(ticket, 9)


class ExportMachine(RuleBasedStateMachine):
    """Any order of what worker, readers and time may do, beside a plain model of who holds what."""

    tickets = Bundle("tickets")
    pulls = Bundle("pulls")

    def __init__(self) -> None:
        super().__init__()
        self.table, self.pool = make_table()
        self.now_s = 0.0
        self.count = 0
        self.blocks: dict[TicketId, list[BlockId]] = {}
        self.leg: set[TicketId] = set()
        self.over: dict[TicketId, str] = {}
        self.epoch: dict[TicketId, int] = {}
        self.finished: set[TicketId] = set()
        self.open_pulls: set[Pull] = set()
        self.sends: list[Pull] = []
        self.idle_since: dict[TicketId, float] = {}
        self.reported: list[TicketId] = []
        self.reading: dict[tuple[TicketId, int], int] = {}
        self.unanswered: set[tuple[TicketId, int]] = set()

    def sending(self) -> set[TicketId]:
        """Ended or not: tickets that some rank still sends of, or has not said that it does not."""
        self.settle_ends()
        return {pull.ticket for pull in self.sends} | {ticket for ticket, _ in self.unanswered}

    def settle_ends(self) -> None:
        """Of several ranks."""

    def touch(self) -> None:
        """Model: the lease of tickets that nobody holds, after time or holders have changed."""
        for ticket in self.blocks:
            held = ticket in self.leg or any(pull.ticket == ticket for pull in self.open_pulls)
            held = held or any(of == ticket and num for (of, _), num in self.reading.items())
            if held:
                self.idle_since.pop(ticket, None)
            else:
                since = self.idle_since.setdefault(ticket, self.now_s)
                if ticket not in self.over and self.now_s >= since + LEASE_S:
                    self.over[ticket] = "expired"

    @rule(target=tickets, num_blocks=st.integers(1, 3), base=st.integers(0, 4))
    def open(self, num_blocks: int, base: int) -> TicketId:
        self.count += 1
        ticket = make_ticket(self.count)
        blocks = [BlockId(base + index) for index in range(num_blocks)]  # tickets may share blocks
        self.table.open(ticket, blocks, num_blocks * 4, self.now_s)
        self.blocks[ticket] = blocks
        self.leg.add(ticket)
        return ticket

    @rule(ticket=tickets, part=st.floats(0, 1))
    def advance(self, ticket: TicketId, part: float) -> None:
        self.table.advance(ticket, int(part * len(self.blocks[ticket]) * 4))

    @rule(ticket=tickets)
    def finish(self, ticket: TicketId) -> None:
        self.table.finish(ticket, 5, self.now_s)
        if ticket not in self.over:
            self.finished.add(ticket)

    @rule(ticket=tickets)
    def close_leg(self, ticket: TicketId) -> None:
        self.table.leg_closed(ticket, self.now_s)
        self.leg.discard(ticket)
        self.touch()

    @rule(ticket=tickets)
    def revoke(self, ticket: TicketId) -> None:
        self.table.revoke(ticket, self.now_s)
        self.over.setdefault(ticket, "revoked")

    @rule(target=pulls, ticket=tickets, step=st.integers(-1, 1))
    def begin_pull(self, ticket: TicketId, step: int) -> Pull | None:
        epoch = self.epoch.get(ticket, 0) + step
        try:
            pull = self.table.begin_pull(ticket, epoch, self.now_s)
        except ExportRefused:
            assert ticket in self.over or epoch < max(1, self.epoch.get(ticket, 0))
            return None
        assert ticket not in self.over
        self.epoch[ticket] = epoch
        self.open_pulls.add(pull)
        self.touch()
        return pull

    @rule(pull=pulls)
    def end_pull(self, pull: Pull | None) -> None:
        if pull is not None:
            self.table.end_pull(pull, self.now_s)
            self.open_pulls.discard(pull)
            self.touch()

    @rule(pull=pulls)
    def begin_send(self, pull: Pull | None) -> None:
        if pull is None or pull not in self.open_pulls:
            return
        try:
            self.table.begin_send(pull)
        except ExportRefused:
            assert pull.ticket in self.over or pull.epoch < self.epoch[pull.ticket]
        else:
            assert pull.ticket not in self.over and pull.epoch == self.epoch[pull.ticket]
            self.sends.append(pull)

    @precondition(lambda self: self.sends)
    @rule(data=st.data())
    def end_send(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.sends) - 1))
        self.table.end_send(self.sends.pop(index), 10)

    @rule(ticket=tickets, step=st.integers(-1, 1))
    def release(self, ticket: TicketId, step: int) -> None:
        epoch = self.epoch.get(ticket, 0) + step
        try:
            self.table.release(ticket, epoch, self.now_s)
        except ExportRefused:
            right = epoch == self.epoch.get(ticket, 0) >= 1
            assert not right or self.over.get(ticket, "") in ("revoked", "expired") or ticket not in self.finished
        else:
            assert epoch == self.epoch[ticket] and ticket in self.finished
            assert self.over.setdefault(ticket, "released") == "released"

    @rule(seconds=st.sampled_from([1.0, LEASE_S / 2, LEASE_S]))
    def pass_time(self, seconds: float) -> None:
        self.now_s += seconds
        self.touch()
        self.table.expire(self.now_s)

    @invariant()
    def blocks_are_held_exactly_while_needed(self) -> None:
        expected: Counter[BlockId] = Counter()
        for ticket, blocks in self.blocks.items():
            if ticket not in self.over or ticket in self.sending():
                expected.update(blocks)
        assert self.pool.references == expected

    @invariant()
    def every_end_is_reported_once_and_after_its_blocks_are_back(self) -> None:
        for ended in self.table.take_ended():
            assert ended.outcome == self.over[ended.ticket]
            self.reported.append(ended.ticket)
        assert sorted(self.reported) == sorted(set(self.over) - self.sending())

    @invariant()
    def counters_tell_the_same(self) -> None:
        counters = self.table.counters()
        assert counters["tickets"] == len(self.blocks) - len(set(self.over) - self.sending())
        assert counters["running_sends"] == len(self.sends) + len(self.unanswered)


class _Told:
    """The other ranks: what they were told, as they were told it."""

    ranks = (1, 2)

    def __init__(self) -> None:
        self.opened_tickets: list[TicketId] = []
        self.finished_tickets: set[TicketId] = set()
        self.epochs: dict[TicketId, int] = {}
        self.ends: list[tuple[TicketId, str]] = []

    def opened(self, ticket: TicketId, seq_id: int, blocks: Sequence[BlockId], num_tokens: int) -> None:
        self.opened_tickets.append(ticket)

    def finished(self, ticket: TicketId) -> None:
        self.finished_tickets.add(ticket)

    def superseded(self, ticket: TicketId, epoch: int) -> None:
        assert epoch > self.epochs.get(ticket, 0)
        self.epochs[ticket] = epoch

    def ended(self, ticket: TicketId, outcome: str) -> None:
        self.ends.append((ticket, outcome))


class RankedExportMachine(ExportMachine):
    """The same with two more ranks, whose news come in any order with everything else."""

    def __init__(self) -> None:
        super().__init__()
        self.told = _Told()
        self.table = ExportTable(self.pool, LEASE_S, self.told)

    def settle_ends(self) -> None:
        """Model: whatever has ended waits for both."""
        for ticket, outcome in self.told.ends:
            assert self.over[ticket] == outcome
            self.unanswered |= {(ticket, rank) for rank in self.told.ranks}
        self.told.ends.clear()

    @rule(
        ticket=ExportMachine.tickets, rank=st.sampled_from([1, 2]), num_open=st.integers(0, 2), step=st.integers(0, 1)
    )
    def follower_reads(self, ticket: TicketId, rank: int, num_open: int, step: int) -> None:
        epoch = self.epoch.get(ticket, 0) + step if num_open else 0
        self.table.follower_reading(ticket, rank, num_open, epoch, self.now_s)
        if ticket not in self.over:
            self.reading[ticket, rank] = num_open
            if epoch > self.epoch.get(ticket, 0):
                self.epoch[ticket] = epoch
            self.touch()

    @precondition(lambda self: self.unanswered)
    @rule(data=st.data())
    def follower_has_ended(self, data: st.DataObject) -> None:
        ticket, rank = data.draw(st.sampled_from(sorted(self.unanswered)))
        self.unanswered.discard((ticket, rank))
        self.table.follower_ended(ticket, rank, 10)

    @rule(ticket=ExportMachine.tickets, rank=st.sampled_from([1, 2]))
    def follower_answers_what_nobody_asked(self, ticket: TicketId, rank: int) -> None:
        if (ticket, rank) not in self.unanswered:
            self.table.follower_ended(ticket, rank, 10)

    @invariant()
    def the_other_ranks_are_told(self) -> None:
        assert self.told.opened_tickets == list(self.blocks)
        assert {ticket: epoch for ticket, epoch in self.epoch.items() if epoch} == self.told.epochs
        assert self.told.finished_tickets == self.finished


TestExports = ExportMachine.TestCase
TestExports.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)
TestRankedExports = RankedExportMachine.TestCase
TestRankedExports.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)


def test_what_the_ranks_sent_is_one_sum() -> None:
    pool, told = CountingPool(), _Told()
    table = ExportTable(pool, LEASE_S, told)
    ticket = make_ticket()
    table.open(ticket, [BlockId(0)], 8, now_s=0.0, seq_id=4)
    table.finish(ticket, first_token=1, now_s=0.0)
    pull = table.begin_pull(ticket, 1, now_s=1.0)
    table.begin_send(pull)
    table.end_send(pull, 5)
    table.release(ticket, 1, now_s=2.0)
    table.release(ticket, 1, now_s=2.5)  # asked again while the others are ending
    assert table.take_ended() == [] and pool.references == {0: 1}
    table.follower_ended(ticket, 1, 7)
    table.follower_ended(ticket, 1, 7)
    assert table.take_ended() == [] and pool.references == {0: 1}
    table.follower_ended(ticket, 2, 9)
    assert table.take_ended() == [ExportEnded(ticket=ticket, outcome="released", bytes=21, ms=1000.0)]
    assert not pool.references
    assert refusal_of(table.release, ticket, 2, 3.0) is Refusal.RELEASED


def test_layers_ahead_never_go_back_and_give_way_to_whole_chunks() -> None:
    table, _ = make_table()
    ticket = make_ticket()
    table.open(ticket, [BlockId(0), BlockId(1)], 16, now_s=0.0)
    pull = table.begin_pull(ticket, 1, now_s=0.0)
    table.advance_layers(ticket, 8, 2)
    table.advance_layers(ticket, 8, 1)
    assert table.readable(pull) == Readable(tokens=0, ahead_tokens=8, ahead_layers=2)
    table.advance(ticket, 8)
    assert table.readable(pull) == Readable(tokens=8, ahead_tokens=8, ahead_layers=0)
    table.advance_layers(ticket, 8, 3)  # late news of a chunk that is whole
    table.advance_layers(ticket, 16, 1)
    assert table.readable(pull) == Readable(tokens=8, ahead_tokens=16, ahead_layers=1)
    with pytest.raises(ValueError, match="17 tokens computed"):
        table.advance_layers(ticket, 17, 1)
    table.revoke(ticket, 0.0)
    table.advance_layers(ticket, 16, 2)
    assert refusal_of(table.readable, pull) is Refusal.REVOKED
