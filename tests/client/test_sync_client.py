"""The synchronous client against a scripted router on loopback."""

import threading
from collections.abc import Iterator

import pytest
from support.scripted_router import ScriptedRouter

from biphase.client import (
    Cancelled,
    Client,
    DeadlinePassed,
    Delta,
    Internal,
    InvalidRequest,
    Overloaded,
    RequestExists,
    RequestNotFound,
    Unavailable,
    UnknownModel,
)
from biphase.protos.values import FinishReason

ENDED_WITHIN_S = 5.0


@pytest.fixture
def client(address: str) -> Iterator[Client]:
    with Client(address) as client:
        yield client


def test_answer_streams_and_leaves_a_result(client: Client) -> None:
    generation = client.generate("hello there", max_tokens=3, seed=7, request_id="mine")
    assert list(generation) == [
        Delta(text="Hello", token_ids=(1,), first_index=0),
        Delta(text=", wor", token_ids=(2,), first_index=1),
        Delta(text="ld", token_ids=(3,), first_index=2),
    ]
    assert generation.accepted is not None and generation.accepted.client_request_id == "mine"
    result = generation.result
    assert (result.text, result.token_ids, result.seed) == ("Hello, world", (1, 2, 3), 7)
    assert result.finish_reason is FinishReason.LENGTH
    assert (result.usage.prompt_tokens, result.usage.output_tokens) == (5, 3)
    assert (result.timeline.transfer_bytes, result.timeline.preemptions) == (4096, 2)
    assert (result.decision, result.decision_reason) == ("disaggregated", "prefill instance free")
    assert result.instances == ("prefill-0#1 (pid 11)", "decode-0#1 (pid 12)")
    assert result.ttft_ms > 0 and result.tpot_ms >= 0


def test_text_collects(client: Client) -> None:
    assert client.generate("hello").text() == "Hello, world"


def test_result_before_the_end_is_an_error(client: Client) -> None:
    with client.generate("hang") as generation, pytest.raises(RuntimeError, match="has not finished"):
        _ = generation.result


def test_break_cancels_on_the_server(client: Client, router: ScriptedRouter) -> None:
    generation = client.generate("hang")
    for piece in generation:
        assert piece.text == "first"
        break
    assert router.call_ended.wait(ENDED_WITHIN_S)


def test_leaving_the_with_block_cancels_on_the_server(client: Client, router: ScriptedRouter) -> None:
    with client.generate("hang") as generation:
        pieces = iter(generation)
        assert next(pieces).text == "first"
    assert router.call_ended.wait(ENDED_WITHIN_S)
    with pytest.raises(Cancelled, match="cancelled by this client"):
        next(pieces)


def test_an_exception_in_the_loop_cancels_on_the_server(client: Client, router: ScriptedRouter) -> None:
    with pytest.raises(KeyError):
        for piece in client.generate("hang"):
            raise KeyError(piece.text)
    assert router.call_ended.wait(ENDED_WITHIN_S)


def test_close_from_another_thread_ends_the_iteration(client: Client, router: ScriptedRouter) -> None:
    generation = client.generate("hang")
    pieces = iter(generation)
    next(pieces)
    closer = threading.Thread(target=generation.close)
    closer.start()
    with pytest.raises(Cancelled):
        next(pieces)
    closer.join()
    assert router.call_ended.wait(ENDED_WITHIN_S)


def test_closing_the_client_cancels_what_runs(address: str, router: ScriptedRouter) -> None:
    client = Client(address)
    pieces = iter(client.generate("hang"))
    next(pieces)
    client.close()
    assert router.call_ended.wait(ENDED_WITHIN_S)
    with pytest.raises(Cancelled):
        next(pieces)


def test_deadline(client: Client, router: ScriptedRouter) -> None:
    # long enough for the call to reach the router on a busy machine: else nothing would end there
    with pytest.raises(DeadlinePassed, match="no end within the deadline of 1.5 s"):
        client.generate("hang", timeout_s=1.5).text()
    assert router.call_ended.wait(ENDED_WITHIN_S)


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("INVALID_ARGUMENT", InvalidRequest),
        ("NOT_FOUND", UnknownModel),
        ("ALREADY_EXISTS", RequestExists),
        ("RESOURCE_EXHAUSTED", Overloaded),
        ("UNAVAILABLE", Unavailable),
        ("CANCELLED", Cancelled),
        ("INTERNAL", Internal),
    ],
)
def test_status_codes_come_back_as_errors(client: Client, code: str, error: type[Exception]) -> None:
    with pytest.raises(error) as caught:
        client.generate(f"refuse {code} the value is 9, the limit 8").text()
    assert type(caught.value) is error
    assert str(caught.value) == "the value is 9, the limit 8"


def test_a_message_above_the_limit_is_not_worth_another_try(client: Client) -> None:
    with pytest.raises(InvalidRequest, match=r"larger than max \(\d+ vs. 4194304\)") as caught:
        client.generate("x" * 5_000_000).text()
    assert not caught.value.retryable


def test_a_second_reading_raises_the_same_error(client: Client) -> None:
    generation = client.generate("refuse INTERNAL broken")
    for _ in range(2):
        with pytest.raises(Internal, match="broken"):
            list(generation)


def test_a_stream_without_an_end_is_an_error(client: Client) -> None:
    with pytest.raises(Internal, match="ended the stream before the end"):
        client.generate("cut").text()


def test_a_gap_in_the_output_is_an_error(client: Client) -> None:
    with pytest.raises(Internal, match="output index 2 where 1 was due"):
        client.generate("gap").text()


def test_an_unreachable_router_is_named() -> None:
    with Client("127.0.0.1:1") as client, pytest.raises(Unavailable, match="nothing listens at 127.0.0.1:1"):
        client.generate("hello").text()


def test_abort(client: Client, router: ScriptedRouter) -> None:
    client.abort("live")
    assert router.aborted == ["live"]
    with pytest.raises(RequestNotFound, match="no live request has the id 'gone'"):
        client.abort("gone")


def test_descriptions(client: Client) -> None:
    served = client.model_info()
    assert (served.model.name, served.model.eos_token_ids, served.has_chat_template) == ("m", (2,), True)
    info = client.server_info()
    assert (info.name, info.mode, info.counters) == ("router-0", "auto", {"live": 2})
    (instance,) = info.instances
    assert (instance.name, instance.role, instance.incarnation, instance.pid) == ("prefill-0", "prefill", 3, 11)
