"""What dies, and what the client sees: over real sockets with scripted instances."""

import asyncio
import time
from dataclasses import replace

import grpc
import pytest

from biphase.protos import worker_pb2
from biphase.protos.convert import unpack_tokens
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


async def test_prefill_dies_while_it_computes_and_another_takes_the_prompt(stage):
    async with stage(prefill=2, mode="strict") as s:
        answer = s.door.ask(max_tokens=1)
        await s.p.next("open_prefill")
        died_s = time.monotonic()
        await s.p.die()
        leg = (await s.prefill[1].next("open_prefill")).leg_id
        assert time.monotonic() - died_s < 1.0
        s.prefill[1].start(leg, ticket=False)
        s.prefill[1].tokens(leg, 0, b"A", LENGTH)
        s.prefill[1].end(leg)
        assert (await answer.finished()).replays == 1
        counters = await s.door.until_idle()
        assert (counters["replays"], counters["replays_lost"]) == (1, 1)


async def test_the_last_prefill_instance_dies_while_it_computes(stage):
    async with stage() as s:
        answer = s.door.ask(max_tokens=1)
        await s.p.next("open_prefill")
        await s.p.die()
        local = await s.d.next("open_decode")
        assert not local.HasField("ticket")
        s.d.tokens(local.leg_id, 0, b"A", LENGTH)
        s.d.end(local.leg_id)
        finished = await answer.finished()
        assert (finished.decision, finished.decision_reason) == ("local", "no_prefill_alive")
    async with stage(mode="strict") as s:
        answer = s.door.ask()
        await s.p.next("open_prefill")
        await s.p.die()
        code, detail = await answer.failed()
        assert code == grpc.StatusCode.UNAVAILABLE
        assert "no prefill instance has been ready for 0.2 s" in detail
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


def words_of(opened) -> tuple[str, int]:
    """What a leg was opened with, and how much of it is the prompt's."""
    return "".join(map(chr, unpack_tokens(opened.token_ids))), opened.num_prompt_tokens


async def test_prefill_dies_and_the_handoff_was_not_complete(stage):
    async with stage() as s:
        answer = s.door.ask(max_tokens=2)
        _, decode = await opened(s, answer)
        await s.p.die()
        assert (await s.d.next("cancel")).unless_handed_off
        s.d.end(decode, worker_pb2.LEG_HANDOFF_FAILED, "prefill instance lost")
        again = await s.d.next("open_decode")
        assert words_of(again) == ("promptA", 6)
        s.d.tokens(again.leg_id, 1, b"B", LENGTH)
        s.d.end(again.leg_id)
        await answer.finished()
        assert answer.token_ids == [*b"AB"]
        await s.door.until_idle()


@pytest.mark.parametrize("first_token", [True, False])
@pytest.mark.parametrize("how", ["dies", "drains"])
async def test_a_decode_instance_is_lost_under_a_pull_and_another_one_pulls(stage, how, first_token):
    """Nothing is prefilled again."""
    async with stage(decode=2, mode="strict") as s:
        answer = s.door.ask(max_tokens=2)
        prefill, decode = await opened(s, answer, first_token=first_token)
        if how == "dies":
            await s.d.die()
        else:
            s.d.load(draining=True)
            s.d.end(decode, worker_pb2.LEG_DRAINED, "grace is over")
        other = s.decode[1]
        there = await other.next("open_decode")
        assert there.pull_epoch == 2 and there.HasField("ticket")
        other.hand_off(there.leg_id, first_token=b"A"[0])
        if not first_token:
            s.p.tokens(prefill, 0, b"A")
        s.p.end(prefill)
        other.tokens(there.leg_id, 1, b"B", LENGTH)
        other.end(there.leg_id)
        finished = await answer.finished()
        assert answer.token_ids == [*b"AB"]
        assert (finished.replays, finished.decode_instance) == (0, other.label)
        assert s.p.commands.empty()
        counters = await s.door.until_idle()
        assert (counters["pulls_again"], counters.get("replays", 0)) == (1, 0)


async def begins_anew(s, prefill):
    """The prefill leg is called off, and the request is replayed."""
    assert (await s.p.next("cancel")).leg_id == prefill
    s.p.end(prefill, worker_pb2.LEG_CANCELLED)
    counters = await s.door.counters()
    assert (counters["replays_lost"], counters.get("pulls_again", 0)) == (1, 0)


