"""What dies, and what the client sees: over real sockets with scripted instances."""

import asyncio
import time
from dataclasses import replace

import grpc
import pytest

from biphase.protos import worker_pb2
from biphase.router.config import Waits

STOP, LENGTH = 1, 2
WAITS = Waits(no_prefill_s=0.2, no_decode_s=0.2, leg_end_s=0.3, drain_s=0.3, busy_retry_s=0.2)


async def opened(s, answer, *, first_token=True):
    """A request whose decode leg is open; returns both leg ids."""
    await answer.accepted()
    prefill = (await s.p.next("open_prefill")).leg_id
    s.p.start(prefill)
    decode = (await s.d.next("open_decode")).leg_id
    if first_token:
        s.p.tokens(prefill, 0, b"A")
        await answer.text_is("A")
    return prefill, decode


@pytest.mark.parametrize("mode", ["auto", "strict"])
async def test_prefill_dies_while_it_computes(stage, mode):
    async with stage(mode=mode) as s:
        answer = s.door.ask()
        await s.p.next("open_prefill")
        died_s = time.monotonic()
        await s.p.die()
        code, detail = await answer.failed()
        assert time.monotonic() - died_s < 1.0
        assert code == grpc.StatusCode.UNAVAILABLE
        assert f"prefill instance {s.p.label} was lost" in detail
        await s.door.until_states("lost", "ready")
        await s.door.until_idle()


async def test_prefill_dies_and_the_handoff_was_complete(stage):
    async with stage(mode="strict") as s:
        answer = s.door.ask()
        _, decode = await opened(s, answer)
        await s.p.die()
        asked = await s.d.next("cancel")
        assert (asked.leg_id, asked.unless_handed_off) == (decode, True)
        s.d.hand_off(decode)  # it had released the ticket already
        s.d.tokens(decode, 1, b"BC", LENGTH)
        s.d.end(decode)
        await answer.finished()
        assert answer.text == "ABC"
        await s.door.until_idle()


async def test_prefill_dies_before_its_first_token_is_heard_but_the_handoff_brings_it(stage):
    async with stage(mode="strict") as s:
        answer = s.door.ask()
        _, decode = await opened(s, answer, first_token=False)
        await s.p.die()
        await s.d.next("cancel")
        s.d.hand_off(decode, first_token=ord("A"))
        s.d.tokens(decode, 1, b"BC", LENGTH)
        s.d.end(decode)
        await answer.finished()
        assert answer.text == "ABC"


async def test_prefill_dies_and_the_handoff_was_not_complete(stage):
    async with stage() as s:
        answer = s.door.ask()
        _, decode = await opened(s, answer)
        await s.p.die()
        assert (await s.d.next("cancel")).unless_handed_off
        s.d.end(decode, worker_pb2.LEG_HANDOFF_FAILED, "prefill instance lost")
        code, detail = await answer.failed()
        assert code == grpc.StatusCode.UNAVAILABLE
        assert s.p.label in detail
        assert answer.text == "A"
        await s.door.until_idle()


async def test_decode_dies(stage):
    async with stage() as s:
        answer = s.door.ask()
        prefill, _ = await opened(s, answer)
        await s.d.die()
        code, detail = await answer.failed()
        assert code == grpc.StatusCode.UNAVAILABLE
        assert f"decode instance {s.d.label} was lost" in detail
        assert (await s.p.next("cancel")).leg_id == prefill
        s.p.end(prefill, worker_pb2.LEG_CANCELLED)
        await s.door.until_idle()


async def test_a_failed_handoff_names_its_cause_and_revokes_the_ticket(stage):
    async with stage() as s:
        answer = s.door.ask()
        prefill, decode = await opened(s, answer)
        s.d.end(decode, worker_pb2.LEG_HANDOFF_FAILED, "cannot reach 127.0.0.1:1")
        code, detail = await answer.failed()
        assert (code, detail.endswith("cannot reach 127.0.0.1:1")) == (grpc.StatusCode.UNAVAILABLE, True)
        assert (await s.p.next("cancel")).leg_id == prefill
        s.p.end(prefill, worker_pb2.LEG_CANCELLED)
        assert (await s.door.until_idle())["failed_unavailable"] == 1


async def test_auto_goes_local_while_prefill_is_away_and_back(stage):
    async with stage() as s:
        await s.p.die()
        await s.door.until_states("lost", "ready")
        answer = s.door.ask(max_tokens=1)
        local = await s.d.next("open_decode")
        assert not local.HasField("ticket")
        s.d.tokens(local.leg_id, 0, b"A", LENGTH)
        s.d.end(local.leg_id)
        finished = await answer.finished()
        assert (finished.decision, finished.decision_reason) == ("local", "no_prefill_alive")
        await s.p.restart()
        await s.door.until_states("ready", "ready")
        s.door.ask(max_tokens=1)
        await s.p.next("open_prefill")
        assert (await s.door.counters())["decisions_local_no_prefill_alive"] == 1


