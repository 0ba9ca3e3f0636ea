"""Handoffs over real sockets: content, overlap with computing, the digest agreed on, rests beside a decode."""

import asyncio
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from support.kv import (
    BLOCKS,
    FIRST_TOKEN,
    LAYOUT,
    NUM_TOKENS,
    SummingMemory,
    decode_side,
    make_signature,
    prefill_side,
    pull,
    until_no_pull,
)
from support.kv_tampering import digest_fits, is_piece, tampering_proxy

from biphase.kernels.kv_pack import CpuKvMemory
from biphase.kvtransfer import pace as pace_module
from biphase.kvtransfer.signature import BYTES_DIGEST, SUM_DIGEST
from biphase.protos.errors import HandoffFailed
from biphase.protos.ids import BlockId


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


async def test_rest_is_owed_for_the_pulls_own_cpu_time_and_only_beside_a_decode(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cpu_s, now_s, busy = 0.0, 0.0, False
    rests: list[float] = []

    async def sleep(seconds: float) -> None:
        nonlocal now_s, cpu_s
        rests.append(seconds)
        now_s += seconds
        await real_sleep(0)

    real_sleep = asyncio.sleep
    monkeypatch.setattr(pace_module, "time", SimpleNamespace(thread_time=lambda: cpu_s, monotonic=lambda: now_s))
    monkeypatch.setattr(pace_module, "asyncio", SimpleNamespace(sleep=sleep))
    pace = pace_module.Pace()

    async def work(num_pieces: int, piece_s: float, others_s: float = 0.0) -> None:
        nonlocal cpu_s
        for _ in range(num_pieces):
            cpu_s += piece_s
            await pace.rest(busy)
            asyncio.get_running_loop().call_soon(others, others_s)
            await real_sleep(0)

    def others(seconds: float) -> None:
        nonlocal cpu_s
        cpu_s += seconds

    await pace.counting(work(1, 1.0))
    assert rests == []
    busy = True
    await pace.counting(work(10, 0.001))
    assert sum(rests) == pytest.approx(0.01 * pace_module._REST_OF_WORK)
    rests.clear()
    await pace.counting(work(10, 0.001, others_s=1.0))  # of others' second, no more than a wire may have had
    assert sum(rests) <= 0.01 * pace_module._REST_OF_WORK * pace_module._OF_WIRE
    rests.clear()
    await pace.counting(work(3, 10.0))
    assert rests == pytest.approx([pace_module._LONGEST_REST_S] * 3)


async def test_a_pull_beside_a_decode_and_a_busy_loop_goes_on_resting_as_little() -> None:
    """Neither the rests, which keep its source waiting, nor what others take of the loop make it give its source up."""
    stop = asyncio.Event()

    async def others() -> None:
        while not stop.is_set():
            until_s = time.thread_time() + 0.006
            while time.thread_time() < until_s:
                pass
            await asyncio.sleep(0.004)

    async with prefill_side() as prefill, decode_side(decoding=lambda: True) as decode:
        burning = asyncio.create_task(others())
        ticket = prefill.open(NUM_TOKENS, computed=1)
        pulling = asyncio.create_task(pull(decode, ticket))
        for tokens in range(2, NUM_TOKENS):
            prefill.exports.advance(ticket.id, tokens)
            await asyncio.sleep(0.02)
        prefill.exports.finish(ticket.id, FIRST_TOKEN, time.monotonic())
        began_s = time.monotonic()
        await pulling
        assert time.monotonic() - began_s < 1.0
        stop.set()
        await burning
