"""What an instance can hold, which requests can never fit it, and when an output is finished. Pure."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from biphase.protos.values import FinishReason, Sampling


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Fixed by model and pool. ``max_model_len``: tokens, prompt and output together."""

    vocab_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    num_blocks: int
    block_size: int

    def reason_against(self, token_ids: Sequence[int], num_prompt_tokens: int, sampling: Sampling) -> str | None:
        """One line on why this request can never run here, or None. ``token_ids``: the prompt, then forced output.

        The last token drawn is never computed, so a request needs KV of prompt + max_tokens - 1 tokens at most.
        """
        num_forced = len(token_ids) - num_prompt_tokens
        if num_prompt_tokens < 1:
            return f"the prompt has {num_prompt_tokens} tokens, at least 1 is needed"
        if num_forced < 0:
            return f"num_prompt_tokens is {num_prompt_tokens}, but only {len(token_ids)} tokens were sent"
        if num_forced >= sampling.max_tokens:
            return f"max_tokens is {sampling.max_tokens}, and {num_forced} output tokens are there already"
        largest = max(token_ids)
        if largest >= self.vocab_size:
            return f"token id {largest} is outside the vocabulary of {self.vocab_size}"
        needed = num_prompt_tokens + sampling.max_tokens - 1
        if needed > self.max_model_len:
            return f"prompt + max_tokens - 1 is {needed} tokens, the context holds {self.max_model_len}"
        needed_blocks = -(-needed // self.block_size)
        if needed_blocks > self.num_blocks:
            return f"prompt + max_tokens - 1 is {needed_blocks} blocks, the empty instance has {self.num_blocks}"
        return _reason_against_sampling(sampling)

    def finish_of(self, token_id: int, *, num_prompt: int, num_output: int, sampling: Sampling) -> FinishReason | None:
        """Whether ``token_id``, drawn as output token number ``num_output`` (counted from 1), ends the output."""
        if token_id in sampling.stop_token_ids or (token_id in self.eos_token_ids and not sampling.ignore_eos):
            return FinishReason.STOP
        if self.is_last(num_prompt=num_prompt, num_output=num_output, sampling=sampling):
            return FinishReason.LENGTH
        return None

    def is_last(self, *, num_prompt: int, num_output: int, sampling: Sampling) -> bool:
        """Whether output token number ``num_output`` is the last one, whatever it is."""
        return num_output >= sampling.max_tokens or num_prompt + num_output >= self.max_model_len

    def forbidden(self, output_index: int, sampling: Sampling) -> tuple[int, ...]:
        """Token ids that may not be drawn at this output index: those that would end it before min_tokens."""
        if output_index >= sampling.min_tokens:
            return ()
        return tuple(dict.fromkeys((*self.eos_token_ids, *sampling.stop_token_ids)))


def _reason_against_sampling(sampling: Sampling) -> str | None:
    """Numbers that no draw can be made with."""
    if not (math.isfinite(sampling.temperature) and sampling.temperature >= 0):
        return f"temperature is {sampling.temperature}, it must be a number from 0 up"
    for name in ("top_p", "min_p"):
        value = getattr(sampling, name)
        if not 0 <= value <= 1:
            return f"{name} is {value}, it must be from 0 to 1"
    return None
