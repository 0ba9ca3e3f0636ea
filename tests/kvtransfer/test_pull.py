"""Handoffs over real sockets: content, overlap, retries, refusals, cancellation, death of the source."""

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import grpc.aio
import numpy as np
import pytest
from support.kv import (
    FIRST_TOKEN,
    LAYOUT,
    CountingPool,
    DecodeSide,
    PrefillSide,
    SummingMemory,
    Tamper,
    decode_side,
    make_signature,
    prefill_side,
    tampering_proxy,
)

from biphase.kernels.kv_layout import KvBox, KvLayout
from biphase.kernels.kv_pack import CpuKvMemory
from biphase.kvtransfer import frames
from biphase.kvtransfer import pace as pace_module
from biphase.kvtransfer.exports import ExportTable
from biphase.kvtransfer.frames import HEADER_BYTES, FrameError, FrameKind
from biphase.kvtransfer.grpc_transport import SERVICE
from biphase.kvtransfer.service import KvService
from biphase.kvtransfer.signature import BYTES_DIGEST, SUM_DIGEST, KvSignatureValue, mismatch
from biphase.protos import kv_pb2
from biphase.protos.errors import HandoffFailed, SetupError
from biphase.protos.ids import BlockId, Incarnation, InstanceName, TicketId
from biphase.protos.values import KvTicket

BLOCKS = [BlockId(block) for block in (9, 3, 4, 5, 40, 1, 2, 60)]
NUM_TOKENS = 100


async def pull(
    decode: DecodeSide, ticket: KvTicket, epoch: int = 1, timeout_s: float = 20.0, blocks: Sequence[BlockId] = BLOCKS
) -> Any:
    return await decode.puller.pull(ticket, epoch, blocks, timeout_s=timeout_s)


async def until_no_pull(prefill: PrefillSide) -> None:
    """The other end hears of a cancellation over the wire; give it the loop until it has."""
    async with asyncio.timeout(10):
        while prefill.exports.counters()["open_pulls"]:
            await asyncio.sleep(0.001)


async def test_all_of_a_request_arrives_and_is_released() -> None:
    async with prefill_side() as prefill, decode_side() as decode:
        ticket = prefill.open(NUM_TOKENS)
        result = await pull(decode, ticket)
        assert np.array_equal(decode.content(BLOCKS, NUM_TOKENS), prefill.content(NUM_TOKENS))
        untouched = [block for block in range(decode.pool.shape[1]) if block not in BLOCKS[:7]]
        assert np.isnan(decode.pool[:, untouched]).all()
        assert np.isnan(decode.pool[:, BLOCKS[6], :, :, NUM_TOKENS % LAYOUT.block_size :]).all()
        assert (result.first_token, result.bytes, result.released) == (
            FIRST_TOKEN,
            NUM_TOKENS * LAYOUT.token_bytes,
            True,
        )
        end = await prefill.next_end()
        assert (end.ticket, end.outcome, end.bytes) == (ticket.id, "released", result.bytes)
        assert not prefill.blocks_pool.references
        assert prefill.exports.counters()["tickets"] == 0


async def test_pieces_travel_while_later_chunks_are_computed() -> None:
    async with prefill_side() as prefill, decode_side() as decode:
        ticket = prefill.open(NUM_TOKENS, computed=0)
        pulling = asyncio.create_task(pull(decode, ticket))
        seen = 0
        for computed in (1, 30, 48, 99):  # block boundaries or not
            prefill.exports.advance(ticket.id, computed)
            prefill.service.wake(ticket.id)
            while seen < computed:
                await decode.memory.wrote(len(decode.memory.boxes) + 1)
                seen = max(box.token_end for box in decode.memory.boxes if box.layer_end == LAYOUT.num_layers)
            assert seen == computed
            assert not pulling.done()
        prefill.exports.finish(ticket.id, FIRST_TOKEN, time.monotonic())
        result = await pulling
        assert np.array_equal(decode.content(BLOCKS, NUM_TOKENS), prefill.content(NUM_TOKENS))
        assert result.exposed_ms <= result.ms


async def test_a_source_that_computes_slowly_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("biphase.kvtransfer.reader.BEAT_S", 0.02)
    monkeypatch.setattr("biphase.kvtransfer.pace.SILENCE_S", 0.5)
    monkeypatch.setattr("biphase.kvtransfer.pace._TICK_S", 0.05)
    async with prefill_side() as prefill, decode_side() as decode:
        ticket = prefill.open(NUM_TOKENS, computed=10)
        pulling = asyncio.create_task(pull(decode, ticket))
        _, still_pulling = await asyncio.wait({pulling}, timeout=1.5)  # three times the silence that is allowed
        assert still_pulling
        prefill.exports.finish(ticket.id, FIRST_TOKEN, time.monotonic())
        assert (await pulling).first_token == FIRST_TOKEN


