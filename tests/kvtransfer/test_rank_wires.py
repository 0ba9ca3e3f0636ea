"""Handoffs between ranks over every wire that a CPU has: content, codecs, and what happens when a wire fails."""

import asyncio
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from support.kv import FIRST_TOKEN
from support.kv_ranks import FULL, decode_ranks, prefill_ranks, tokens_of

from biphase.kvtransfer import pace as pace_module
from biphase.kvtransfer import peers as peers_module
from biphase.kvtransfer.shm.plane import ShmReceiver
from biphase.kvtransfer.tcp.sink import InlineSink
from biphase.kvtransfer.tcp.source import TcpSource
from biphase.kvtransfer.wire import FrameSink, Room
from biphase.protos.errors import HandoffFailed
from biphase.protos.ids import BlockId
from biphase.protos.parallel_plan import ParallelPlan

BLOCKS = [BlockId(block) for block in (9, 3, 4, 5, 20, 1, 2)]
NUM_TOKENS = 100
ONE, TP2, PP2, TP2PP2 = ParallelPlan(), ParallelPlan(tp=2), ParallelPlan(pp=2), ParallelPlan(tp=2, pp=2)


@pytest.mark.parametrize("wanted", ["tcp", "shm", "auto"])
@pytest.mark.parametrize(("source", "target"), [(ONE, ONE), (TP2PP2, TP2), (TP2, PP2)], ids=str)
async def test_content_arrives_by_the_wire_that_was_chosen(
    wanted: str, source: ParallelPlan, target: ParallelPlan
) -> None:
    async with prefill_ranks(source, wanted=wanted) as prefill, decode_ranks(target, wanted=wanted) as decode:
        for epoch in (1, 2):  # connections are used again
            ticket = await prefill.open(NUM_TOKENS)
            result = await decode.puller.pull(ticket, epoch, BLOCKS, timeout_s=20)
            assert result.first_token == FIRST_TOKEN
            assert decode.holds(prefill, BLOCKS, NUM_TOKENS)
            for pool in decode.pools:
                pool[...] = np.nan
            ended = await prefill.ended.get()
            assert (ended.outcome, ended.bytes) == ("released", result.bytes)
        used = "shm" if wanted == "auto" else wanted
        own = decode.puller.counters()
        assert own[f"bytes_by_{used}"] > 0 and own["fallbacks"] == own["bad_pieces"] == 0
        assert all(text.startswith(f"{used}: ") for text in decode.puller.transports.values())


@pytest.mark.parametrize("codec", ["fp8", "int8", "int4"])
async def test_codecs_between_plans_and_block_sizes(codec: str) -> None:
    codecs = (codec, "raw")
    async with prefill_ranks(TP2, codecs=codecs) as prefill:
        async with decode_ranks(PP2, block_size=32, codecs=codecs) as decode:
            ticket = await prefill.open(NUM_TOKENS)
            result = await decode.puller.pull(ticket, 1, BLOCKS, timeout_s=20)
            wanted = tokens_of(prefill.whole, prefill.blocks_of(NUM_TOKENS), NUM_TOKENS)
            for stage, pool in enumerate(decode.pools):
                got = tokens_of(pool, BLOCKS, NUM_TOKENS)
                worst = np.abs(got - wanted[2 * stage : 2 * stage + 2]).max()
                assert 0 < worst < {"fp8": 0.3, "int8": 0.05, "int4": 0.6}[codec]
            sent = (await prefill.ended.get()).bytes
            assert result.bytes == NUM_TOKENS * FULL.token_bytes and sent < result.bytes / 2


class Breaking:
    """A sink whose wire breaks after some frames, the first time."""

    def __init__(self, sink: FrameSink, after: int) -> None:
        self._sink = sink
        self._left = after

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sink, name)

    async def send(self, header: bytes, payload: Room | Sequence[memoryview] | bytes) -> None:
        if self._left == 0:
            raise ConnectionError("the wire broke")
        self._left -= 1
        await self._sink.send(header, payload)


@pytest.mark.parametrize("after", [0, 2])
async def test_a_wire_that_fails_gives_way_to_the_next_once(after: int) -> None:
    """tcp to rank 1 breaks, at once or after a piece; what had come stays, the rest comes by gRPC."""

    def wrap(rank: int, sink: FrameSink) -> FrameSink:
        return Breaking(sink, after) if rank == 1 and isinstance(sink, InlineSink) else sink

    async with prefill_ranks(TP2, wanted="tcp", wrap_sink=wrap) as prefill:
        async with decode_ranks(ONE, wanted="tcp") as decode:
            ticket = await prefill.open(NUM_TOKENS)
            await decode.puller.pull(ticket, 1, BLOCKS, timeout_s=20)
            assert decode.holds(prefill, BLOCKS, NUM_TOKENS)
            counters = decode.puller.counters()
            assert counters["fallbacks"] == 1 and counters["bytes_by_grpc"] > 0 and counters["bytes_by_tcp"] > 0
            ticket = await prefill.open(NUM_TOKENS)
            await decode.puller.pull(ticket, 1, BLOCKS, timeout_s=20)
            assert decode.puller.counters()["fallbacks"] == 1  # left aside for a while
            assert decode.puller.transports["rank 0 from rank 1 of prefill-0"] == "grpc: tcp failed: the wire broke"
            assert decode.puller.transports["rank 0 from rank 0 of prefill-0"].startswith("tcp: ")