async def test_the_only_decode_instance_is_lost_under_a_pull_and_the_prompt_waits_for_another(stage):
    """It does not hold the prefill instance's memory meanwhile."""
    async with stage(mode="strict") as s:
        answer = s.door.ask(max_tokens=2)
        prefill, _ = await opened(s, answer)
        await s.d.die()
        await begins_anew(s, prefill)


@pytest.mark.parametrize("then", ["refuses", "dies", "drains"])
async def test_a_decode_instance_is_lost_under_a_pull_and_the_other_one_is_busy(stage, then):
    """One that is busy is waited for; when it goes too there is no more to wait for."""
    async with stage(decode=2, mode="strict") as s:
        answer = s.door.ask(max_tokens=2)
        prefill, _ = await opened(s, answer)
        other = s.decode[1]
        other.load(running=1, room_blocks=0)
        await s.door.until_running(1)
        await s.d.die()
        await s.door.until(lambda info: any(one.state == "lost" for one in info.instances))
        match then:
            case "refuses":
                other.load()
                there = await other.next("open_decode")
                other.load(running=1, room_blocks=0)
                other.refuse(there.leg_id)
                other.load()
                assert (await other.next("open_decode")).pull_epoch == 3
                assert s.p.commands.empty()
                return
            case "dies":
                await other.die()
            case "drains":
                other.load(running=1, room_blocks=0, draining=True)
        await begins_anew(s, prefill)


@pytest.mark.parametrize("how", ["dies", "hangs up", "drains"])
async def test_a_decode_instance_is_lost_and_the_output_goes_on(stage, how):
    async with stage(decode=2, mode="strict") as s:
        answer = s.door.ask(max_tokens=4, seed=5, min_tokens=3)
        _, decode = await s.hand_over(answer)
        s.d.tokens(decode, 1, b"B")
        await answer.text_is("AB")
        match how:
            case "dies":
                await s.d.die()
            case "hangs up":
                s.d.hang_up()
            case "drains":
                s.d.load(draining=True)
                s.d.end(decode, worker_pb2.LEG_DRAINED, "grace is over")
        again = await s.p.next("open_prefill")
        assert words_of(again) == ("promptAB", 6)
        assert (again.sampling.max_tokens, again.sampling.min_tokens, again.sampling.seed) == (4, 3, 5)
        s.p.start(again.leg_id)
        other = s.decode[1]
        there = await other.next("open_decode")
        assert words_of(there) == ("promptAB", 6) and there.HasField("ticket")
        s.p.tokens(again.leg_id, 2, b"C")
        other.hand_off(there.leg_id)
        s.p.end(again.leg_id)
        other.tokens(there.leg_id, 3, b"D", LENGTH)
        other.end(there.leg_id)
        finished = await answer.finished()
        assert answer.token_ids == [*b"ABCD"]
        assert (finished.replays, finished.usage.prompt_tokens, finished.usage.output_tokens) == (1, 6, 4)
        assert finished.decode_instance == other.label
        counters = await s.door.until_idle()
        assert counters[f"replays_{'drained' if how == 'drains' else 'lost'}"] == 1


async def test_a_decode_instance_dies_before_the_prefill_leg_has_ended(stage):
    async with stage(decode=2) as s:
        answer = s.door.ask(max_tokens=3)
        prefill, decode = await opened(s, answer)
        s.d.hand_off(decode)
        s.d.tokens(decode, 1, b"B")
        await answer.text_is("AB")
        await s.d.die()
        assert (await s.p.next("cancel")).leg_id == prefill
        again = (await s.p.next("open_prefill")).leg_id  # before the end of the old leg
        s.p.start(again, ticket=False)
        s.p.tokens(prefill, 0, b"A")  # nobody listens to that one any more
        s.p.end(prefill, worker_pb2.LEG_CANCELLED)
        s.p.tokens(again, 2, b"C", LENGTH)
        s.p.end(again)
        await answer.finished()
        assert answer.text == "ABC"
        await s.door.until_idle()


async def test_a_stop_string_is_found_across_a_replay(stage):
    async with stage(decode=2, mode="strict") as s:
        answer = s.door.ask(max_tokens=9, stop=["BC"])
        _, decode = await s.hand_over(answer)
        s.d.tokens(decode, 1, b"B")
        await answer.until(lambda one: one.token_ids == [*b"AB"])
        await s.d.die()
        again = (await s.p.next("open_prefill")).leg_id
        s.p.tokens(again, 2, b"C")
        finished = await answer.finished()
        assert (answer.text, finished.stop_reason) == ("A", "BC")
        assert (await s.p.next("cancel")).leg_id == again
        s.p.end(again, worker_pb2.LEG_CANCELLED)
        await s.door.until_idle()


