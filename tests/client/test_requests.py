"""What a call's arguments become on the wire, and which of them are refused before they are sent."""

import pytest

from biphase.client.requests import generate_request, resolve_addresses
from biphase.protos.errors import InvalidRequest


def test_every_option_arrives() -> None:
    request = generate_request(
        "hi",
        None,
        None,
        {
            "max_tokens": 9,
            "temperature": 0.5,
            "top_p": 0.25,
            "top_k": 40,
            "min_p": 0.125,
            "seed": 2**64 - 1,
            "stop": ["a", "b"],
            "stop_token_ids": [5, 6],
            "min_tokens": 2,
            "ignore_eos": True,
            "request_id": "mine",
            "model": "m",
        },
    )
    sampling = request.sampling
    assert (request.text, request.request_id, request.model) == ("hi", "mine", "m")
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p, sampling.top_k) == (9, 0.5, 0.25, 40)
    assert (sampling.min_p, sampling.seed, sampling.min_tokens, sampling.ignore_eos) == (0.125, 2**64 - 1, 2, True)
    assert (list(sampling.stop), list(sampling.stop_token_ids)) == (["a", "b"], [5, 6])


def test_absent_options_stay_absent() -> None:
    sampling = generate_request("hi", None, None, {"temperature": None}).sampling
    assert not any(sampling.HasField(name) for name in ("temperature", "top_k", "top_p", "min_p", "seed", "max_tokens"))


def test_a_single_stop_string_is_one_stop_string() -> None:
    assert list(generate_request("hi", None, None, {"stop": "END"}).sampling.stop) == ["END"]


@pytest.mark.parametrize(
    "value", [{"prompt": ""}, {"token_ids": []}, {"messages": []}], ids=lambda value: next(iter(value))
)
def test_an_empty_prompt_is_sent_for_the_router_to_judge(value: dict[str, object]) -> None:
    kind = {"prompt": "text", "token_ids": "token_ids", "messages": "chat"}[next(iter(value))]
    arguments = {"prompt": None, "messages": None, "token_ids": None, **value}
    assert generate_request(**arguments, options={}).WhichOneof("prompt") == kind  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({}, r"exactly one of prompt, messages, token_ids \(given: none\)"),
        ({"prompt": "a", "token_ids": [1]}, r"given: prompt, token_ids"),
        ({"messages": [{"role": "user"}]}, r"messages\[0\] has the keys \['role'\]"),
        ({"token_ids": [1, -1]}, r"token_ids\[1\] is -1, outside the range"),
        ({"token_ids": [1, 2**32]}, r"token_ids\[1\] is 4294967296, outside the range"),
        ({"prompt": "\ud800"}, r"^prompt is no valid text: it holds a lone surrogate"),
        ({"prompt": "a", "options": {"max_tokens": 2**31}}, r"max_tokens is 2147483648, outside the range"),
        ({"prompt": "a", "options": {"seed": -1}}, r"seed is -1, outside the range"),
        ({"prompt": "a", "options": {"temperature": "hot"}}, r"temperature is 'hot', of the wrong type str"),
        ({"prompt": "a", "options": {"max_tokens": "7"}}, r"max_tokens is '7', of the wrong type str"),
        ({"prompt": "a", "options": {"stop_token_ids": 5}}, r"stop_token_ids is of the wrong type int"),
        ({"messages": "hello"}, r"messages is of the wrong type str, a sequence is needed"),
        ({"messages": ["hello"]}, r"messages\[0\] is of the wrong type str, not a mapping"),
        ({"token_ids": "hello"}, r"token_ids is of the wrong type str"),
        ({"prompt": "a", "options": {"stop": ["a", 3]}}, r"stop\[1\] is 3, of the wrong type int"),
        ({"prompt": "a", "options": {"beams": 4}}, r"unknown argument 'beams'; known: ignore_eos, "),
    ],
)
def test_what_no_message_can_hold_is_refused_in_one_line(arguments: dict[str, object], complaint: str) -> None:
    whole = {"prompt": None, "messages": None, "token_ids": None, "options": {}, **arguments}
    with pytest.raises(InvalidRequest, match=complaint) as caught:
        generate_request(**whole)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_address_comes_from_the_argument_then_the_environment_then_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BIPHASE_ADDRESS", raising=False)
    assert resolve_addresses(None) == ("127.0.0.1:8700",)
    monkeypatch.setenv("BIPHASE_ADDRESS", "somewhere:9")
    assert resolve_addresses(None) == ("somewhere:9",)
    assert resolve_addresses("[::1]:10") == ("[::1]:10",)


def test_several_addresses_come_with_commas_or_as_a_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BIPHASE_ADDRESS", "a:1, b:2")
    assert resolve_addresses(None) == ("a:1", "b:2")
    assert resolve_addresses(["b:2", "a:1", "b:2"]) == ("b:2", "a:1")
    with pytest.raises(InvalidRequest, match="address '' is not HOST:PORT"):
        resolve_addresses("a:1,")


def test_an_address_with_a_scheme_is_told_to_go_without() -> None:
    with pytest.raises(InvalidRequest, match="give it without http://, as in 'localhost:8700'"):
        resolve_addresses("http://localhost:8700")


@pytest.mark.parametrize(
    "address", ["localhost", "localhost:", ":8700", "localhost:http", "localhost:0", "localhost:65536"]
)
def test_an_address_without_a_port_is_refused(address: str) -> None:
    with pytest.raises(InvalidRequest, match="is not HOST:PORT"):
        resolve_addresses(address)