async def test_a_source_that_beats_and_never_gets_on_is_given_up() -> None:
    async with prefill_side() as prefill, decode_side() as decode:
        ticket = prefill.open(NUM_TOKENS, computed=10)
        with pytest.raises(HandoffFailed, match=r"no progress for 0\.5 s"):
            await pull(decode, ticket, timeout_s=0.5)
        await until_no_pull(prefill)


async def test_many_pulls_at_once_and_one_handshake() -> None:
    async with prefill_side() as prefill, decode_side() as decode:
        tickets = [prefill.open(16) for _ in range(20)]
        results = await asyncio.gather(
            *(pull(decode, ticket, blocks=[BlockId(number)]) for number, ticket in enumerate(tickets))
        )
        assert len(results) == 20
        for number in range(20):
            assert np.array_equal(decode.content([number], 16), prefill.content(16))
        assert decode.puller.counters() == {
            "pulls_done": 20,
            "pulls_failed": 0,
            "pulls_cancelled": 0,
            "bytes_pulled": 20 * 16 * LAYOUT.token_bytes,
            "releases_unanswered": 0,
            "bad_pieces": 0,
            "fallbacks": 0,
            "open_pulls": 0,
            "peers": 1,
            "bytes_by_grpc": 20 * 16 * LAYOUT.token_bytes,
        }


# Bad pieces.


def is_piece(frame: bytes) -> bool:
    return frame[4] == FrameKind.PIECE


def pieces_at(received: list[bytes]) -> list[int]:
    return [index for index, frame in enumerate(received) if is_piece(frame)]


def flip_bit(frame: bytes, offset: int) -> bytes:
    return frame[:offset] + bytes([frame[offset] ^ 1]) + frame[offset + 1 :]


def box_of(frame: bytes) -> KvBox:
    return frames.parse_header(frame[:HEADER_BYTES], len(frame) - HEADER_BYTES).box


def digest_fits(frame: bytes, ticket: TicketId, digest: str) -> bool:
    header, payload = frames.parse_header(frame[:HEADER_BYTES], len(frame) - HEADER_BYTES), frame[HEADER_BYTES:]
    try:
        frames.check_piece_digest(header, ticket, (payload,), digest)
    except FrameError:
        return False
    return True


def content_of(frame: bytes, layout: KvLayout = LAYOUT) -> tuple[bytes, np.ndarray[Any, Any]]:
    box = box_of(frame)
    shape = (box.num_layers, 2, box.num_heads, box.num_tokens, layout.head_dim)
    return frame[:HEADER_BYTES], np.frombuffer(frame[HEADER_BYTES:], dtype=np.float32).reshape(shape).copy()


def corrupt(received: list[bytes]) -> list[bytes]:
    at = pieces_at(received)[1]
    return [*received[:at], flip_bit(received[at], HEADER_BYTES + 1000), *received[at + 1 :]]


def corrupt_coordinates(received: list[bytes]) -> list[bytes]:
    at = pieces_at(received)[0]
    return [*received[:at], flip_bit(received[at], 12), *received[at + 1 :]]


def corrupt_magic(received: list[bytes]) -> list[bytes]:
    at = pieces_at(received)[0]
    return [*received[:at], flip_bit(received[at], 0), *received[at + 1 :]]


def corrupt_trailer(received: list[bytes]) -> list[bytes]:
    return [*received[:-1], flip_bit(received[-1], HEADER_BYTES)]


def truncate(received: list[bytes]) -> list[bytes]:
    at = pieces_at(received)[2]
    return [*received[:at], received[at][:-256], *received[at + 1 :]]


def lose(received: list[bytes]) -> list[bytes]:
    at = pieces_at(received)[0]
    return received[:at] + received[at + 1 :]


def duplicate_one_for_another(received: list[bytes]) -> list[bytes]:
    first, second = pieces_at(received)[:2]
    return [*received[:second], received[first], *received[second + 1 :]]


