"""The bound of a displaced stream's pause: how much has to be prefilled again, and how fast prompts are prefilled. Pure.

The rate is that of one prefilling instance while it prefills, under a load: prompt tokens by the seconds in which it had one
or more of them in work. A prompt is in work from its first chunk to its first token; its wait before that is not, and seconds
shared by several prompts count once.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence

from biphase.client.bench.measured import Measured

SLACK_S = 1.0


def prefill_rate(measured: Iterable[Measured]) -> float:
    """Prompt tokens/s of one instance while it prefills; NaN when nothing was prefilled."""
    tokens, spans = 0, defaultdict(list)
    for one in measured:
        if one.done and one.token_at_s and one.prefill_ms > 0:
            tokens += one.input_tokens
            first_s = one.token_at_s[0]
            spans[one.prefill_instance].append((first_s - one.prefill_ms / 1e3, first_s))
    busy_s = sum(covered_s(mine) for mine in spans.values())
    return tokens / busy_s if busy_s else math.nan


def covered_s(spans: Sequence[tuple[float, float]]) -> float:
    """Seconds that lie in at least one of the (begin, end)."""
    found, until_s = 0.0, -math.inf
    for begin_s, end_s in sorted(spans):
        found += max(0.0, end_s - max(begin_s, until_s))
        until_s = max(until_s, end_s)
    return found


def tokens_again(displaced: Iterable[Measured], at_s: float) -> int:
    """What whoever takes over streams that were cut off at ``at_s`` prefills: their prompts and what they had emitted."""
    return sum(one.input_tokens + sum(token_s <= at_s for token_s in one.token_at_s) for one in displaced)


def gap_bound_s(seen_s: float, displaced_tokens: int, rate: float) -> float:
    """Detection + displaced tokens / prefill rate + 1 s; NaN when one of them is unknown."""
    return seen_s + displaced_tokens / rate + SLACK_S
