"""Handoffs between instances of several ranks: any plan to any other, and every rule on blocks across ranks."""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from support.kv import FIRST_TOKEN
from support.kv_ranks import FULL, DecodeRanks, PrefillRanks, decode_ranks, prefill_ranks

from biphase.kernels.kv_layout import KvBox
from biphase.kvtransfer.exports import ExportRefused, Refusal
from biphase.protos.errors import HandoffFailed
from biphase.protos.ids import BlockId, TicketId
from biphase.protos.parallel_plan import ParallelPlan
from biphase.protos.values import KvTicket

BLOCKS = [BlockId(block) for block in (9, 3, 4, 5, 20, 1, 2)]
NUM_TOKENS = 100
TP2, PP2, TP2PP2, TP4 = ParallelPlan(tp=2), ParallelPlan(pp=2), ParallelPlan(tp=2, pp=2), ParallelPlan(tp=4)


async def pull(
    decode: DecodeRanks,
    ticket: KvTicket,
    epoch: int = 1,
    blocks: Sequence[BlockId] = BLOCKS,
    timeout_s: float = 20.0,
) -> Any:
    return await decode.puller.pull(ticket, epoch, blocks, timeout_s=timeout_s)


async def until(condition: Callable[[], bool]) -> None:
    """What another rank does is heard of over a socket: give it the loop until it has come."""
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.001)


def quiet(prefill: PrefillRanks) -> bool:
    """Nothing is left of any ticket on any rank."""
    names = ("tickets", "open_pulls", "running_sends")
    return not prefill.blocks_pool.references and not any(
        counters[name] for counters in prefill.counters() for name in names
    )


@pytest.mark.parametrize(
    ("source", "target", "block_size"),
    [
        (TP2, PP2, 16),
        (PP2, TP2, 16),
        (TP4, ParallelPlan(), 16),
        (ParallelPlan(), TP4, 32),
        (TP2PP2, TP4, 8),
        (TP4, TP2PP2, 16),
        (TP2PP2, TP2PP2, 16),
    ],
    ids=str,
)
async def test_any_plan_to_any_other(source: ParallelPlan, target: ParallelPlan, block_size: int) -> None:
    async with prefill_ranks(source) as prefill, decode_ranks(target, block_size=block_size) as decode:
        blocks = BLOCKS if block_size >= 16 else [BlockId(block) for block in range(13, 0, -1)]
        ticket = await prefill.open(NUM_TOKENS)
        result = await pull(decode, ticket, blocks=blocks)
        assert decode.holds(prefill, blocks, NUM_TOKENS)
        copies = 2 if target.tp == 4 else 1  # two KV heads on four places
        assert (result.first_token, result.bytes) == (FIRST_TOKEN, copies * NUM_TOKENS * FULL.token_bytes)
        end = await prefill.ended.get()
        assert (end.ticket, end.outcome, end.bytes) == (ticket.id, "released", result.bytes)
        await until(lambda: quiet(prefill))


async def test_layers_leave_every_rank_while_others_are_computed() -> None:
    async with prefill_ranks(PP2) as prefill, decode_ranks(TP2) as decode:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("biphase.kvtransfer.due.LEAST_AHEAD_BYTES", 1)
            ticket = await prefill.open(NUM_TOKENS, computed=False)
            pulling = asyncio.create_task(pull(decode, ticket))
            for tokens, layers in ((48, 1), (48, 2), (96, 1), (96, 2), (100, 2)):
                prefill.layers_computed(ticket, tokens, layers)
                ahead = [(first + layers - 1, tokens) for first in (0, 2)]  # of either stage
                for memory in decode.memories:
                    while not all(arrived(memory.boxes, layer, token) for layer, token in ahead):
                        await memory.wrote(len(memory.boxes) + 1)
            assert not pulling.done()
            prefill.exports.finish(ticket.id, FIRST_TOKEN, time.monotonic())
            await pulling
        assert decode.holds(prefill, BLOCKS, NUM_TOKENS)


def arrived(boxes: list[KvBox], layer: int, tokens: int) -> bool:
    return any(box.layer_start <= layer < box.layer_end and box.token_end >= tokens for box in boxes)