async def test_strict_says_unavailable_after_a_moment_and_then_at_once(stage):
    async with stage(mode="strict", waits=replace(WAITS, no_prefill_s=0.3)) as s:
        await s.p.die()
        await s.door.until_states("lost", "ready")
        code, detail = await s.door.ask().failed()
        assert code == grpc.StatusCode.UNAVAILABLE
        assert "no prefill instance has been ready for 0.3 s" in detail
        assert "mode is strict" in detail
        asked_s = time.monotonic()
        await s.door.ask().failed()
        assert time.monotonic() - asked_s < 0.25
        assert s.d.commands.empty()


async def test_strict_serves_a_waiting_request_when_prefill_is_back_in_time(stage):
    async with stage(mode="strict", waits=replace(WAITS, no_prefill_s=10.0)) as s:
        await s.p.die()
        await s.door.until_states("lost", "ready")
        answer = s.door.ask(max_tokens=1)
        await answer.accepted()
        await s.p.restart()
        await s.p.next("open_prefill")


async def test_without_decode_instances_a_request_waits_then_is_refused(stage):
    async with stage() as s:
        await s.d.die()
        await s.door.until_states("ready", "lost")
        code, detail = await s.door.ask().failed()
        assert code == grpc.StatusCode.UNAVAILABLE
        assert "no decode instance has been ready for" in detail
        waiting = s.door.ask(timeout=30)  # its deadline is the limit, not ours
        await waiting.accepted()
        await asyncio.sleep(2 * WAITS.no_decode_s)  # past the wait of requests without a deadline
        assert waiting.error is None
        await s.d.restart()
        await s.p.next("open_prefill")


async def test_a_ticket_waits_for_a_decode_instance_that_died(stage):
    async with stage(waits=replace(WAITS, no_decode_s=10.0)) as s:
        answer = s.door.ask(max_tokens=2)
        prefill = (await s.p.next("open_prefill")).leg_id
        await s.d.die()
        await s.door.until_states("ready", "lost")
        s.p.start(prefill)
        await s.door.until_counters(queued_requests=1)
        await s.d.restart()
        decode = await s.d.next("open_decode")
        assert decode.pull_epoch == 1
        s.p.tokens(prefill, 0, b"A")
        s.d.hand_off(decode.leg_id)
        s.p.end(prefill)
        s.d.tokens(decode.leg_id, 1, b"B", LENGTH)
        s.d.end(decode.leg_id)
        await answer.finished()


async def test_an_instance_that_owes_a_token_and_is_silent_is_given_up(stage):
    async with stage(waits=replace(WAITS, silence_s=0.3)) as s:
        answer = s.door.ask()
        _, decode = await opened(s, answer)
        s.d.hand_off(decode)
        code, detail = await answer.failed()
        assert code == grpc.StatusCode.UNAVAILABLE
        assert detail.endswith(f"decode instance {s.d.label} has sent nothing for 0.3 s")
        assert (await s.d.next("cancel")).leg_id == decode


async def test_an_instance_that_hangs_up_in_good_order_is_lost_and_linked_again(stage):
    async with stage() as s:
        answer = s.door.ask()
        await opened(s, answer)
        s.d.hang_up()
        code, detail = await answer.failed()
        assert code == grpc.StatusCode.UNAVAILABLE
        assert "it ended the link" in detail
        await s.d.wait_linked()


async def test_a_message_of_another_incarnation_breaks_the_link(stage):
    async with stage() as s:
        answer = s.door.ask()
        await opened(s, answer)
        s.d.send(incarnation=99, load=worker_pb2.Load())
        code, detail = await answer.failed()
        assert code == grpc.StatusCode.UNAVAILABLE
        assert "a message of incarnation 99 came, 7 is linked" in detail
        await s.door.until_states("ready", "ready")  # and it is linked again


async def test_parallel_arrays_of_unequal_length_break_the_link(stage):
    async with stage() as s:
        answer = s.door.ask()
        _, decode = await opened(s, answer)
        s.d.send(tokens=worker_pb2.StepTokens(leg_ids=[decode], indices=[1, 2], token_ids=[1], finish=[]))
        code, detail = await answer.failed()
        assert code == grpc.StatusCode.UNAVAILABLE
        assert "it sent a malformed message" in detail


async def test_shutting_down_ends_what_still_lives_and_refuses_what_is_new(stage):
    async with stage() as s:
        answer = s.door.ask()
        _, decode = await opened(s, answer)
        s.door.stop.set()
        code, detail = await s.door.ask("late").failed()
        assert code == grpc.StatusCode.UNAVAILABLE
        assert "shutting down" in detail
        code, detail = await answer.failed()
        assert code == grpc.StatusCode.UNAVAILABLE
        assert detail.endswith("the router is shutting down")
        assert (await s.d.next("cancel")).leg_id == decode


async def test_shutting_down_lets_live_requests_end(stage):
    async with stage(waits=replace(WAITS, drain_s=10.0)) as s:
        answer = s.door.ask(max_tokens=2)
        prefill, decode = await opened(s, answer)
        s.door.stop.set()
        s.d.hand_off(decode)
        s.p.end(prefill)
        s.d.tokens(decode, 1, b"B", LENGTH)
        s.d.end(decode)
        await answer.finished()
        assert answer.text == "AB"
