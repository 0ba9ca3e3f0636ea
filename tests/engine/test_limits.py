"""What can never fit, and when an output ends."""

import pytest

from biphase.engine.limits import Limits
from biphase.protos.values import FinishReason, Sampling

LIMITS = Limits(vocab_size=100, max_model_len=64, eos_token_ids=(2,), num_blocks=4, block_size=8)


def test_what_fits_to_the_last_token_is_taken() -> None:
    assert LIMITS.reason_against([1] * 20, 20, Sampling(max_tokens=13)) is None


@pytest.mark.parametrize(
    ("token_ids", "num_prompt", "max_tokens", "reason"),
    [
        ([], 0, 4, "the prompt has 0 tokens, at least 1 is needed"),
        ([1, 2], 3, 4, "num_prompt_tokens is 3, but only 2 tokens were sent"),
        ([1], 1, 0, "max_tokens is 0, and 0 output tokens are there already"),
        ([1, 5, 5], 1, 2, "max_tokens is 2, and 2 output tokens are there already"),
        ([1, 100], 2, 4, "token id 100 is outside the vocabulary of 100"),
        ([1] * 20, 20, 46, "prompt + max_tokens - 1 is 65 tokens, the context holds 64"),
        ([1] * 20, 20, 14, "prompt + max_tokens - 1 is 5 blocks, the empty instance has 4"),
    ],
)
def test_what_can_never_fit_is_told_with_both_numbers(
    token_ids: list[int], num_prompt: int, max_tokens: int, reason: str
) -> None:
    assert LIMITS.reason_against(token_ids, num_prompt, Sampling(max_tokens=max_tokens)) == reason


@pytest.mark.parametrize(
    ("token", "num_output", "sampling", "finish"),
    [
        (5, 1, Sampling(max_tokens=3), None),
        (5, 3, Sampling(max_tokens=3), FinishReason.LENGTH),
        (2, 1, Sampling(max_tokens=3), FinishReason.STOP),
        (2, 3, Sampling(max_tokens=3), FinishReason.STOP),
        (2, 1, Sampling(max_tokens=3, ignore_eos=True), None),
        (2, 1, Sampling(max_tokens=3, ignore_eos=True, stop_token_ids=(2,)), FinishReason.STOP),
        (7, 1, Sampling(max_tokens=3, stop_token_ids=(6, 7)), FinishReason.STOP),
        (5, 24, Sampling(max_tokens=99), FinishReason.LENGTH),
    ],
)
def test_finish(token: int, num_output: int, sampling: Sampling, finish: FinishReason | None) -> None:
    assert LIMITS.finish_of(token, num_prompt=40, num_output=num_output, sampling=sampling) == finish


def test_ending_tokens_are_forbidden_until_min_tokens_are_out() -> None:
    sampling = Sampling(max_tokens=9, min_tokens=2, stop_token_ids=(7, 2))
    assert [LIMITS.forbidden(index, sampling) for index in range(3)] == [(2, 7), (2, 7), ()]