async def test_blocks_are_freed_only_when_every_ranks_sends_have_ended() -> None:
    """A follower's sink does not take its piece: rank 0 has ended the ticket, and holds its blocks until it has."""
    async with prefill_ranks(TP2) as prefill:
        ticket = await prefill.open(NUM_TOKENS)
        follower = prefill.followers[0]
        await until(lambda: follower.table.counters()["tickets"] == 1)
        reading = follower.table.begin_pull(ticket.id, 1, 0.0)
        follower.table.begin_send(reading)
        prefill.exports.revoke(ticket.id, time.monotonic())
        await until(lambda: follower.table.counters()["running_sends"] == 1 and not follower.table._live(ticket.id))
        await asyncio.sleep(0.05)
        assert set(prefill.blocks_pool.references) == set(prefill.blocks_of(NUM_TOKENS))
        assert prefill.exports.counters()["running_sends"] == 1
        follower.table.end_send(reading, 10)
        assert (await prefill.ended.get()).outcome == "revoked"
        assert quiet(prefill)


async def test_the_lease_counts_no_pull_of_any_rank() -> None:
    async with prefill_ranks(TP2, lease_s=0.1) as prefill:
        ticket = await prefill.open(NUM_TOKENS, computed=False)
        follower = prefill.followers[0]
        await until(lambda: follower.table.counters()["tickets"] == 1)
        follower.on_readers(ticket.id, 1, 1)
        await until(lambda: any(prefill.exports._exports[ticket.id].reading.values()))
        prefill.exports.leg_closed(ticket.id, time.monotonic())
        assert prefill.exports.next_expiry_s() is None
        follower.on_readers(ticket.id, 0, 0)
        assert (await prefill.ended.get()).outcome == "expired"
        await until(lambda: quiet(prefill))
        with pytest.raises(ExportRefused, match="LEASE_EXPIRED"):  # a late reader is told the same at every rank
            follower.table.begin_pull(ticket.id, 1, 0.0)


async def test_a_newer_epoch_at_rank_0_ends_a_reader_that_only_another_rank_has() -> None:
    async with prefill_ranks(TP2) as prefill:
        ticket = await prefill.open(NUM_TOKENS)
        table = prefill.followers[0].table
        older = table.begin_pull(ticket.id, 1, 0.0)
        assert table.readable_tokens(older) >= 0
        newer = prefill.exports.begin_pull(ticket.id, 2, time.monotonic())

        def superseded() -> bool:
            try:
                table.readable(older)
            except ExportRefused as error:
                return error.refusal is Refusal.STALE_EPOCH
            return False

        await until(superseded)
        table.end_pull(older, 0.0)
        prefill.exports.end_pull(newer, time.monotonic())
        prefill.exports.revoke(ticket.id, time.monotonic())
        await until(lambda: quiet(prefill))


async def test_a_newer_epoch_at_any_rank_ends_older_readers_on_all() -> None:
    async with prefill_ranks(TP2) as prefill, decode_ranks(TP2) as first, decode_ranks(PP2) as second:
        ticket = await prefill.open(NUM_TOKENS, computed=False)
        older = asyncio.create_task(pull(first, ticket))
        prefill.layers_computed(ticket, 16, 4)
        await asyncio.gather(*(first.wrote(rank) for rank in range(2)))
        newer = asyncio.create_task(pull(second, ticket, epoch=2))
        with pytest.raises(HandoffFailed, match="STALE_EPOCH"):
            await older
        assert not first.pulls[0].num_running
        prefill.exports.finish(ticket.id, FIRST_TOKEN, time.monotonic())
        await newer
        assert second.holds(prefill, BLOCKS, NUM_TOKENS)
        await until(lambda: quiet(prefill))


async def test_revoking_ends_the_pulls_of_every_rank() -> None:
    async with prefill_ranks(TP2PP2) as prefill, decode_ranks(TP2PP2) as decode:
        ticket = await prefill.open(NUM_TOKENS, computed=False)
        pulling = asyncio.create_task(pull(decode, ticket))
        prefill.layers_computed(ticket, 16, 4)
        await asyncio.gather(*(decode.wrote(rank) for rank in range(4)))
        prefill.exports.revoke(ticket.id, time.monotonic())
        with pytest.raises(HandoffFailed, match="REVOKED"):
            await pulling
        assert not any(pulls.num_running for pulls in decode.pulls)
        await until(lambda: quiet(prefill))


