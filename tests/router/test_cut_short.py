"""Requests that end before their output does: the client goes, its deadline passes, it reads too slowly."""

import contextlib

import grpc
import pytest

from biphase.protos import router_pb2, router_pb2_grpc, worker_pb2
from biphase.router.config import RequestLimits

HUGE = {"max_model_len": 1_000_000, "num_blocks": 1_000_000}
LENGTH = 2


@pytest.mark.parametrize("phase", ["queue", "prefill", "started", "pulling", "decoding"])
async def test_a_client_that_goes_ends_all_its_work(stage, phase):
    decode_values = {"max_num_seqs": 1}
    async with stage(decode_values=decode_values) as s:
        if phase == "queue":
            s.d.load(running=1)
            await s.door.until_running(1)
        answer = s.door.ask(request_id="mine")
        await answer.accepted()
        open_legs = []
        if phase != "queue":
            prefill = (await s.p.next("open_prefill")).leg_id
            open_legs.append((s.p, prefill))
        if phase in ("started", "pulling", "decoding"):
            s.p.start(prefill)
            decode = (await s.d.next("open_decode")).leg_id
            open_legs.append((s.d, decode))
        if phase in ("pulling", "decoding"):
            s.p.tokens(prefill, 0, b"A")
            await answer.text_is("A")
        if phase == "decoding":
            s.d.hand_off(decode)
            s.p.end(prefill)
            s.d.tokens(decode, 1, b"B")
            await answer.text_is("AB")
            open_legs = [(s.d, decode)]
        answer.call.cancel()
        for worker, leg in open_legs:
            assert (await worker.next("cancel")).leg_id == leg
            worker.end(leg, worker_pb2.LEG_CANCELLED)
        counters = await s.door.until_idle()
        assert counters["cancelled"] == 1


@pytest.mark.parametrize("phase", ["queue", "decoding"])
async def test_a_deadline_is_kept_in_every_phase(stage, phase):
    async with stage(decode_values={"max_num_seqs": 1}) as s:
        if phase == "queue":
            s.d.load(running=1)
            await s.door.until_running(1)
            answer = s.door.ask(timeout=0.2)
        else:
            answer = s.door.ask(timeout=0.5)
            _, decode = await s.hand_over(answer)
        code, _ = await answer.failed()
        assert code == grpc.StatusCode.DEADLINE_EXCEEDED
        if phase == "decoding":
            assert (await s.d.next("cancel")).leg_id == decode
            s.d.end(decode, worker_pb2.LEG_CANCELLED)
        await s.door.until_idle()


async def test_legs_that_never_end_are_given_up(stage):
    async with stage() as s:
        answer = s.door.ask()
        await s.hand_over(answer)
        await answer.text_is("A")
        answer.call.cancel()
        await s.d.next("cancel")
        assert (await s.door.until_counters(live_requests=1))["legs"] == 1
        await s.door.until_idle()


@contextlib.asynccontextmanager
async def slow_reader(s, max_tokens=50_000):
    """A call of a client that has taken nothing but Accepted, over a connection that holds little; and its leg."""
    message = router_pb2.GenerateRequest(text="x", sampling=router_pb2.SamplingParams(max_tokens=max_tokens))
    little = [("grpc.http2.lookahead_bytes", 1024), ("grpc.http2.bdp_probe", 0)]
    async with grpc.aio.insecure_channel(s.door.address, options=little) as channel:
        call = router_pb2_grpc.RouterStub(channel).Generate(message)
        assert (await call.read()).WhichOneof("event") == "accepted"
        yield call, (await s.d.next("open_decode")).leg_id


async def status_after_the_rest(call):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        while True:
            await call.read()
    return caught.value.code(), caught.value.details()


async def test_a_slow_reader_gets_several_steps_per_message(stage):
    async with stage(decode_values=HUGE, prefill=0, limits=RequestLimits(max_buffered_tokens=1_000_000)) as s:
        async with slow_reader(s) as (call, leg):
            s.d.tokens(leg, 0, b"y" * 50_000, LENGTH, per_message=100)
            s.d.end(leg)
            await s.door.until_counters(finished=1)
            sizes = []
            while (reply := await call.read()).WhichOneof("event") == "delta":
                assert reply.delta.first_index == sum(sizes)
                assert len(reply.delta.text) == len(reply.delta.token_ids)
                sizes.append(len(reply.delta.token_ids))
            assert sum(sizes) == reply.finished.usage.output_tokens == 50_000
            assert max(sizes) > 10 * 100


async def test_a_reader_that_takes_nothing_is_cut_and_in_nobodys_way(stage):
    limits = RequestLimits(write_timeout_s=0.3, max_buffered_tokens=1_000_000)
    async with stage(limits=limits, decode_values=HUGE, prefill=0) as s:
        async with slow_reader(s) as (call, leg):
            s.d.tokens(leg, 0, b"y" * 49_000, per_message=100)
            quick = s.door.ask("quick", max_tokens=2)
            quick_leg = (await s.d.next("open_decode")).leg_id
            s.d.tokens(quick_leg, 0, b"AB", LENGTH)
            s.d.end(quick_leg)
            await quick.finished()
            assert quick.text == "AB"
            assert (await s.d.next("cancel")).leg_id == leg
            s.d.end(leg, worker_pb2.LEG_CANCELLED)
            assert (await s.door.until_idle())["failed_resource_exhausted"] == 1
            code, detail = await status_after_the_rest(call)
            assert code == grpc.StatusCode.RESOURCE_EXHAUSTED
            assert detail == "the client reads too slowly: it has taken nothing for 0.3 s"


async def test_what_waits_for_a_slow_reader_is_bounded(stage):
    limits = RequestLimits(write_timeout_s=60, max_buffered_tokens=1000)
    async with stage(limits=limits, decode_values=HUGE, prefill=0) as s:
        async with slow_reader(s) as (call, leg):
            s.d.tokens(leg, 0, b"y" * 49_000, per_message=100)
            assert (await s.d.next("cancel")).leg_id == leg
            s.d.end(leg, worker_pb2.LEG_CANCELLED)
            await s.door.until_idle()
            code, detail = await status_after_the_rest(call)
            assert code == grpc.StatusCode.RESOURCE_EXHAUSTED
            assert detail == "the client reads too slowly: 1001 tokens wait for it, the limit is 1000"
