"""A request's way through the router, over real loopback gRPC with scripted instances."""

import grpc
import pytest

from biphase.protos import router_pb2, worker_pb2

STOP, LENGTH = 1, 2


async def test_prefill_and_decode_make_one_stream(stage):
    async with stage() as s:
        answer = s.door.ask("hello", max_tokens=4, temperature=0, seed=5, request_id="mine")
        accepted = await answer.accepted()
        assert accepted.request_id.startswith("req-")
        assert (accepted.client_request_id, accepted.seed, accepted.prompt_tokens) == ("mine", 5, 5)
        assert accepted.model == "toy"

        opened = await s.p.next("open_prefill")
        assert opened.request_id == accepted.request_id
        assert (opened.num_prompt_tokens, opened.sampling.max_tokens, opened.sampling.seed) == (5, 4, 5)
        s.p.start(opened.leg_id)
        decode = await s.d.next("open_decode")
        assert decode.ticket.kv_address == "127.0.0.1:1"
        assert (decode.pull_epoch, decode.token_ids) == (1, opened.token_ids)

        s.p.tokens(opened.leg_id, 0, b"A")
        await answer.text_is("A")  # straight from the prefill instance
        s.d.hand_off(decode.leg_id)
        s.p.end(opened.leg_id, prefill_ms=3.0, cached_tokens=2)
        s.d.tokens(decode.leg_id, 1, b"BCD", LENGTH)
        s.d.end(decode.leg_id, decode_ms=7.0, preemptions=1)

        finished = await answer.finished()
        assert answer.text == "ABCD"
        assert answer.token_ids == list(b"ABCD")
        assert finished.finish_reason == LENGTH
        usage = finished.usage
        assert (usage.prompt_tokens, usage.output_tokens, usage.cached_tokens) == (5, 4, 2)
        assert (finished.decision, finished.decision_reason) == ("disaggregated", "prefill_ready")
        assert (finished.prefill_instance, finished.decode_instance) == (s.p.label, s.d.label)
        assert finished.seed == 5
        timeline = finished.timeline
        assert (timeline.prefill_queue_ms, timeline.prefill_ms, timeline.transfer_bytes) == (1.5, 3.0, 4096)
        assert (timeline.transfer_ms, timeline.transfer_exposed_ms, timeline.decode_ms) == (2.0, 1.0, 7.0)
        assert timeline.preemptions == 1
        assert 0 < timeline.first_token_at_ms <= timeline.finished_at_ms
        counters = await s.door.until_idle()
        assert (counters["accepted"], counters["finished"]) == (1, 1)
        assert counters["decisions_disaggregated_prefill_ready"] == 1


async def test_local_when_there_is_no_prefill_instance(stage):
    async with stage(prefill=0, mode="strict") as s:
        answer = s.door.ask("hi", max_tokens=2)
        opened = await s.d.next("open_decode")
        assert not opened.HasField("ticket")
        s.d.tokens(opened.leg_id, 0, b"AB", LENGTH)
        s.d.end(opened.leg_id, queue_ms=4.0, prefill_ms=5.0, cached_tokens=1)
        finished = await answer.finished()
        assert answer.text == "AB"
        assert (finished.decision, finished.decision_reason) == ("local", "colocated")
        assert finished.prefill_instance == finished.decode_instance == s.d.label
        assert (finished.timeline.prefill_queue_ms, finished.timeline.prefill_ms) == (4.0, 5.0)
        assert finished.usage.cached_tokens == 1


async def test_a_single_token_uses_no_decode_instance(stage):
    async with stage() as s:
        answer = s.door.ask(max_tokens=1)
        opened = await s.p.next("open_prefill")
        s.p.start(opened.leg_id, ticket=False)
        s.p.tokens(opened.leg_id, 0, b"A", LENGTH)
        s.p.end(opened.leg_id)
        finished = await answer.finished()
        assert (answer.text, finished.decode_instance) == ("A", "")
        assert s.d.commands.empty()


async def test_a_first_token_that_ends_it_cancels_the_decode_leg(stage):
    async with stage() as s:
        answer = s.door.ask()
        prefill = (await s.p.next("open_prefill")).leg_id
        s.p.start(prefill)
        decode = (await s.d.next("open_decode")).leg_id
        s.p.tokens(prefill, 0, b"\0", STOP)
        s.p.end(prefill)
        cancelled = await s.d.next("cancel")
        assert (cancelled.leg_id, cancelled.unless_handed_off) == (decode, False)
        s.d.end(decode, worker_pb2.LEG_CANCELLED)
        finished = await answer.finished()
        assert (answer.text, answer.token_ids, finished.stop_reason) == ("", [0], "token:0")
        assert (finished.finish_reason, finished.usage.output_tokens) == (STOP, 1)
        await s.door.until_idle()


