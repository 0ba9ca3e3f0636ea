"""Requests that are refused for what they say: a status, one line, and the router serves on."""

import grpc
import pytest

from biphase.protos import router_pb2
from biphase.router.config import RequestLimits


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


async def test_a_prompt_that_no_context_can_hold_is_refused_before_it_is_tokenized(stage):
    async with stage() as s:
        code, detail = await s.door.ask("a" * 100_000).failed()
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert "100000 characters" in detail
