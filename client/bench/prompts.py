"""What is asked: prompts of random tokens, or recorded ones whose answers are known. Pure but for the seeded generator."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from biphase.client.bench.arrivals import Arrival
from biphase.client.bench.tokens_file import Recorded
from biphase.protos.errors import SetupError

_SPECIAL_IDS = 100
"""The first ids are mostly control tokens; random prompts leave them out where the vocabulary allows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One request's prompt, how it is sampled, and its answer where that is known: at least ``max_tokens`` of it."""

    token_ids: Sequence[int]
    max_tokens: int
    temperature: float = 0.0
    seed: int | None = None
    answer: Sequence[int] | None = None


class Prompts(Protocol):
    """Makes each request's prompt when it is due."""

    def of(self, arrival: Arrival) -> Prompt: ...


class RandomPrompts:
    """Tokens drawn by (seed, salt, index of the request). Another salt gives the same load with other tokens.

    Lengths beyond what the model takes are cut to it, and counted: half of it for the prompt where both are too long.
    """

    def __init__(
        self, *, vocab_size: int, max_model_len: int, seed: int, salt: int = 0, temperature: float = 0.0
    ) -> None:
        self.num_cut = 0
        self._first = min(_SPECIAL_IDS, vocab_size // 2)
        self._vocab_size, self._max_model_len = vocab_size, max_model_len
        self._seed, self._salt, self._temperature = seed, salt, temperature

    def of(self, arrival: Arrival) -> Prompt:
        draws = random.Random(f"{self._seed}/{self._salt}/{arrival.index}")
        room = self._max_model_len
        num_input = min(arrival.input_tokens, max(room - arrival.output_tokens, room // 2))
        num_output = max(1, min(arrival.output_tokens, room - num_input))
        self.num_cut += (num_input, num_output) != (arrival.input_tokens, arrival.output_tokens)
        span = self._vocab_size - self._first
        return Prompt(
            token_ids=[self._first + int(draws.random() * span) for _ in range(num_input)],
            max_tokens=num_output,
            temperature=self._temperature,
            seed=draws.getrandbits(63) if self._temperature else None,
        )


class RecordedPrompts:
    """Recorded prompts in an order drawn by (seed, index), each with its answer.

    The recording's prompt closest to the wanted input length among a few drawn ones is taken; the output is as long as
    wanted, at most as recorded.
    """

    def __init__(self, recorded: Sequence[Recorded], *, seed: int, candidates: int = 1) -> None:
        if not recorded:
            raise SetupError("the recording holds no prompt that can be used")
        self._recorded, self._seed, self._candidates = recorded, seed, candidates

    def of(self, arrival: Arrival) -> Prompt:
        draws = random.Random(f"{self._seed}/{arrival.index}")
        drawn = [self._recorded[int(draws.random() * len(self._recorded))] for _ in range(self._candidates)]
        one = min(drawn, key=lambda found: abs(len(found.prompt_ids) - arrival.input_tokens))
        return Prompt(
            token_ids=one.prompt_ids,
            max_tokens=min(arrival.output_tokens, len(one.tokens)),
            temperature=one.temperature,
            seed=one.seed,
            answer=one.tokens,
        )