async def test_a_request_that_takes_instances_down_is_a_suspect(stage, caplog):
    async with stage(prefill=3, max_replays=1, mode="strict") as s:
        answer = s.door.ask(request_id="mine")
        for worker in s.prefill[:2]:
            await worker.next("open_prefill")
            await worker.die()
        code, detail = await answer.failed()
        assert code == grpc.StatusCode.INTERNAL
        assert "2 instances were lost with the request aboard, the limit is 1" in detail
        (line,) = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
        assert "is suspect: client id 'mine', 6 prompt tokens, 0 output tokens" in line
        await s.door.until_idle()


async def test_all_decode_instances_die_and_the_output_goes_on_when_one_is_back(stage):
    async with stage(mode="strict", waits=replace(WAITS, no_decode_s=10.0)) as s:
        answer = s.door.ask(max_tokens=3)
        await s.hand_over(answer)
        await answer.text_is("A")
        await s.d.die()
        await s.door.until_counters(queued_requests=1)
        await s.d.restart()
        again = (await s.p.next("open_prefill")).leg_id
        s.p.start(again)
        decode = (await s.d.next("open_decode")).leg_id
        s.p.tokens(again, 1, b"B")
        s.d.hand_off(decode)
        s.p.end(again)
        s.d.tokens(decode, 2, b"C", LENGTH)
        s.d.end(decode)
        await answer.finished()
        assert answer.text == "ABC"


async def test_all_decode_instances_die_for_longer_than_the_client_waits(stage):
    async with stage(mode="strict") as s:
        answer = s.door.ask(max_tokens=3, timeout=0.6)
        await s.hand_over(answer)
        await answer.text_is("A")
        await s.d.die()
        code, detail = await answer.failed()
        assert code == grpc.StatusCode.UNAVAILABLE
        assert "no decode instance has been ready for" in detail


async def test_a_mass_loss_does_not_keep_new_work_out(stage):
    """Replays go first, but hold at most half of what the prefill instance queues."""
    async with stage(decode=2, mode="strict", prefill_values={"max_queued_tokens": 16}) as s:
        for _ in range(3):
            answer = s.door.ask("12345678", max_tokens=4)
            await s.hand_over(answer)
            await answer.text_is("A")
            s.d.load(running=0)
        await s.d.die()
        first = await s.p.next("open_prefill")
        assert first.num_prompt_tokens == 8
        s.door.ask("new", max_tokens=4)
        assert (await s.p.next("open_prefill")).num_prompt_tokens == 3
        await s.door.until_counters(queued_requests=2)
        s.p.load()
        s.p.start(first.leg_id, ticket=False)
        s.p.tokens(first.leg_id, 1, b"B")
        assert (await s.p.next("open_prefill")).num_prompt_tokens == 8


async def test_a_failed_handoff_revokes_the_ticket_and_is_tried_with_another_instance(stage):
    async with stage(decode=2, mode="strict") as s:
        answer = s.door.ask(max_tokens=2)
        prefill, decode = await opened(s, answer)
        s.d.end(decode, worker_pb2.LEG_HANDOFF_FAILED, "cannot reach 127.0.0.1:1")
        assert (await s.p.next("cancel")).leg_id == prefill
        again = await s.p.next("open_prefill")
        assert words_of(again) == ("promptA", 6)
        s.p.end(prefill, worker_pb2.LEG_CANCELLED)
        s.p.start(again.leg_id)
        await s.decode[1].next("open_decode")
        assert s.d.commands.empty()  # the pair is avoided
        assert (await s.door.counters())["replays_handoff_failed"] == 1


async def test_a_request_that_was_sent_over_a_pair_before_it_failed_goes_to_another_instance(stage):
    async with stage(decode=2, mode="strict") as s:
        first = s.door.ask("first", max_tokens=2)
        _, decode = await opened(s, first)
        s.door.ask("second", max_tokens=2)  # is promised the other instance, the third one this one again
        await s.p.next("open_prefill")
        s.door.ask("third", max_tokens=2)
        late = (await s.p.next("open_prefill")).leg_id
        s.d.end(decode, worker_pb2.LEG_HANDOFF_FAILED, "cannot reach 127.0.0.1:1")
        await s.door.until(lambda info: info.counters.get("replays_handoff_failed") == 1)
        s.p.start(late)
        assert (await s.decode[1].next("open_decode")).HasField("ticket")
        assert s.d.commands.empty()