async def test_a_stop_string_across_tokens_ends_both_legs_and_cuts_usage(stage):
    async with stage() as s:
        answer = s.door.ask(stop=["END"])
        prefill = (await s.p.next("open_prefill")).leg_id
        s.p.start(prefill)
        decode = (await s.d.next("open_decode")).leg_id
        s.p.tokens(prefill, 0, b"A")
        s.d.hand_off(decode)
        s.d.tokens(decode, 1, b"BENDxy")
        for worker, leg in ((s.p, prefill), (s.d, decode)):
            assert (await worker.next("cancel")).leg_id == leg
            worker.end(leg, worker_pb2.LEG_CANCELLED)
        finished = await answer.finished()
        assert (answer.text, finished.stop_reason, finished.finish_reason) == ("AB", "END", STOP)
        assert (finished.usage.output_tokens, answer.token_ids) == (5, list(b"ABEND"))
        await s.door.until_idle()


async def test_the_last_reply_does_not_wait_long_for_figures(stage):
    async with stage() as s:
        answer = s.door.ask(stop=["END"])
        _, decode = await s.hand_over(answer)
        s.d.tokens(decode, 1, b"END")
        assert (await s.d.next("cancel")).leg_id == decode
        assert (await answer.finished()).usage.output_tokens == 4  # the leg has not ended yet
        assert (await s.door.counters())["legs"] == 1
        s.d.end(decode, worker_pb2.LEG_CANCELLED)
        await s.door.until_idle()


async def test_token_ids_and_chat_are_prompts_too(stage):
    async with stage(prefill=0) as s:
        s.door.ask(token_ids=router_pb2.TokenIds(ids=[3, 1, 2]))
        assert (await s.d.next("open_decode")).token_ids == b"\3\0\0\0\1\0\0\0\2\0\0\0"
        s.door.ask(chat=router_pb2.Chat(messages=[router_pb2.ChatMessage(role="user", content="hi")]))
        assert (await s.d.next("open_decode")).num_prompt_tokens == len("<user>hi")
        s.door.ask("x" * 5000, max_tokens=1)  # tokenized in a thread, then too long


async def test_a_seed_is_drawn_when_none_is_given(stage):
    async with stage(prefill=0) as s:
        first = await s.door.ask().accepted()
        second = await s.door.ask().accepted()
        assert first.seed != second.seed
        opened = await s.d.next("open_decode")
        assert opened.sampling.seed == first.seed


# ---- ids, Abort, information


async def test_a_live_clients_id_is_taken_and_free_again_at_the_end(stage):
    async with stage() as s:
        answer = s.door.ask(request_id="mine", max_tokens=2)
        await answer.accepted()
        code, detail = await s.door.ask(request_id="mine").failed()
        assert (code, detail) == (grpc.StatusCode.ALREADY_EXISTS, "request id 'mine' belongs to a live request")
        _, decode = await s.hand_over(answer)
        s.d.tokens(decode, 1, b"B", LENGTH)
        s.d.end(decode)
        await answer.finished()
        assert (await s.door.ask(request_id="mine").accepted()).client_request_id == "mine"


@pytest.mark.parametrize("by", ["client's id", "server's id"])
async def test_abort_by_either_id(stage, by):
    async with stage() as s:
        answer = s.door.ask(request_id="mine")
        accepted = await answer.accepted()
        _, decode = await s.hand_over(answer)
        await answer.text_is("A")
        either = "mine" if by == "client's id" else accepted.request_id
        await s.door.stub.Abort(router_pb2.AbortRequest(request_id=either))
        code, detail = await answer.failed()
        assert (code, detail) == (grpc.StatusCode.CANCELLED, f"{accepted.request_id} was aborted")
        assert (await s.d.next("cancel")).leg_id == decode
        with pytest.raises(grpc.aio.AioRpcError) as again:
            await s.door.stub.Abort(router_pb2.AbortRequest(request_id=either))
        assert again.value.code() == grpc.StatusCode.NOT_FOUND
        s.d.end(decode, worker_pb2.LEG_CANCELLED)
        assert (await s.door.until_idle())["cancelled"] == 1


async def test_abort_of_an_unknown_id(stage):
    async with stage() as s:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await s.door.stub.Abort(router_pb2.AbortRequest(request_id="nobody"))
        assert caught.value.code() == grpc.StatusCode.NOT_FOUND
        assert caught.value.details() == "no live request has the id 'nobody'"


async def test_information_about_model_and_instances(stage):
    async with stage(decode_values={"num_blocks": 30}) as s:
        s.p.load(queued_tokens=7, running=1)
        model = await s.door.stub.GetModelInfo(router_pb2.GetModelInfoRequest())
        assert (model.model.name, model.model.vocab_size, model.model.max_model_len) == ("toy", 256, 200)
        assert (model.max_output_tokens, model.has_chat_template) == (120, True)
        assert list(model.model.eos_token_ids) == [0]
        info = await s.door.info()
        assert (info.name, info.mode) == ("router-0", "auto")
        prefill, decode = info.instances
        assert (prefill.name, prefill.incarnation, prefill.address) == ("prefill-0", 7, s.p.address)
        assert (prefill.state, prefill.pid, decode.num_blocks, decode.block_size) == ("ready", 4242, 30, 4)
        assert {"tasks", "threads", "open_fds", "live_requests"} <= info.counters.keys()
