"""What a request must reach to count as good, as in ``ttft:500 tpot:50``, in milliseconds. Pure."""

import difflib
import math
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

from biphase.protos.errors import SetupError

Metric = Literal["ttft", "tpot", "itl", "e2e"]
Goals = Mapping[Metric, float]
"""Most milliseconds per metric; of ``itl`` for the longest gap of the request."""


def parse_goals(words: Sequence[str], name: str = "--goodput") -> dict[Metric, float]:
    """Raises SetupError for an unknown metric, one given twice, or a bound that is not above 0."""
    goals: dict[Metric, float] = {}
    for word in words:
        key, _, number = word.partition(":")
        metric = next((known for known in get_args(Metric) if known == key), None)
        if metric is None:
            near = difflib.get_close_matches(key, get_args(Metric), n=1, cutoff=0.3)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(get_args(Metric))}"
            raise SetupError(f"{name}: unknown metric {key!r}: {hint}")
        try:
            bound = float(number)
        except ValueError:
            bound = math.nan
        if not 0 < bound < math.inf:
            raise SetupError(f"{name}: {word!r} is not METRIC:MILLISECONDS with a finite number above 0")
        if metric in goals:
            raise SetupError(f"{name}: {metric} is given twice")
        goals[metric] = bound
    return goals
