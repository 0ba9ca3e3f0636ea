"""Pulls that end in the middle: revoked, superseded, cancelled, stopped, the source dead."""

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import numpy as np
import pytest
from grpc._cython.cygrpc import ExecuteBatchError  # type: ignore[import-untyped]
from support.kv import BLOCKS, FIRST_TOKEN, LAYOUT, NUM_TOKENS, decode_side, prefill_side, pull, until_no_pull

from biphase.kernels.kv_layout import KvBox
from biphase.kernels.kv_pack import CpuKvMemory
from biphase.kvtransfer.grpc_transport import SERVICE
from biphase.protos import kv_pb2
from biphase.protos.errors import HandoffFailed
from biphase.protos.ids import Incarnation, InstanceName, TicketId
from biphase.protos.values import KvTicket


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


class CancelledCall:
    """A call as its servicer sees it once the client has cancelled it: gRPC takes no status for it any more."""

    def __init__(self, known: bool) -> None:
        self._known = known

    def cancelled(self) -> bool:
        return self._known

    async def abort(self, code: grpc.StatusCode, text: str) -> None:
        raise ExecuteBatchError("Failed grpc_call_start_batch: 8")


@pytest.mark.parametrize("known", [True, False])
async def test_a_refusal_of_a_call_that_was_cancelled_is_no_error(known: bool) -> None:
    async with prefill_side() as prefill:
        request = kv_pb2.PullRequest(ticket=b"?" * 16, epoch=1, incarnation=1)
        await prefill.server._pull(request, CancelledCall(known))  # type: ignore[arg-type]
        release = kv_pb2.ReleaseRequest(ticket=b"?" * 16, epoch=1, incarnation=9)
        await prefill.server.Release(release, CancelledCall(known))  # type: ignore[arg-type]
