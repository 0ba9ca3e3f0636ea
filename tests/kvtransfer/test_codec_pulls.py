"""A pull packed by a codec brings what that codec keeps of the source's KV, whatever the blocks of either end."""

import asyncio
import time
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
from support.kv import FIRST_TOKEN, LAYOUT, NUM_BLOCKS, make_signature, prefill_side, tokens_of

from biphase.kernels.kv_pack import CpuKvMemory
from biphase.kernels.kv_pack.codec import CODECS, packed_bytes
from biphase.kvtransfer.choice import Choice
from biphase.kvtransfer.codec_choice import CodecChooser, CodecTimes
from biphase.kvtransfer.codec_times import speakable
from biphase.kvtransfer.puller import KvPuller
from biphase.kvtransfer.wire import FrameSink
from biphase.protos.ids import BlockId

TOKENS = 100
SPOKEN = speakable("float32")


def what_it_keeps(source: np.ndarray, blocks: list[BlockId], codec: str) -> np.ndarray:  # type: ignore[type-arg]
    """Of a ticket's whole box, packed at once: groups are blocks, so pieces do not matter."""
    memory, box = CpuKvMemory(source, LAYOUT), LAYOUT.box(TOKENS)
    data = bytearray(packed_bytes(LAYOUT, box, codec))
    memory.pack(blocks, box, data, codec)
    pool = np.zeros_like(source)
    CpuKvMemory(pool, LAYOUT).unpack(blocks, box, data, codec)
    return tokens_of(pool, blocks, TOKENS)


@pytest.mark.parametrize("block_size", [8, 16, 32])
@pytest.mark.parametrize("codec", CODECS)
async def test_a_pull_brings_what_the_codec_keeps(codec: str, block_size: int) -> None:
    layout = replace(LAYOUT, block_size=block_size)
    pool = np.full(layout.pool_shape(NUM_BLOCKS), np.nan, dtype=np.float32)
    signature = replace(make_signature("decode-0", layout=layout), codecs=SPOKEN)
    puller = KvPuller(memory=CpuKvMemory(pool, layout), signature=signature, codecs=CodecChooser(wanted=codec))
    async with prefill_side(signature=replace(make_signature("prefill-0"), codecs=SPOKEN)) as prefill:
        ticket = prefill.open(TOKENS)
        blocks = [BlockId(block) for block in range(NUM_BLOCKS - 1, NUM_BLOCKS - 1 - layout.blocks_for(TOKENS), -1)]
        pulled = await puller.pull(ticket, 1, blocks, timeout_s=10.0)
        wanted = what_it_keeps(prefill.pool, prefill.blocks_of(TOKENS), codec)
        sent = puller.counters()["bytes_by_grpc"]
        await puller.close()
    assert np.array_equal(tokens_of(pool, blocks, TOKENS), wanted)
    assert not np.array_equal(wanted, prefill.content(TOKENS))
    assert pulled.bytes == LAYOUT.box(TOKENS).num_bytes(LAYOUT)
    assert sent < 0.3 * pulled.bytes


@pytest.mark.parametrize(
    ("wanted", "spoken", "said"),
    [
        ("int8", SPOKEN, "grpc: as asked; KV as int8: as configured"),
        ("auto", SPOKEN, "grpc: as asked; KV as raw: nothing is known of this pair yet"),
        ("int8", ("raw",), "grpc: as asked; KV as raw: the other end does not speak int8"),
        ("raw", SPOKEN, "grpc: as asked"),
    ],
)
async def test_what_kv_travels_as_is_said_where_it_is_not_simply_raw(
    wanted: str, spoken: tuple[str, ...], said: str
) -> None:
    pool = np.zeros(LAYOUT.pool_shape(NUM_BLOCKS), dtype=np.float32)
    puller = KvPuller(
        memory=CpuKvMemory(pool, LAYOUT),
        signature=replace(make_signature("decode-0"), codecs=SPOKEN),
        choose=lambda ours, theirs: [Choice("grpc", "as asked")],
        codecs=CodecChooser(wanted=wanted),
    )
    async with prefill_side(signature=replace(make_signature("prefill-0"), codecs=spoken)) as prefill:
        await puller.pull(prefill.open(TOKENS), 1, [BlockId(block) for block in range(7)], timeout_s=10.0)
        await puller.close()
    assert puller.transports == {"rank 0 from rank 0 of prefill-0": said}


async def test_a_source_that_speaks_raw_only_sends_raw() -> None:
    pool = np.full(LAYOUT.pool_shape(NUM_BLOCKS), np.nan, dtype=np.float32)
    signature = replace(make_signature("decode-0"), codecs=SPOKEN)
    puller = KvPuller(memory=CpuKvMemory(pool, LAYOUT), signature=signature, codecs=CodecChooser(wanted="int4"))
    async with prefill_side() as prefill:
        ticket = prefill.open(TOKENS)
        await puller.pull(ticket, 1, [BlockId(block) for block in range(7)], timeout_s=10.0)
        await puller.close()
        assert np.array_equal(tokens_of(pool, range(7), TOKENS), prefill.content(TOKENS))


