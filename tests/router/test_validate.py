"""Bad input: each gets one line that names the value and the limit."""

import math
from typing import Any

import pytest

from biphase.protos.errors import BiphaseError, InvalidRequest, UnknownModel
from biphase.protos.values import Sampling
from biphase.router.config import RequestLimits
from biphase.router.validate import Asked, AskedSampling, Capacity, check_asked, resolve

CAPACITY = Capacity(vocab_size=100, max_model_len=64, num_blocks=8, block_size=8)


def check(asked: Asked, **values: Any) -> None:
    check_asked(asked, **{"served_name": "toy", "limits": RequestLimits(), "has_chat_template": True, **values})


def resolved(prompt: int = 4, capacity: Capacity = CAPACITY, defaults: Any = None, **asked: Any) -> Sampling:
    return resolve(
        AskedSampling(**asked),
        [1] * prompt,
        capacity=capacity,
        limits=RequestLimits(),
        model_defaults=defaults or {},
        drawn_seed=77,
    )


def test_what_is_right_passes() -> None:
    check(Asked(text="hi"))
    check(Asked(token_ids=(1,), model="toy", request_id="mine"))
    check(Asked(chat=(("user", ""),), sampling=AskedSampling(temperature=0.0, top_p=1.0, min_p=1.0, stop=("x",) * 16)))


@pytest.mark.parametrize(
    ("asked", "kind", "line"),
    [
        (Asked(text="x", model="other"), UnknownModel, "model 'other' is not served here; 'toy' is"),
        (Asked(), InvalidRequest, "no prompt was given; one of text, token_ids, chat is needed"),
        (Asked(text=""), InvalidRequest, "the prompt's text is empty, at least 1 token is needed"),
        (Asked(token_ids=()), InvalidRequest, "the prompt has 0 token ids, at least 1 is needed"),
        (Asked(chat=()), InvalidRequest, "the chat has 0 messages, at least 1 is needed"),
        (
            Asked(chat=(("user", "x"), ("", "x"))),
            InvalidRequest,
            "chat message 1 has an empty role; system, user and assistant are common ones",
        ),
        (Asked(text="x", request_id="i" * 129), InvalidRequest, "request_id has 129 characters, the limit is 128"),
        (Asked(text="x", request_id="a\nb"), InvalidRequest, "request_id has characters that cannot be printed"),
    ],
)
def test_a_bad_prompt_or_name(asked: Asked, kind: type[BiphaseError], line: str) -> None:
    with pytest.raises(kind) as caught:
        check(asked)
    assert str(caught.value) == line
    assert type(caught.value) is kind


@pytest.mark.parametrize(
    ("sampling", "line"),
    [
        ({"temperature": -0.5}, "temperature is -0.5, it has to be at least 0 and finite"),
        ({"temperature": math.nan}, "temperature is nan, it has to be at least 0 and finite"),
        ({"temperature": math.inf}, "temperature is inf, it has to be at least 0 and finite"),
        ({"top_p": 0.0}, "top_p is 0, it has to be within (0, 1]"),
        ({"top_p": 1.01}, "top_p is 1.01, it has to be within (0, 1]"),
        ({"top_p": math.nan}, "top_p is nan, it has to be within (0, 1]"),
        ({"min_p": -0.1}, "min_p is -0.1, it has to be within [0, 1]"),
        ({"min_p": 1.5}, "min_p is 1.5, it has to be within [0, 1]"),
        ({"top_k": -1}, "top_k is -1, at least 0 (off) is needed"),
        ({"max_tokens": 0}, "max_tokens is 0, at least 1 is needed"),
        ({"max_tokens": -3}, "max_tokens is -3, at least 1 is needed"),
        ({"min_tokens": -1}, "min_tokens is -1, at least 0 is needed"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens is 5, above max_tokens, which is 4"),
        ({"stop": ("x",) * 17}, "17 stop strings were given, the limit is 16"),
        ({"stop": ("ok", "")}, "stop string 1 is empty, at least 1 character is needed"),
        ({"stop": ("y" * 257,)}, "stop string 0 has 257 characters, the limit is 256"),
    ],
)
def test_bad_sampling(sampling: dict[str, Any], line: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check(Asked(text="x", sampling=AskedSampling(**sampling)))
    assert str(caught.value) == line


def test_chat_without_a_template() -> None:
    with pytest.raises(InvalidRequest, match="the model has no chat template; send text or token ids"):
        check(Asked(chat=(("user", "x"),)), has_chat_template=False)


def test_a_long_model_name_is_not_echoed_whole() -> None:
    with pytest.raises(UnknownModel) as caught:
        check(Asked(text="x", model="m" * 5000))
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("prompt", "asked", "line"),
    [
        (0, {}, "the prompt has 0 tokens, at least 1 is needed"),
        (65, {}, "the prompt has 65 tokens, the context holds 64"),
        (60, {"max_tokens": 6}, "prompt + max_tokens - 1 is 60 + 6 - 1 = 65 tokens, the context holds 64"),
        (4, {"min_tokens": 61}, "min_tokens is 61, but the context of 64 leaves 60 after 4 prompt tokens"),
        (4, {"stop_token_ids": (3, 100)}, "stop token id 100 is outside the vocabulary of 100"),
        (4, {"stop_token_ids": (3,) * 257}, "257 stop token ids were given, the limit is 256"),
    ],
)
def test_what_the_deployment_cannot_hold(prompt: int, asked: dict[str, Any], line: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        resolved(prompt, **asked)
    assert str(caught.value) == line


def test_beyond_the_blocks_of_the_largest_instance() -> None:
    small = Capacity(vocab_size=100, max_model_len=64, num_blocks=4, block_size=8)
    assert resolved(20, small, max_tokens=13).max_tokens == 13
    with pytest.raises(InvalidRequest) as caught:
        resolved(20, small, max_tokens=14)
    assert str(caught.value) == (
        "prompt + max_tokens - 1 is 20 + 14 - 1 = 33 tokens or 5 blocks of 8, the largest instance has 4"
    )


def test_a_token_id_outside_the_vocabulary() -> None:
    with pytest.raises(InvalidRequest, match=r"^the prompt's token id 100 is outside the vocabulary of 100$"):
        resolve(
            AskedSampling(),
            [1, 100],
            capacity=CAPACITY,
            limits=RequestLimits(),
            model_defaults={},
            drawn_seed=0,
        )


def test_defaults_are_the_models_then_ours() -> None:
    assert resolved() == Sampling(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=77, max_tokens=60)
    mild = resolved(defaults={"temperature": 0.6, "top_k": 20.0, "top_p": 0.9})
    assert (mild.temperature, mild.top_k, mild.top_p) == (0.6, 20, 0.9)
    asked = resolved(defaults={"temperature": 0.6}, temperature=0.0, seed=0)
    assert (asked.temperature, asked.seed) == (0.0, 0)


def test_max_tokens_by_default_is_what_is_left_up_to_the_limit() -> None:
    assert resolved(4, Capacity(vocab_size=100, max_model_len=1000)).max_tokens == 256
    assert resolved(4, Capacity(vocab_size=100, max_model_len=1000), min_tokens=300).max_tokens == 300
    assert resolved(64).max_tokens == 1
    assert resolved(20, Capacity(vocab_size=100, max_model_len=64, num_blocks=3, block_size=8)).max_tokens == 5