def swap_layers(received: list[bytes]) -> list[bytes]:
    """Two layers exchanged: pieces of equal size under each other's header."""
    first, second = pieces_at(received)[:2]
    boxes = [box_of(received[at]) for at in (first, second)]
    assert boxes[0].layer_end == boxes[1].layer_start and boxes[0].token_end == boxes[1].token_end
    swapped = list(received)
    swapped[first] = received[first][:HEADER_BYTES] + received[second][HEADER_BYTES:]
    swapped[second] = received[second][:HEADER_BYTES] + received[first][HEADER_BYTES:]
    return swapped


def swap_inside(axis: int) -> Any:
    def swap(received: list[bytes]) -> list[bytes]:
        at = pieces_at(received)[0]
        header, content = content_of(received[at])
        if axis == 3:
            size = LAYOUT.block_size
            content[:, :, :, : 2 * size] = np.roll(content[:, :, :, : 2 * size], size, axis=3)
        else:
            content = np.roll(content, 1, axis=axis)
        return [*received[:at], header + content.tobytes(), *received[at + 1 :]]

    return swap


TAMPERINGS = {
    "corrupt": corrupt,
    "corrupt-coordinates": corrupt_coordinates,
    "corrupt-magic": corrupt_magic,
    "corrupt-trailer": corrupt_trailer,
    "truncate": truncate,
    "lose": lose,
    "duplicate-one-for-another": duplicate_one_for_another,
    "swap-layers": swap_layers,
    "swap-k-and-v": swap_inside(1),
    "swap-heads": swap_inside(2),
    "swap-blocks": swap_inside(3),
}


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


# Release.


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


# Refusals.


async def test_no_such_ticket() -> None:
    async with prefill_side() as prefill, decode_side() as decode:
        ticket = replace(prefill.open(), id=TicketId(b"x" * 16))
        with pytest.raises(HandoffFailed, match="UNKNOWN_TICKET") as caught:
            await pull(decode, ticket)
        assert prefill.address in str(caught.value) and ticket.id.hex() not in str(caught.value)


async def test_a_late_reader_is_told_that_the_lease_is_over() -> None:
    async with prefill_side(lease_s=0.05) as prefill, decode_side() as decode:
        ticket = prefill.open()
        prefill.exports.leg_closed(ticket.id, time.monotonic())
        assert (await prefill.next_end()).outcome == "expired"  # by the server's own timer
        assert not prefill.blocks_pool.references
        with pytest.raises(HandoffFailed, match="LEASE_EXPIRED"):
            await pull(decode, ticket)
        assert prefill.exports.counters()["leases_expired"] == 1


async def test_another_life_of_the_source_is_refused() -> None:
    async with prefill_side(signature=make_signature("prefill-0", incarnation=5)) as prefill, decode_side() as decode:
        ticket = replace(prefill.open(), incarnation=Incarnation(4))
        with pytest.raises(HandoffFailed, match=r"prefill-0 incarnation 5.* prefill-0 incarnation 4"):
            await pull(decode, ticket)
        async with grpc.aio.insecure_channel(prefill.address) as channel:
            request = kv_pb2.PullRequest(ticket=ticket.id, epoch=1, incarnation=4)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await channel.unary_stream(f"/{SERVICE}/Pull")(request.SerializeToString()).read()
        assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert caught.value.details() == "prefill-0 is incarnation 5, the call is meant for incarnation 4"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_hash": b"n" * 16}, "model_hash 6d6d6d6d6d6d6d6d against 6e6e6e6e6e6e6e6e"),
        ({"num_kv_heads": 8}, "num_kv_heads 2 against 8"),
        ({"dtype": "bfloat16"}, "dtype float32 against bfloat16"),
        ({"dtype": "float16", "rope": "theta=5e5"}, "dtype float32 against float16; rope theta=1e5 against theta=5e5"),
        ({"codecs": ("fp8",)}, "codecs raw against fp8"),
        ({"digests": ("crc", "md5")}, "digests xxh3-bytes against crc,md5"),
        ({"kv_scales": b"s" * 16}, "kv_scales none against 7373737373737373"),
    ],
)
async def test_a_wrong_model_is_refused_by_both_names(change: dict[str, Any], message: str) -> None:
    signature = replace(make_signature("decode-0"), **change)
    async with prefill_side() as prefill, decode_side(signature=signature) as decode:
        with pytest.raises(HandoffFailed) as caught:
            await pull(decode, prefill.open())
        assert f"prefill-0 cannot hand KV over to decode-0: {message}" in str(caught.value)
        assert prefill.service.counters()["handshakes_refused"] == 1


