"""A request's way through the router, over real loopback gRPC with scripted instances."""

import asyncio

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
