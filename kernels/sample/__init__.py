"""Choosing the next token of each row of logits: greedy, or a seeded draw from what the filters leave."""

from biphase.kernels.sample.draw_row import MAX_TOP_LOGPROBS, Drawn, DrawRow
from biphase.kernels.sample.edits import allowed_tokens, allowed_words
from biphase.kernels.sample.filters import keep_candidates
from biphase.kernels.sample.noise import GumbelBits, gumbel
from biphase.kernels.sample.reference import philox4x64, sample_reference
from biphase.kernels.sample.torch_cpu import sample, sample_with_logprobs

__all__ = [
    "MAX_TOP_LOGPROBS",
    "DrawRow",
    "Drawn",
    "GumbelBits",
    "allowed_tokens",
    "allowed_words",
    "gumbel",
    "keep_candidates",
    "philox4x64",
    "sample",
    "sample_reference",
    "sample_with_logprobs",
]