async def test_status_names_the_first_choice_again_when_it_works_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers_module, "AVOID_S", (0.0, 0.0))
    breaks = {"tcp": False}

    def wrap(rank: int, sink: FrameSink) -> FrameSink:
        return Breaking(sink, 0) if breaks["tcp"] and isinstance(sink, InlineSink) else sink

    async with prefill_ranks(ONE, wanted="tcp", wrap_sink=wrap) as prefill:
        async with decode_ranks(ONE, wanted="tcp") as decode:
            said = []
            for breaks["tcp"] in (False, True, False):
                await decode.puller.pull(await prefill.open(NUM_TOKENS), 1, BLOCKS, timeout_s=20)
                said.append(decode.puller.transports["rank 0 from rank 0 of prefill-0"])
    assert said[0] == said[2] and said[0].startswith("tcp: ")
    assert said[1] == "grpc: tcp failed: the wire broke"


async def test_release_goes_by_the_wire_that_carried_the_kv(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by the one that failed in that very pull, however long ago: its time aside is over already here."""
    monkeypatch.setattr(peers_module, "AVOID_S", (0.0, 0.0))
    asked = []
    release = TcpSource.release

    async def over_tcp(source: TcpSource, *arguments: Any) -> None:
        asked.append(source)
        await release(source, *arguments)

    monkeypatch.setattr(TcpSource, "release", over_tcp)

    def wrap(rank: int, sink: FrameSink) -> FrameSink:
        return Breaking(sink, 1) if isinstance(sink, InlineSink) else sink

    async with prefill_ranks(ONE, wanted="tcp", wrap_sink=wrap) as prefill:
        async with decode_ranks(ONE, wanted="tcp") as decode:
            await decode.puller.pull(await prefill.open(NUM_TOKENS), 1, BLOCKS, timeout_s=20)
            assert decode.puller.counters()["fallbacks"] == 1
            assert not asked


async def test_a_wire_that_keeps_a_payload_back_gives_way_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """The source lives and says so; its payloads, beside the stream, do not come: as with a group whose network is gone."""
    closed: dict[ShmReceiver, asyncio.Event] = {}

    async def hang(receiver: ShmReceiver, reference: bytes, num_bytes: int) -> memoryview:
        await closed.setdefault(receiver, asyncio.Event()).wait()
        raise ConnectionError("the pull is closed")

    def close(receiver: ShmReceiver) -> None:
        closed.setdefault(receiver, asyncio.Event()).set()

    monkeypatch.setattr(ShmReceiver, "fetch", hang)
    monkeypatch.setattr(ShmReceiver, "close", close)
    monkeypatch.setattr(pace_module, "SILENCE_S", 0.5)
    async with prefill_ranks(TP2, wanted="shm") as prefill, decode_ranks(ONE, wanted="shm") as decode:
        for _ in range(2):  # by the second it is left aside
            ticket = await prefill.open(NUM_TOKENS)
            await decode.puller.pull(ticket, 1, BLOCKS, timeout_s=20)
            assert decode.holds(prefill, BLOCKS, NUM_TOKENS)
        counters = decode.puller.counters()
        assert counters["fallbacks"] == 2 and "bytes_by_shm" not in counters  # one for each rank


async def test_a_source_that_is_gone_is_given_up_at_once_whatever_the_wire() -> None:
    async with prefill_ranks(TP2, wanted="shm") as prefill, decode_ranks(TP2, wanted="shm") as decode:
        ticket = await prefill.open(NUM_TOKENS, computed=False)
        prefill.layers_computed(ticket, 16, 4)
        pulling = asyncio.create_task(decode.puller.pull(ticket, 1, BLOCKS, timeout_s=20))
        await asyncio.gather(*(decode.wrote(rank) for rank in range(2)))
        began_s = time.monotonic()
        await prefill.stop_rank(1)
        with pytest.raises(HandoffFailed, match="cannot reach prefill-0"):
            await pulling
        assert time.monotonic() - began_s < 2.0
        assert not decode.pulls[0].num_running


@pytest.mark.parametrize("patient", [True, False])
async def test_a_pull_goes_another_way_while_its_pair_group_is_built(
    monkeypatch: pytest.MonkeyPatch, patient: bool
) -> None:
    """That is no failure of the wire: no fallback is counted, and the next pull finds the group."""
    monkeypatch.setattr(peers_module, "MOMENT_S", 20.0 if patient else 0.0)
    async with prefill_ranks(TP2, wanted="dist") as prefill, decode_ranks(ONE, wanted="dist") as decode:
        bytes_by_dist = [0]
        for epoch in (1, 2):
            ticket = await prefill.open(NUM_TOKENS)
            await decode.puller.pull(ticket, epoch, BLOCKS, timeout_s=20)
            assert decode.holds(prefill, BLOCKS, NUM_TOKENS)
            said = set(decode.puller.transports.values())
            assert ("tcp: dist was not ready" in said) is (epoch == 1 and not patient), said
            bytes_by_dist.append(decode.puller.counters().get("bytes_by_dist", 0))
            async with asyncio.timeout(20):
                while decode.puller._own.peers._preparing:
                    await asyncio.sleep(0.005)
        assert (bytes_by_dist[1] > bytes_by_dist[0]) is patient
        assert bytes_by_dist[2] > bytes_by_dist[1]
        assert decode.puller.counters()["fallbacks"] == 0
