"""The latency model of one engine step: its formula and coefficients. Workers fit and report it, others plan with it. Pure.

seconds = fixed_s + per_token_s * new tokens + per_context_s * tokens attended to, the last summed over all new tokens: a
chunk of n tokens that begins at position p attends to n * p + n * (n + 1) / 2 of them, one decoded token to its whole context.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTime:
    """``num_steps``: how many it was fitted on; 0 says that nothing is known yet."""

    fixed_s: float = 0.0
    per_token_s: float = 0.0
    per_context_s: float = 0.0
    num_steps: int = 0

    def seconds(self, new_tokens: float, context_tokens: float) -> float:
        """What one step of this work takes."""
        return self.fixed_s + self.per_token_s * new_tokens + self.per_context_s * context_tokens

    @property
    def is_known(self) -> bool:
        """Whether it can be planned with: fitted, no coefficient negative or beyond number, and some cost at all."""
        parts = (self.fixed_s, self.per_token_s, self.per_context_s)
        return self.num_steps > 0 and all(math.isfinite(part) and part >= 0 for part in parts) and sum(parts) > 0


@dataclass(frozen=True, slots=True, kw_only=True)
class RecentSteps:
    """The steps of the last seconds, summed: what they took and their work, for comparing instances at equal work."""

    num_steps: int = 0
    seconds: float = 0.0
    tokens: int = 0
    context_tokens: int = 0

    def expected_s(self, by: StepTime) -> float:
        """What these steps would have taken an instance of step time ``by``."""
        return self.num_steps * by.fixed_s + by.per_token_s * self.tokens + by.per_context_s * self.context_tokens


def attended(start: int, count: int) -> int:
    """Tokens that ``count`` new ones from position ``start`` attend to, themselves included."""
    return count * start + count * (count + 1) // 2