@pytest.mark.parametrize("computed", [0, 16, NUM_TOKENS])
async def test_cancelled_in_any_phase_no_rank_writes_any_more_and_nothing_leaks(computed: int) -> None:
    async with prefill_ranks(TP2) as prefill, decode_ranks(TP2PP2) as decode:
        ticket = await prefill.open(NUM_TOKENS, computed=False)
        pulling = asyncio.create_task(pull(decode, ticket))
        if computed:
            prefill.layers_computed(ticket, computed, 4)
            await asyncio.gather(*(decode.wrote(rank) for rank in range(4)))
        else:
            await until(lambda: all(counters["open_pulls"] for counters in prefill.counters()))
        pulling.cancel()
        await asyncio.sleep(0)
        pulling.cancel()  # again, while the other ranks are ending
        with pytest.raises(asyncio.CancelledError):
            async with asyncio.timeout(10):  # far below what a rank that nobody tells would wait
                await pulling
        assert not any(pulls.num_running for pulls in decode.pulls)
        for pool in decode.pools:
            pool[...] = np.nan
        prefill.layers_computed(ticket, NUM_TOKENS, 4)
        prefill.exports.finish(ticket.id, FIRST_TOKEN, time.monotonic())
        await until(lambda: not any(counters["open_pulls"] for counters in prefill.counters()))
        assert all(np.isnan(pool).all() for pool in decode.pools)
        assert decode.puller.counters()["pulls_cancelled"] == 1
        await pull(decode, ticket, epoch=2)
        assert decode.holds(prefill, BLOCKS, NUM_TOKENS)
        await until(lambda: quiet(prefill))


async def test_one_rank_that_fails_cancels_the_others() -> None:
    """A rank of the source is gone: the rank that reads there fails, the others wait for tokens that never come."""
    async with prefill_ranks(TP2) as prefill, decode_ranks(TP2) as decode:
        ticket = await prefill.open(NUM_TOKENS, computed=False)
        prefill.layers_computed(ticket, 16, 4)
        pulling = asyncio.create_task(pull(decode, ticket))
        await asyncio.gather(*(decode.wrote(rank) for rank in range(2)))
        await prefill.stop_rank(1)
        with pytest.raises(HandoffFailed, match="cannot reach prefill-0 at .* rank 1: "):
            await pulling
        assert not decode.pulls[0].num_running
        assert decode.puller.counters()["open_pulls"] == 0
        await until(lambda: prefill.exports.counters()["open_pulls"] == 0)
        assert prefill.exports.counters()["tickets"] == 1  # the router revokes it


async def test_a_reader_that_is_faster_than_rank_0_waits_for_its_ticket(monkeypatch: pytest.MonkeyPatch) -> None:
    async with prefill_ranks(TP2) as prefill, decode_ranks(TP2) as decode:
        table = prefill.followers[0].table
        held: list[tuple[Any, ...]] = []
        with monkeypatch.context() as late:
            late.setattr(table, "open", lambda *arguments: held.append(arguments))
            ticket = prefill.open_here(NUM_TOKENS)
            pulling = asyncio.create_task(pull(decode, ticket))
            await decode.wrote(0)
            await until(lambda: bool(held))
        table.open(*held[0])
        table.advance(ticket.id, NUM_TOKENS)
        await pulling
        assert decode.holds(prefill, BLOCKS, NUM_TOKENS)


async def test_a_ticket_that_rank_0_never_opened_is_unknown_on_every_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("biphase.kvtransfer.service.OPENED_WITHIN_S", 0.05)
    async with prefill_ranks(TP2) as prefill, decode_ranks(ParallelPlan()) as decode:
        ticket = replace(prefill.open_here(NUM_TOKENS), id=TicketId(b"x" * 16))
        with pytest.raises(HandoffFailed, match="UNKNOWN_TICKET"):
            await pull(decode, ticket)


async def test_what_goes_to_rank_0_alone_is_refused_elsewhere() -> None:
    async with prefill_ranks(TP2) as prefill, decode_ranks(ParallelPlan()) as decode:
        ticket = await prefill.open(NUM_TOKENS)
        own = decode.puller._own
        with own.peers.using("grpc", prefill.services[0].signature.ranks[1].grpc) as peer:
            with pytest.raises(Exception, match="a release goes to rank 0 of prefill-0"):
                await peer.source.release(ticket.id, 1, 1, 5.0)
        await pull(decode, ticket)
        await until(lambda: quiet(prefill))