@pytest.mark.parametrize(
    ("source", "target", "chosen"),
    [("sum64", "sum64", SUM_DIGEST), ("sum64", "bytes", BYTES_DIGEST), ("bytes", "sum64", BYTES_DIGEST)],
)
async def test_the_handshake_fixes_what_digests_are_over(source: str, target: str, chosen: str) -> None:
    seen = []

    def look(_: int, received: list[bytes]) -> list[bytes]:
        seen.extend(frame for frame in received if is_piece(frame))
        return received

    memory = SummingMemory if source == "sum64" else CpuKvMemory
    async with prefill_side(memory=memory) as prefill, tampering_proxy(prefill.address, look) as proxy:
        async with decode_side(signature=make_signature("decode-0", content_digest=target)) as decode:
            ticket = replace(prefill.open(NUM_TOKENS), kv_address=proxy.address)
            await pull(decode, ticket)
            assert np.array_equal(decode.content(BLOCKS, NUM_TOKENS), prefill.content(NUM_TOKENS))
            assert decode.puller.counters()["bad_pieces"] == 0
    for digest in (BYTES_DIGEST, SUM_DIGEST):
        assert all(digest_fits(frame, ticket.id, digest) == (digest == chosen) for frame in seen)


def test_scales_are_compared_as_the_kernels_have_them() -> None:
    def signature(name: str, *scales: float) -> KvSignatureValue:
        layout = KvLayout(
            num_layers=1,
            num_kv_heads=2,
            head_dim=64,
            block_size=16,
            dtype="float8_e4m3fn",
            kv_scales=((scales, scales),),
        )
        value = KvSignatureValue.of(layout, instance=name, incarnation=1, model_hash=b"m", rope="none")
        return KvSignatureValue.from_proto(value.to_proto())

    target = signature("decode-0", 0.1, 1.0)
    assert mismatch(target, signature("prefill-0", 0.1 + 1e-12, 1.0)) is None
    reason = mismatch(target, signature("prefill-0", 1.0, 0.1))
    assert reason is not None and "\n" not in reason
    assert reason.startswith("prefill-0 cannot hand KV over to decode-0: kv_scales ")


def test_a_server_offers_no_sum_that_its_memory_does_not_take() -> None:
    memory = CpuKvMemory(np.zeros(LAYOUT.pool_shape(1), np.float32), LAYOUT)
    signature = make_signature("prefill-0", content_digest="sum64")
    with pytest.raises(ValueError, match="prefill-0 offers digest xxh3-sum64, its memory packs without a sum"):
        KvService(exports=ExportTable(CountingPool(), 1.0), memory=memory, signature=signature, on_ended=lambda _: None)


async def test_an_address_where_nobody_listens_is_named() -> None:
    async with prefill_side() as prefill:
        ticket = prefill.open()
    async with decode_side() as decode:
        with pytest.raises(HandoffFailed, match=f"cannot reach prefill-0 at {ticket.kv_address}"):
            await pull(decode, ticket)
        assert decode.puller.counters()["peers"] == 0


async def test_a_newer_epoch_ends_the_older_pull() -> None:
    async with prefill_side() as prefill, decode_side() as first, decode_side() as second:
        ticket = prefill.open(NUM_TOKENS, computed=16)
        older = asyncio.create_task(pull(first, ticket, epoch=1))
        await first.memory.wrote(1)
        newer = asyncio.create_task(pull(second, ticket, epoch=2))
        with pytest.raises(HandoffFailed, match="STALE_EPOCH"):
            await older
        prefill.exports.finish(ticket.id, FIRST_TOKEN, time.monotonic())
        await newer
        assert np.array_equal(second.content(BLOCKS, NUM_TOKENS), prefill.content(NUM_TOKENS))


async def test_what_cannot_be_served_is_an_invalid_argument() -> None:
    async with prefill_side() as prefill, grpc.aio.insecure_channel(prefill.address) as channel:
        ticket = prefill.open(NUM_TOKENS)
        good = {
            "ticket": ticket.id,
            "epoch": 1,
            "incarnation": 1,
            "layer_end": LAYOUT.num_layers,
            "head_end": LAYOUT.num_kv_heads,
            "token_end": NUM_TOKENS,
            "codec": "raw",
        }
        requests = [
            kv_pb2.PullRequest(**{**good, **change}).SerializeToString()
            for change in (
                {"digest": SUM_DIGEST},
                {"token_end": 101},
                {"layer_start": 4},
                {"head_end": 3},
                {"token_start": 101},
                {"codec": "x"},
            )
        ]
        for request in [*requests, b"\xff\xff\xff no message"]:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await channel.unary_stream(f"/{SERVICE}/Pull")(request).read()
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        await until_no_pull(prefill)