async def test_auto_packs_once_a_wire_was_seen_to_be_slow() -> None:
    pool = np.full(LAYOUT.pool_shape(NUM_BLOCKS), np.nan, dtype=np.float32)
    signature = replace(make_signature("decode-0"), codecs=SPOKEN)
    at_once = {codec: CodecTimes(pack=1e-12, unpack=1e-12) for codec in SPOKEN}
    chooser = CodecChooser(wanted="auto", budget=1.0, times=at_once)
    puller = KvPuller(memory=CpuKvMemory(pool, LAYOUT), signature=signature, codecs=chooser)
    async with prefill_side(signature=replace(make_signature("prefill-0"), codecs=SPOKEN)) as prefill:
        blocks = [BlockId(block) for block in range(7)]
        sent = []
        for _ in range(2):
            before = puller.counters().get("bytes_by_grpc", 0)
            await puller.pull(prefill.open(TOKENS), 1, blocks, timeout_s=10.0)
            sent.append(puller.counters()["bytes_by_grpc"] - before)
            chooser.observe("prefill-0", "raw", raw_bytes=1 << 20, wire_bytes=1 << 20, seconds=1.0)
        await puller.close()
    assert sent[0] == LAYOUT.box(TOKENS).num_bytes(LAYOUT)
    assert sent[1] == packed_bytes(LAYOUT, LAYOUT.box(TOKENS), "int4")


async def test_a_new_life_of_the_source_is_asked_raw_again() -> None:
    """It may be on another machine: what was seen of the old one's wire must not cost the new one's tokens quality."""
    signature = replace(make_signature("decode-0"), codecs=SPOKEN)
    at_once = {codec: CodecTimes(pack=1e-12, unpack=1e-12) for codec in SPOKEN}
    chooser = CodecChooser(wanted="auto", budget=1.0, times=at_once)
    pool = np.full(LAYOUT.pool_shape(NUM_BLOCKS), np.nan, dtype=np.float32)
    puller = KvPuller(memory=CpuKvMemory(pool, LAYOUT), signature=signature, codecs=chooser)
    blocks = [BlockId(block) for block in range(7)]
    sent = []
    for incarnation in (1, 1, 2):
        source = replace(make_signature("prefill-0", incarnation=incarnation), codecs=SPOKEN)
        async with prefill_side(signature=source) as prefill:
            before = puller.counters().get("bytes_by_grpc", 0)
            await puller.pull(prefill.open(TOKENS), 1, blocks, timeout_s=10.0)
            sent.append(puller.counters()["bytes_by_grpc"] - before)
        chooser.observe("prefill-0", "raw", raw_bytes=1 << 20, wire_bytes=1 << 20, seconds=1.0)
    await puller.close()
    raw, packed = LAYOUT.box(TOKENS).num_bytes(LAYOUT), packed_bytes(LAYOUT, LAYOUT.box(TOKENS), "int4")
    assert sent == [raw, packed, raw]


class SlowSink:
    """A wire of 2 MB/s."""

    gathers = False

    def __init__(self, sink: FrameSink) -> None:
        self._sink = sink

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sink, name)

    async def send(self, header: bytes, payload: Any) -> None:
        await asyncio.sleep(len(payload.payload) / 2e6 if hasattr(payload, "payload") else 0.0)
        await self._sink.send(header, payload)


@pytest.mark.parametrize("computed", [0, 48, TOKENS])
async def test_auto_learns_of_a_slow_wire_from_pulls_that_begin_before_all_is_computed(computed: int) -> None:
    pool = np.full(LAYOUT.pool_shape(NUM_BLOCKS), np.nan, dtype=np.float32)
    signature = replace(make_signature("decode-0"), codecs=SPOKEN)
    at_once = {codec: CodecTimes(pack=1e-12, unpack=1e-12) for codec in SPOKEN}
    chooser = CodecChooser(wanted="auto", budget=1.0, times=at_once)
    puller = KvPuller(memory=CpuKvMemory(pool, LAYOUT), signature=signature, codecs=chooser)
    async with prefill_side(signature=replace(make_signature("prefill-0"), codecs=SPOKEN)) as prefill:
        prefill.service._wrap_sink = SlowSink
        for wanted in ("raw", "int4"):
            before = puller.counters().get("bytes_by_grpc", 0)
            ticket = prefill.open(TOKENS, computed=computed)
            finish = partial(prefill.exports.finish, ticket.id, FIRST_TOKEN)
            asyncio.get_running_loop().call_later(0.05, lambda finish=finish: finish(time.monotonic()))
            await puller.pull(ticket, 1, [BlockId(block) for block in range(7)], timeout_s=10.0)
            sent = puller.counters()["bytes_by_grpc"] - before
            assert sent == packed_bytes(LAYOUT, LAYOUT.box(TOKENS), wanted)
            if wanted == "raw":
                assert 0.5e6 < chooser.bandwidth("prefill-0") < 2.2e6
        await puller.close()
