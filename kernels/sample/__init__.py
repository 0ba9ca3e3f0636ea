"""Choosing the next token of each row of logits: greedy, or a seeded draw from what the filters leave."""

from biphase.kernels.sample.filters import keep_candidates
from biphase.kernels.sample.noise import GumbelBits, gumbel
from biphase.kernels.sample.reference import philox4x64, sample_reference
from biphase.kernels.sample.torch_cpu import DrawRow, sample

__all__ = ["DrawRow", "GumbelBits", "gumbel", "keep_candidates", "philox4x64", "sample", "sample_reference"]
