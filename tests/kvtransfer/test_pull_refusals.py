"""Pulls that are refused: by the source, by the handshake, by the reader itself."""

import time
from dataclasses import replace
from typing import Any

import grpc
import grpc.aio
import numpy as np
import pytest
from support.kv import (
    BLOCKS,
    LAYOUT,
    NUM_TOKENS,
    CountingPool,
    decode_side,
    make_signature,
    prefill_side,
    pull,
    until_no_pull,
)

from biphase.kernels.kv_layout import KvLayout
from biphase.kernels.kv_pack import CpuKvMemory
from biphase.kvtransfer.exports import ExportTable
from biphase.kvtransfer.grpc_transport import SERVICE
from biphase.kvtransfer.service import KvService
from biphase.kvtransfer.signature import SUM_DIGEST, KvSignatureValue, mismatch
from biphase.protos import kv_pb2
from biphase.protos.errors import HandoffFailed, SetupError
from biphase.protos.ids import Incarnation, TicketId


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
