"""What went bad or unanswered on the way is asked for or told again; what is bad twice fails the handoff."""

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from support.kv import (
    BLOCKS,
    FIRST_TOKEN,
    NUM_TOKENS,
    DecodeSide,
    PrefillSide,
    SummingMemory,
    decode_side,
    make_signature,
    prefill_side,
    pull,
)
from support.kv_tampering import TAMPERINGS, Tamper, corrupt_trailer, flip_bit, is_piece, pieces_at, tampering_proxy

from biphase.kernels.kv_pack import CpuKvMemory
from biphase.kvtransfer.faults import FaultInjector, FaultPlan
from biphase.protos.errors import HandoffFailed
from biphase.protos.values import KvTicket


@asynccontextmanager
async def tampered(
    tamper: Tamper, content_digest: str = "bytes"
) -> AsyncIterator[tuple[PrefillSide, DecodeSide, KvTicket, Any]]:
    memory = SummingMemory if content_digest == "sum64" else CpuKvMemory
    signature = make_signature("decode-0", content_digest=content_digest)
    async with prefill_side(memory=memory) as prefill, tampering_proxy(prefill.address, tamper) as proxy:
        async with decode_side(signature=signature) as decode:
            yield prefill, decode, replace(prefill.open(NUM_TOKENS), kv_address=proxy.address), proxy


@pytest.mark.parametrize("content_digest", ["bytes", "sum64"])
@pytest.mark.parametrize("name", TAMPERINGS)
async def test_what_went_bad_once_is_asked_for_again(name: str, content_digest: str) -> None:
    tamper = TAMPERINGS[name]
    once: Tamper = lambda number, received: tamper(received) if number == 0 else received
    async with tampered(once, content_digest) as parts:
        prefill, decode, ticket, proxy = parts
        result = await pull(decode, ticket)
        assert np.array_equal(decode.content(BLOCKS, NUM_TOKENS), prefill.content(NUM_TOKENS))
        assert result.first_token == FIRST_TOKEN
        assert proxy.num_pulls >= 2
        assert (decode.puller.counters()["bad_pieces"] > 0) == (name != "lose")
        assert (await prefill.next_end()).outcome == "released"


@pytest.mark.parametrize("name", TAMPERINGS)
async def test_what_is_bad_twice_fails_the_handoff(name: str) -> None:
    def always(_: int, received: list[bytes]) -> list[bytes]:
        numbers = pieces_at(received)
        if name == "corrupt-trailer":
            return corrupt_trailer(received)
        if len(numbers) < 3:  # a second try is one piece: the plainest fault will do
            return [flip_bit(frame, len(frame) - 1) if is_piece(frame) else frame for frame in received]
        return TAMPERINGS[name](received)

    async with tampered(always) as (prefill, decode, ticket, _):
        with pytest.raises(HandoffFailed) as caught:
            await pull(decode, ticket)
        assert "bad twice" in str(caught.value) and "\n" not in str(caught.value)
        assert prefill.exports.counters()["tickets"] == 1  # not released: the router may try it elsewhere
        await prefill_still_serves(prefill, ticket)


async def prefill_still_serves(prefill: PrefillSide, ticket: KvTicket) -> None:
    async with decode_side() as other:
        await pull(other, replace(ticket, kv_address=prefill.address), epoch=2)
        assert np.array_equal(other.content(BLOCKS, NUM_TOKENS), prefill.content(NUM_TOKENS))


async def test_a_duplicate_beside_the_rest_changes_nothing() -> None:
    def twice(_: int, received: list[bytes]) -> list[bytes]:
        at = pieces_at(received)[0]
        return [*received[: at + 1], received[at], *received[at + 1 :]]

    async with tampered(twice) as (prefill, decode, ticket, proxy):
        await pull(decode, ticket)
        assert len({box for box in decode.memory.boxes}) == len(decode.memory.boxes)
        assert np.array_equal(decode.content(BLOCKS, NUM_TOKENS), prefill.content(NUM_TOKENS))
        assert (proxy.num_pulls, decode.puller.counters()["bad_pieces"]) == (1, 1)


async def test_pieces_of_another_request_or_epoch_are_not_taken() -> None:
    kept: list[list[bytes]] = []

    def replay(number: int, received: list[bytes]) -> list[bytes]:
        kept.append(received)
        return kept[0] if number == 1 else received

    async with tampered(replay) as (prefill, decode, ticket, _):
        await pull(decode, ticket)
        other = replace(prefill.open(NUM_TOKENS), kv_address=ticket.kv_address)
        await pull(decode, other)  # its first stream was the other request's; its second try is good
        assert decode.puller.counters()["bad_pieces"] == len(kept[0])


async def test_release_is_told_again_until_answered() -> None:
    async with tampered(lambda _, received: received) as (prefill, decode, ticket, proxy):
        proxy.fail_releases = 2
        result = await pull(decode, ticket)
        assert not result.released
        assert (await prefill.next_end()).outcome == "released"
        assert len(proxy.releases) == 3


async def test_a_release_that_comes_too_late_fails_the_handoff() -> None:
    async with prefill_side() as prefill:

        def revoke(_: int, received: list[bytes]) -> list[bytes]:
            prefill.exports.revoke(ticket.id, time.monotonic())
            return received

        async with tampering_proxy(prefill.address, revoke) as proxy, decode_side() as decode:
            ticket = replace(prefill.open(NUM_TOKENS), kv_address=proxy.address)
            with pytest.raises(HandoffFailed, match="REVOKED"):
                await pull(decode, ticket)


async def test_the_source_counts_what_has_arrived_not_what_it_sent() -> None:
    """Frames are dropped and repeated on the way; what is missing is sent again."""
    async with prefill_side() as prefill, decode_side() as decode:
        injector = FaultInjector(FaultPlan.parse("drop=0.15,duplicate=0.1,seed=5"))
        prefill.service._wrap_sink = injector.wrap
        num_repaired = 0
        for _ in range(12):
            ticket, dropped = prefill.open(NUM_TOKENS), injector.counts["drop"]
            try:
                result = await pull(decode, ticket)
            except HandoffFailed:
                prefill.exports.revoke(ticket.id, time.monotonic())
                await prefill.next_end()
                continue
            num_repaired += injector.counts["drop"] > dropped
            ended = await prefill.next_end()
            assert (ended.outcome, ended.bytes) == ("released", result.bytes)
        assert num_repaired and injector.counts["duplicate"]
