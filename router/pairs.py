"""Pairs of instances between which KV does not come through, though the router sees both. Pure: time comes in.

A pair that failed is left alone for a while, longer after every failure. Then one request may try it: until that one's
handoff is known the pair counts as broken still. What becomes known of an instance's own end clears its pairs.
"""

from dataclasses import dataclass

from biphase.protos.ids import RequestId
from biphase.router.view import InstanceKey, Pair

FIRST_BACKOFF_S, LAST_BACKOFF_S = 0.5, 30.0


@dataclass(slots=True, kw_only=True)
class _Trouble:
    failures: int
    retry_s: float
    detail: str
    on_trial: RequestId | None = None
    """The request that tries it."""


class PairTable:
    """Owned by the fleet."""

    def __init__(self) -> None:
        self._troubles: dict[Pair, _Trouble] = {}

    def failed(self, pair: Pair, detail: str, now_s: float) -> None:
        """A handoff between them failed. Of those that were under way together the first counts."""
        known = self._troubles.get(pair)
        if known is not None and known.on_trial is None:
            known.detail = detail
            return
        failures = 1 if known is None else known.failures + 1
        self._troubles[pair] = _Trouble(failures=failures, retry_s=now_s + backoff_s(failures), detail=detail)

    def tried(self, pair: Pair, request: RequestId, now_s: float) -> None:
        """A request is on its way over this pair: where it had failed, nobody else tries before that is decided."""
        known = self._troubles.get(pair)
        if known is not None:
            known.retry_s, known.on_trial = now_s + backoff_s(known.failures), request

    def is_open_to(self, pair: Pair, request: RequestId) -> bool:
        """Whether a request that was sent this way may go on so: the pair has not failed since, or it is the one that tries."""
        known = self._troubles.get(pair)
        return known is None or known.on_trial == request

    def worked(self, pair: Pair) -> None:
        """A handoff between them was complete."""
        self._troubles.pop(pair, None)

    def forget(self, instance: InstanceKey) -> None:
        """It has another life, or none: what failed may have been its end."""
        for pair in [pair for pair in self._troubles if instance in (pair.prefill, pair.decode)]:
            del self._troubles[pair]

    def broken(self, now_s: float) -> frozenset[Pair]:
        """Those that may not be used now."""
        return frozenset(pair for pair, trouble in self._troubles.items() if now_s < trouble.retry_s)

    def next_retry_s(self, now_s: float) -> float | None:
        """When the first of the broken ones may be tried."""
        return min((one.retry_s for one in self._troubles.values() if now_s < one.retry_s), default=None)

    def troubles(self) -> list[tuple[Pair, str]]:
        """All that failed last, for the report."""
        return [
            (pair, f"{trouble.failures} handoffs failed, the last: {trouble.detail}")
            for pair, trouble in sorted(self._troubles.items(), key=lambda item: (item[0].prefill, item[0].decode))
        ]

    def __repr__(self) -> str:
        return f"<PairTable [{len(self._troubles)} troubled]>"


def backoff_s(failures: int) -> float:
    """How long a pair is left alone after so many failures in a row."""
    return min(FIRST_BACKOFF_S * 2.0 ** min(failures - 1, 16), LAST_BACKOFF_S)
