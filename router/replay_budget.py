"""How much of the prefilling capacity replays may take at a time. Pure.

Replays go first: their clients are in mid-sentence. But a mass loss displaces more tokens than prefill can compute in
seconds, and what is new has to go on beside it; so replays may hold only a share of what the prefilling instances queue.
"""

from biphase.protos.ids import RequestId

UNKNOWN_QUEUE_TOKENS = 1024
"""What an instance queues that does not say."""


class ReplayBudget:
    """Owned by the dispatcher. A replay holds its tokens from its dispatch to its first new token."""

    def __init__(self, share: float) -> None:
        self.share = share
        self._held: dict[RequestId, int] = {}

    def allows(self, tokens: int, capacity_tokens: int) -> bool:
        """Whether so many more may be prefilled again now. One at a time always may, whatever its length."""
        return not self._held or self.held_tokens + tokens <= self.share * capacity_tokens

    def take(self, request_id: RequestId, tokens: int) -> None:
        self._held[request_id] = tokens

    def give_back(self, request_id: RequestId) -> bool:
        """It goes on, or waits again, or has ended; whether it held anything."""
        return self._held.pop(request_id, None) is not None

    @property
    def held_tokens(self) -> int:
        return sum(self._held.values())

    def __repr__(self) -> str:
        return f"<ReplayBudget [{len(self._held)} replays, {self.held_tokens} tokens]>"