async def test_a_taken_port_is_a_setup_error() -> None:
    async with prefill_side() as prefill:
        host, port = prefill.address.split(":")
        with pytest.raises(SetupError, match=prefill.address):
            await prefill.server.start(host, int(port))


async def test_too_few_blocks_are_refused_before_anything_is_sent() -> None:
    async with prefill_side() as prefill, decode_side() as decode:
        with pytest.raises(HandoffFailed, match="over 100 tokens, 2 blocks hold 32"):
            await pull(decode, prefill.open(NUM_TOKENS), blocks=BLOCKS[:2])


# Endings in the middle.


class InterruptedMemory(CpuKvMemory):
    """Something happens in the middle of the second pack."""

    num_packs = 0
    interrupt: Callable[[], None]

    def pack(self, blocks: Sequence[int], box: KvBox, out: Any, codec: str = "raw") -> None:
        self.num_packs += 1
        if self.num_packs == 2:
            self.interrupt()
        super().pack(blocks, box, out, codec)


@pytest.mark.parametrize("how", ["revoke", "newer-epoch", "expire"])
async def test_blocks_stay_held_under_a_running_send_whatever_happens_meanwhile(how: str) -> None:
    async with prefill_side(memory=InterruptedMemory) as prefill, decode_side() as decode:
        ticket = prefill.open(NUM_TOKENS)
        seen: list[bool] = []

        def interrupt() -> None:
            if how == "revoke":
                prefill.exports.revoke(ticket.id, time.monotonic())
            elif how == "newer-epoch":
                prefill.exports.end_pull(prefill.exports.begin_pull(ticket.id, 2, 0.0), 0.0)
            else:
                prefill.exports.leg_closed(ticket.id, 0.0)
                prefill.exports.expire(1e9)  # a pull is open: the lease does not count
            assert prefill.exports.counters()["running_sends"] == 1
            seen.append(bool(prefill.blocks_pool.references))

        InterruptedMemory.interrupt = staticmethod(interrupt)  # type: ignore[assignment]
        if how == "expire":
            await pull(decode, ticket)
        else:
            with pytest.raises(HandoffFailed, match="REVOKED" if how == "revoke" else "STALE_EPOCH"):
                await pull(decode, ticket)
            assert len(decode.memory.boxes) <= 2
        assert seen == [True]
        assert prefill.exports.counters()["running_sends"] == 0
        if how == "revoke":
            assert (await prefill.next_end()).outcome == "revoked"
            assert not prefill.blocks_pool.references


async def test_a_pull_rests_while_a_decode_runs_and_loses_nothing() -> None:
    asked = 0

    def decoding() -> bool:
        nonlocal asked
        asked += 1
        return asked % 2 == 0

    async with prefill_side() as prefill, decode_side(decoding=decoding) as decode:
        ticket = prefill.open(NUM_TOKENS)
        assert (await pull(decode, ticket)).first_token == FIRST_TOKEN
        assert asked >= len(decode.memory.boxes)
        assert np.array_equal(decode.content(BLOCKS, NUM_TOKENS), prefill.content(NUM_TOKENS))


