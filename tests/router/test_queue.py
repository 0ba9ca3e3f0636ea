"""Who waits for an instance, for how long and in which order, over real loopback gRPC with scripted instances."""

import time

import grpc
import pytest

from biphase.protos import worker_pb2
from biphase.router.config import RequestLimits, Waits

LENGTH = 2


async def test_requests_wait_in_order_and_the_queue_is_bounded(stage):
    limits = RequestLimits(max_queued_requests=2)
    async with stage(limits=limits, decode_values={"max_num_seqs": 1}) as s:
        running = s.door.ask("running", max_tokens=2)
        _, decode = await s.hand_over(running)
        s.d.load(running=1)
        await running.text_is("A")
        waiting = [s.door.ask(name, max_tokens=2) for name in ("one", "three")]
        for answer in waiting:
            await answer.accepted()
        counters = await s.door.counters()
        assert (counters["queued_requests"], counters["queued_tokens"]) == (2, 8)
        code, detail = await s.door.ask("four").failed()
        assert code == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert detail == "2 requests wait already, the limit is 2; try later"
        s.d.tokens(decode, 1, b"B", LENGTH)
        s.d.end(decode)
        s.d.load()
        assert (await s.p.next("open_prefill")).num_prompt_tokens == len("one")


async def test_the_queue_is_bounded_by_tokens_too(stage):
    limits = RequestLimits(max_queued_tokens=10)
    async with stage(limits=limits) as s:
        s.p.load(queued_tokens=5000)
        await s.door.until_queued_tokens(5000)
        first = s.door.ask("x" * 50, max_tokens=2)  # alone it is taken, whatever its length
        await first.accepted()
        code, detail = await s.door.ask("xyz", max_tokens=2).failed()
        assert code == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert detail == "50 prompt tokens wait already and this prompt has 3, the limit is 10; try later"


async def test_a_prompt_waits_while_no_decode_instance_has_room(stage):
    async with stage() as s:
        first = s.door.ask("a" * 20, max_tokens=2)
        await first.accepted()
        await s.p.next("open_prefill")
        s.d.load(running=1, room_blocks=9)  # of which 6 are promised to the first
        await s.door.until_running(1)
        second = s.door.ask("b" * 20, max_tokens=2)
        await second.accepted()
        assert (await s.door.counters())["queued_requests"] == 1
        s.d.load(running=1, room_blocks=12)
        assert (await s.p.next("open_prefill")).num_prompt_tokens == 20


async def test_what_waited_behind_a_request_goes_on_when_that_one_is_cancelled(stage):
    async with stage() as s:
        s.d.load(running=1, room_blocks=3)
        await s.door.until_running(1)
        long = s.door.ask("a" * 40, max_tokens=2)
        await long.accepted()
        short = s.door.ask("b", max_tokens=2)
        await short.accepted()
        assert s.p.commands.empty()
        long.call.cancel()
        assert (await s.p.next("open_prefill")).num_prompt_tokens == 1


async def test_busy_means_the_next_one_and_all_busy_means_waiting_for_a_load(stage):
    async with stage(prefill=2, waits=Waits(leg_end_s=0.3, drain_s=0.3, busy_retry_s=60)) as s:
        answer = s.door.ask(max_tokens=2)
        await answer.accepted()
        first = await s.prefill[0].next("open_prefill")
        assert first.refusals == 0
        s.prefill[0].refuse(first.leg_id, queued=500)
        second = await s.prefill[1].next("open_prefill")
        assert second.refusals == 1
        s.prefill[1].refuse(second.leg_id, queued=400)
        await s.door.until_counters(queued_requests=1)
        s.prefill[1].load(queued_tokens=400)  # no better than it said
        s.prefill[1].load(queued_tokens=100)
        third = await s.prefill[1].next("open_prefill")
        assert third.refusals == 2


async def test_a_refusal_for_want_of_blocks_is_tried_again_even_if_no_load_comes(stage):
    async with stage() as s:
        s.door.ask(max_tokens=2)
        opened = await s.p.next("open_prefill")
        for count in (1, 2, 3):
            s.p.refuse(opened.leg_id)
            opened = await s.p.next("open_prefill")
            assert opened.refusals == count


async def test_a_ticket_is_offered_to_the_next_decode_instance_with_the_next_epoch(stage):
    async with stage(decode=2) as s:
        answer = s.door.ask(max_tokens=2)
        prefill = (await s.p.next("open_prefill")).leg_id
        s.p.start(prefill)
        s.p.tokens(prefill, 0, b"A")
        first = await s.decode[0].next("open_decode")
        s.decode[0].refuse(first.leg_id)
        second = await s.decode[1].next("open_decode")
        assert second.ticket == first.ticket
        assert (first.pull_epoch, second.pull_epoch, second.refusals) == (1, 2, 1)
        s.decode[1].refuse(second.leg_id)
        await s.door.until_counters(queued_requests=1)
        s.decode[0].load()
        third = await s.decode[0].next("open_decode") if s.decode[1].commands.empty() else None
        assert third is not None and third.pull_epoch == 3
        s.decode[0].hand_off(third.leg_id)
        s.p.end(prefill)
        s.decode[0].tokens(third.leg_id, 1, b"B", LENGTH)
        s.decode[0].end(third.leg_id)
        assert (await answer.finished()).decode_instance == s.decode[0].label
        await s.door.until_idle()


async def test_what_an_instance_calls_invalid_ends_the_request(stage):
    async with stage() as s:
        answer = s.door.ask(max_tokens=2)
        opened = await s.p.next("open_prefill")
        s.p.refuse(opened.leg_id, worker_pb2.REFUSAL_INVALID, "prompt + max_tokens - 1 is 9 blocks, it has 8")
        code, detail = await answer.failed()
        assert code == grpc.StatusCode.INVALID_ARGUMENT
        assert detail.endswith("prompt + max_tokens - 1 is 9 blocks, it has 8")
        assert (await s.door.until_idle())["failed_invalid_argument"] == 1


async def test_server_info_tells_since_when_an_instance_is_in_its_state(stage):
    async with stage(prefill=2) as s:
        before_s = time.time()
        s.prefill[0].load(draining=True)
        info = await s.door.until(lambda info: info.instances[0].state == "draining")
        draining, ready = (one.since_unix_s for one in info.instances[:2])
        assert ready < before_s < draining < time.time()
        s.prefill[0].load(draining=True, running=1)  # the same state again
        info = await s.door.until(lambda info: info.instances[0].running == 1)
        assert [one.since_unix_s for one in info.instances[:2]] == pytest.approx([draining, ready], abs=0.005)


async def test_a_draining_instance_gets_nothing_new(stage):
    async with stage(prefill=2) as s:
        s.prefill[0].load(draining=True)
        await s.door.until_states("draining", "ready", "ready")
        s.door.ask(max_tokens=2)
        await s.prefill[1].next("open_prefill")
        assert s.prefill[0].commands.empty()
