"""What was measured of each request. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from biphase.client.bench.goals import Goals, Metric

DONE = "DONE"
NOT_SENT = "NOT_SENT"
"""The kind of a request that the bound on requests in flight kept back."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One request. Times are seconds since the load began, by the client's clock.

    ``kind`` is DONE, NOT_SENT or the name of the gRPC status that it ended with; ``wrong`` says that its tokens are not
    those recorded.
    """

    index: int
    phase: int
    due_s: float
    """When it was to be sent; what it was sent later is the generator's own fault."""
    sent_s: float
    ended_s: float
    token_at_s: Sequence[float]
    """When each output token came; those of one message came together."""
    input_tokens: int
    asked_tokens: int
    kind: str
    detail: str = ""
    checked: bool = False
    wrong: bool = False
    replays: int = 0
    decision: str = ""
    prefill_instance: str = ""
    decode_instance: str = ""
    address: str = ""
    prefill_ms: float = 0.0
    """First chunk scheduled to first token sampled, by the instance's clock."""

    @property
    def done(self) -> bool:
        return self.kind == DONE

    @property
    def output_tokens(self) -> int:
        return len(self.token_at_s)

    @property
    def ttft_ms(self) -> float | None:
        return 1e3 * (self.token_at_s[0] - self.sent_s) if self.token_at_s else None

    @property
    def tpot_ms(self) -> float | None:
        """None below two tokens."""
        if len(self.token_at_s) < 2:
            return None
        return 1e3 * (self.token_at_s[-1] - self.token_at_s[0]) / (len(self.token_at_s) - 1)

    @property
    def itl_ms(self) -> list[float]:
        """Each gap between two tokens; 0 between those that came in one message."""
        return [1e3 * (later - earlier) for earlier, later in pairwise(self.token_at_s)]

    @property
    def e2e_ms(self) -> float:
        return 1e3 * (self.ended_s - self.sent_s)

    def value(self, metric: Metric) -> float | None:
        """The figure that a goal on ``metric`` is about; None where the request has none."""
        match metric:
            case "ttft":
                return self.ttft_ms
            case "tpot":
                return self.tpot_ms
            case "itl":
                return max(self.itl_ms, default=None)
            case "e2e":
                return self.e2e_ms

    def meets(self, goals: Goals) -> bool:
        """Whether it is done, not wrong, and within all ``goals``. A single token has no TPOT and fails none on it."""
        if not self.done or self.wrong:
            return False
        values = ((self.value(metric), bound) for metric, bound in goals.items())
        return all(value is None or value <= bound for value, bound in values)