async def test_rest_is_owed_for_the_loops_own_cpu_time_and_only_beside_a_decode(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    work_s, now_s, busy = 0.0, 0.0, False
    rests: list[float] = []

    async def sleep(seconds: float) -> None:
        nonlocal now_s
        rests.append(seconds)
        now_s += seconds

    monkeypatch.setattr(pace_module, "time", SimpleNamespace(thread_time=lambda: work_s, monotonic=lambda: now_s))
    monkeypatch.setattr(pace_module, "asyncio", SimpleNamespace(sleep=sleep))
    pace = pace_module.Pace(lambda: busy)
    work_s = 1.0
    await pace.rest()
    assert rests == []
    busy = True
    for _ in range(10):
        work_s += 0.001
        await pace.rest()
    assert sum(rests) == pytest.approx(0.01 * pace_module._REST_OF_WORK)


async def test_cancel_between_pieces_leaves_the_blocks_alone_from_then_on() -> None:
    async with prefill_side() as prefill, decode_side() as decode:
        ticket = prefill.open(NUM_TOKENS, computed=32)
        pulling = asyncio.create_task(pull(decode, ticket))
        await decode.memory.wrote(1)
        pulling.cancel()
        with pytest.raises(asyncio.CancelledError):
            await pulling
        decode.pool[...] = np.nan
        prefill.exports.finish(ticket.id, FIRST_TOKEN, time.monotonic())
        await until_no_pull(prefill)
        assert np.isnan(decode.pool).all()
        assert decode.puller.counters()["pulls_cancelled"] == 1
        assert prefill.exports.counters() == {
            "tickets": 1,
            "open_pulls": 0,
            "running_sends": 0,
            "leases_expired": 0,
            "released": 0,
            "revoked": 0,
        }
        await pull(decode, ticket, epoch=2)
        assert np.array_equal(decode.content(BLOCKS, NUM_TOKENS), prefill.content(NUM_TOKENS))


async def test_revoking_ends_a_pull_whose_reader_does_not_read() -> None:
    async with prefill_side(num_blocks=1024, max_message_bytes=1 << 20) as prefill:
        ticket = prefill.open(16_000)  # 62 MiB: more than any flow control window
        async with grpc.aio.insecure_channel(prefill.address) as channel:
            request = kv_pb2.PullRequest(
                ticket=ticket.id,
                epoch=1,
                incarnation=1,
                layer_end=LAYOUT.num_layers,
                head_end=LAYOUT.num_kv_heads,
                token_end=16_000,
                codec="raw",
            )
            call = channel.unary_stream(f"/{SERVICE}/Pull")(request.SerializeToString())
            assert await call.read()
            before = -1
            while before != (before := prefill.service.counters()["pieces_sent"]):
                await asyncio.sleep(0.2)  # until flow control has stopped the source
            assert prefill.exports.counters()["open_pulls"] == 1
            prefill.exports.revoke(ticket.id, time.monotonic())
            async with asyncio.timeout(2):
                assert (await prefill.next_end()).outcome == "revoked"
            await until_no_pull(prefill)
            assert prefill.service.counters()["pieces_sent"] <= before + 1
            call.cancel()


async def test_a_revoked_ticket_ends_a_waiting_pull() -> None:
    async with prefill_side() as prefill, decode_side() as decode:
        ticket = prefill.open(NUM_TOKENS, computed=16)
        pulling = asyncio.create_task(pull(decode, ticket))
        await decode.memory.wrote(1)
        prefill.exports.revoke(ticket.id, time.monotonic())
        prefill.service.wake(ticket.id)
        with pytest.raises(HandoffFailed, match="REVOKED"):
            await pulling


async def test_stopping_the_server_ends_its_pulls() -> None:
    async with prefill_side() as prefill, decode_side() as decode:
        pulling = asyncio.create_task(pull(decode, prefill.open(NUM_TOKENS, computed=16)))
        await decode.memory.wrote(1)
        await prefill.server.stop()
        await prefill.service.stop()
        assert prefill.exports.counters()["open_pulls"] == 0
        with pytest.raises(HandoffFailed, match=prefill.address):
            await pulling


@asynccontextmanager
async def prefill_process(num_tokens: int, computed: int) -> AsyncIterator[tuple[int, KvTicket]]:
    tests = Path(__file__).parents[1]
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        str(tests / "support" / "kv_prefill_process.py"),
        str(num_tokens),
        str(computed),
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(tests)},
    )
    assert process.stdout is not None
    try:
        told = json.loads(await process.stdout.readline())
        yield (
            process.pid,
            KvTicket(
                id=TicketId(bytes.fromhex(told["id"])),
                kv_address=told["address"],
                instance=InstanceName("prefill-0"),
                incarnation=Incarnation(1),
                num_tokens=num_tokens,
            ),
        )
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


@pytest.mark.parametrize(("how", "within_s"), [(signal.SIGKILL, 1.0), (signal.SIGSTOP, 4.0)])
async def test_a_source_that_dies_mid_pull_ends_the_pull(how: signal.Signals, within_s: float) -> None:
    async with prefill_process(NUM_TOKENS, computed=48) as (pid, ticket), decode_side() as decode:
        pulling = asyncio.create_task(pull(decode, ticket))
        await decode.memory.wrote(1)
        began_s = time.monotonic()
        os.kill(pid, how)
        with pytest.raises(HandoffFailed, match=f"cannot reach prefill-0 at {ticket.kv_address}"):
            await pulling
        assert time.monotonic() - began_s < within_s
        assert decode.puller.counters()["open_pulls"] == 0
