"""A request's way through the router, over real loopback gRPC with scripted instances."""

import contextlib
from dataclasses import replace

import grpc
import pytest

from biphase.protos import router_pb2, router_pb2_grpc, worker_pb2
from biphase.router.config import RequestLimits, Waits

HUGE = {"max_model_len": 1_000_000, "num_blocks": 1_000_000}
SHORT_WAITS = Waits(leg_end_s=0.3, drain_s=0.3)

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


async def through_p(s, answer, text=b"A", *, p=None, d=None):
    """Prefill done and handed off; returns both leg ids."""
    p, d = p or s.p, d or s.d
    await answer.accepted()
    prefill = (await p.next("open_prefill")).leg_id
    p.start(prefill)
    decode = (await d.next("open_decode")).leg_id
    p.tokens(prefill, 0, text)
    d.hand_off(decode)
    p.end(prefill)
    return prefill, decode


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
        _, decode = await through_p(s, answer)
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
        _, decode = await through_p(s, answer)
        s.d.tokens(decode, 1, b"B", LENGTH)
        s.d.end(decode)
        await answer.finished()
        assert (await s.door.ask(request_id="mine").accepted()).client_request_id == "mine"


@pytest.mark.parametrize("by", ["client's id", "server's id"])
async def test_abort_by_either_id(stage, by):
    async with stage() as s:
        answer = s.door.ask(request_id="mine")
        accepted = await answer.accepted()
        _, decode = await through_p(s, answer)
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


# ---- bad input over the wire


@pytest.mark.parametrize(
    ("request_", "code", "line"),
    [
        ({"text": ""}, "INVALID_ARGUMENT", "the prompt's text is empty, at least 1 token is needed"),
        ({"max_tokens": 0}, "INVALID_ARGUMENT", "max_tokens is 0, at least 1 is needed"),
        ({"temperature": float("nan")}, "INVALID_ARGUMENT", "temperature is nan, it has to be at least 0 and finite"),
        ({"text": "x" * 201}, "INVALID_ARGUMENT", "the prompt has 201 tokens, the context holds 200"),
        (
            {"token_ids": router_pb2.TokenIds(ids=[1, 256])},
            "INVALID_ARGUMENT",
            "the prompt's token id 256 is outside the vocabulary of 256",
        ),
        ({"model": "gpt"}, "NOT_FOUND", "model 'gpt' is not served here; 'toy' is"),
        ({"stop": ["s"] * 17}, "INVALID_ARGUMENT", "17 stop strings were given, the limit is 16"),
    ],
)
async def test_bad_input_gets_a_status_and_one_line(stage, request_, code, line):
    async with stage() as s:
        status, detail = await s.door.ask(**request_).failed()
        assert (status.name, detail) == (code, line)
        counters = await s.door.until_idle()
        assert (counters["accepted"], counters[f"refused_{code.lower()}"]) == (0, 1)
        assert s.p.commands.empty()


async def test_bytes_that_are_no_message_and_messages_above_the_limit(stage):
    async with stage(limits=RequestLimits(max_message_bytes=10_000)) as s:
        async with grpc.aio.insecure_channel(s.door.address) as channel:
            raw = channel.unary_stream("/biphase.v1.Router/Generate")
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await raw(b"\xff\xff\xff").read()
            assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
            assert "3 bytes received are no GenerateRequest" in caught.value.details()
            not_utf8 = b"\x1a\x02\xc3\x28"  # field 3 (text), two bytes
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await raw(not_utf8).read()
            assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await raw(router_pb2.GenerateRequest(text="x" * 20_000).SerializeToString()).read()
            assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        answer = s.door.ask(max_tokens=1)  # it goes on serving
        await s.p.next("open_prefill")
        await answer.accepted()


async def test_no_prompt_and_chat_without_a_template(stage, toy_tokenizer):
    toy_tokenizer.has_chat_template = False
    async with stage() as s:
        call = s.door.stub.Generate(router_pb2.GenerateRequest())
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
        assert caught.value.details() == "no prompt was given; one of text, token_ids, chat is needed"
        chat = router_pb2.Chat(messages=[router_pb2.ChatMessage(role="user", content="x")])
        code, _ = await s.door.ask(chat=chat).failed()
        assert code == grpc.StatusCode.INVALID_ARGUMENT


# ---- the queue


async def test_requests_wait_in_order_and_the_queue_is_bounded(stage):
    limits = RequestLimits(max_queued_requests=2)
    async with stage(limits=limits, decode_values={"max_num_seqs": 1}) as s:
        running = s.door.ask("running", max_tokens=2)
        _, decode = await through_p(s, running)
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
    async with stage(prefill=2, waits=replace(SHORT_WAITS, busy_retry_s=60)) as s:
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


async def test_a_draining_instance_gets_nothing_new(stage):
    async with stage(prefill=2) as s:
        s.prefill[0].load(draining=True)
        await s.door.until_states("draining", "ready", "ready")
        s.door.ask(max_tokens=2)
        await s.prefill[1].next("open_prefill")
        assert s.prefill[0].commands.empty()


# ---- slow readers, deadlines, clients that go


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
            _, decode = await through_p(s, answer)
        code, _ = await answer.failed()
        assert code == grpc.StatusCode.DEADLINE_EXCEEDED
        if phase == "decoding":
            assert (await s.d.next("cancel")).leg_id == decode
            s.d.end(decode, worker_pb2.LEG_CANCELLED)
        await s.door.until_idle()


async def test_legs_that_never_end_are_given_up(stage):
    async with stage() as s:
        answer = s.door.ask()
        await through_p(s, answer)
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


async def test_a_prompt_that_no_context_can_hold_is_refused_before_it_is_tokenized(stage):
    async with stage() as s:
        code, detail = await s.door.ask("a" * 100_000).failed()
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert "100000 characters" in detail
