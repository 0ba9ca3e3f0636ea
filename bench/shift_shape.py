"""What the load of bench/live_shift.py is: lengths and goals by what one instance of each phase can do. Pure.

An instance prefills so many tokens/s whatever waits. What it decodes depends on how many requests it does at once: a step takes
base + slope x requests, and the goal for TPOT says how many there may be. Its capacity is what comes out of that many; more of
them give more tokens, too late.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from biphase.client.bench.goals import Metric
from biphase.client.bench.measured import Measured


@dataclass(frozen=True, kw_only=True)
class DecodeStep:
    """Seconds of a decode step, by the requests in it."""

    base_s: float
    slope_s: float

    def most_at_once(self, goal_s: float) -> float:
        """Requests at which a step takes the goal; infinite where more of them cost nothing."""
        return (goal_s - self.base_s) / self.slope_s if self.slope_s > 0 else math.inf

    def capacity(self, goal_s: float) -> float:
        """Tokens/s of so many requests."""
        return self.most_at_once(goal_s) / goal_s


def decode_step(few: tuple[float, float], many: tuple[float, float]) -> DecodeStep:
    """Through two measurements of (requests at once, seconds a step)."""
    slope_s = (many[1] - few[1]) / (many[0] - few[0])
    return DecodeStep(base_s=few[1] - slope_s * few[0], slope_s=slope_s)


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What was chosen: lengths of the two kinds of phases, and the goals in ms."""

    input_tokens: int
    output_tokens: int
    goals: dict[Metric, float]
    prefill_rate: float
    """Prompt tokens/s of a prefill instance."""
    decode_rate: float
    """Tokens/s of a decode instance within the goal for TPOT, at ``decode_requests`` at once."""
    decode_requests: int


def length_for(capacity: float, num_instances: int, rate: float, headroom: float) -> int:
    """Tokens of each request so that ``rate`` requests/s leave so much of what the instances can do."""
    return int((1.0 - headroom) * num_instances * capacity / rate)


def tokens_between(measured: Sequence[Measured], begin_s: float, end_s: float) -> int:
    """Output tokens that came from ``begin_s`` to before ``end_s``."""
    return sum(sum(begin_s <= at_s < end_s for at_s in one.token_at_s) for one in measured)


TOGETHER_S = 0.1
"""First tokens of one step come within this."""


def first_tokens_per_s(measured: Sequence[Measured], begin_s: float, end_s: float) -> float:
    """Of those from ``begin_s`` to before ``end_s``. Prompts end by steps of several, so that three or four steps may fall into
    it: the first step's only begin the time, which ends with the last one."""
    times = sorted(one.token_at_s[0] for one in measured if one.token_at_s and begin_s <= one.token_at_s[0] < end_s)
    later = [at_s for at_s in times if at_s > times[0] + TOGETHER_S]
    return len(later) / (later[-1] - times[0]) if later else len(times) / (end_s - begin_s)