async def test_a_request_that_was_sent_over_the_only_pair_before_it_failed_is_prefilled_locally(stage):
    async with stage() as s:
        first, second = s.door.ask("first", max_tokens=3), s.door.ask("second", max_tokens=3)
        (first_prefill, late) = [(await s.p.next("open_prefill")).leg_id for _ in range(2)]
        s.p.start(first_prefill)
        s.p.tokens(first_prefill, 0, b"A")
        await first.text_is("A")
        s.d.end((await s.d.next("open_decode")).leg_id, worker_pb2.LEG_HANDOFF_FAILED, "cannot reach 127.0.0.1:1")
        assert not (await s.d.next("open_decode")).HasField("ticket")
        s.p.start(late)
        s.p.tokens(late, 0, b"A")
        await second.text_is("A")
        tried = await s.d.next("open_decode")
        assert tried.HasField("ticket")
        s.d.end(tried.leg_id, worker_pb2.LEG_HANDOFF_FAILED, "cannot reach 127.0.0.1:1")
        assert not (await s.d.next("open_decode")).HasField("ticket")
        assert (first.error, second.error) == (None, None)


async def test_where_no_pair_is_left_auto_prefills_locally(stage):
    async with stage() as s:
        answer = s.door.ask(max_tokens=3)
        prefill, decode = await opened(s, answer)
        s.d.end(decode, worker_pb2.LEG_HANDOFF_FAILED, "cannot reach 127.0.0.1:1")
        await s.p.next("cancel")
        s.p.end(prefill, worker_pb2.LEG_CANCELLED)
        again = await s.d.next("open_decode")
        assert not again.HasField("ticket")
        s.d.tokens(again.leg_id, 1, b"BC", LENGTH)
        s.d.end(again.leg_id)
        assert (await answer.finished()).decision_reason == "no_pair"
        await s.door.until_idle()


async def test_where_no_pair_is_left_strict_tries_again_later(stage):
    async with stage(mode="strict", waits=replace(WAITS, no_decode_s=10.0)) as s:
        answer = s.door.ask()
        prefill, decode = await opened(s, answer)
        s.d.end(decode, worker_pb2.LEG_HANDOFF_FAILED, "cannot reach 127.0.0.1:1")
        failed_s = time.monotonic()
        await s.p.next("cancel")
        s.p.end(prefill, worker_pb2.LEG_CANCELLED)
        await s.p.next("open_prefill")
        assert time.monotonic() - failed_s > 0.4
    async with stage(mode="strict") as s:  # and not for ever
        answer = s.door.ask()
        prefill, decode = await opened(s, answer)
        s.d.end(decode, worker_pb2.LEG_HANDOFF_FAILED, "cannot reach 127.0.0.1:1")
        await s.p.next("cancel")
        s.p.end(prefill, worker_pb2.LEG_CANCELLED)
        code, detail = await answer.failed()
        assert code == grpc.StatusCode.UNAVAILABLE
        assert f"({s.p.address}-{s.d.address} broken)" in detail


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
        prefill, decode = await opened(s, answer)
        s.d.hand_off(decode)
        assert (await s.d.next("cancel")).leg_id == decode
        assert (await s.p.next("cancel")).leg_id == prefill
        assert words_of(await s.p.next("open_prefill")) == ("promptA", 6)


async def test_an_instance_that_hangs_up_in_good_order_is_lost_and_linked_again(stage, caplog):
    async with stage() as s:
        await opened(s, s.door.ask())
        s.d.hang_up()
        await s.p.next("cancel")
        assert "it ended the link" in caplog.text
        await s.d.wait_linked()


async def test_a_message_of_another_incarnation_breaks_the_link(stage, caplog):
    async with stage() as s:
        await opened(s, s.door.ask())
        s.d.send(incarnation=99, load=worker_pb2.Load())
        await s.p.next("cancel")
        assert "a message of incarnation 99 came, 7 is linked" in caplog.text
        await s.door.until_states("ready", "ready")  # and it is linked again


async def test_parallel_arrays_of_unequal_length_break_the_link(stage, caplog):
    async with stage() as s:
        _, decode = await opened(s, s.door.ask())
        s.d.send(tokens=worker_pb2.StepTokens(leg_ids=[decode], indices=[1, 2], token_ids=[1], finish=[]))
        await s.p.next("cancel")
        assert "it sent a malformed message" in caplog.text


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
