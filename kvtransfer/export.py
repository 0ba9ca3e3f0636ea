"""One ticket of a prefill rank, from open until its blocks are back: what is computed, who reads, its lease. Pure.

Knows no other ticket, no pool and no other rank; the table does (kvtransfer/exports.py).
"""

import math
from dataclasses import dataclass, field

from biphase.kvtransfer.tickets import ExportEnded, Outcome, Pull, Readable, short
from biphase.protos.ids import BlockId, TicketId


@dataclass(slots=True, kw_only=True)
class Export:
    """Owned by the table. ``reading``: open pulls by other rank; ``sending``: other ranks whose sends have not ended."""

    ticket: TicketId
    blocks: tuple[BlockId, ...]
    num_tokens: int
    computed_tokens: int = 0
    ahead_tokens: int = 0
    ahead_layers: int = 0
    first_token: int | None = None
    finished_s: float = 0.0
    leg_open: bool = True
    lease_end_s: float = math.inf
    epoch: int = 0
    epoch_began_s: float | None = None
    epoch_bytes: int = 0
    arrived_bytes: int = 0
    pulls: set[Pull] = field(default_factory=set)
    running_sends: int = 0
    reading: dict[int, int] = field(default_factory=dict)
    sending: set[int] = field(default_factory=set)
    outcome: Outcome | None = None
    ended_s: float = 0.0

    # What is computed.

    def computed(self, tokens: int) -> None:
        """Positions below ``tokens``, in all layers. Never goes back."""
        self._check(tokens)
        self.computed_tokens = max(self.computed_tokens, tokens)

    def computed_ahead(self, tokens: int, layers: int) -> None:
        """Positions below ``tokens``, more than in all layers, in the first ``layers`` of them."""
        self._check(tokens)
        if tokens != self.ahead_tokens:
            self.ahead_tokens, self.ahead_layers = tokens, 0
        self.ahead_layers = max(self.ahead_layers, layers)

    def finish(self, first_token: int, now_s: float) -> None:
        """Everything is computed and token 0 sampled."""
        self.computed_tokens = self.num_tokens
        self.first_token = first_token
        self.finished_s = now_s

    @property
    def readable(self) -> Readable:
        ahead_layers = self.ahead_layers if self.ahead_tokens > self.computed_tokens else 0
        return Readable(
            tokens=self.computed_tokens,
            ahead_tokens=self.ahead_tokens if ahead_layers else self.computed_tokens,
            ahead_layers=ahead_layers,
        )

    def _check(self, tokens: int) -> None:
        if tokens > self.num_tokens:
            raise ValueError(f"{tokens} tokens computed of ticket {short(self.ticket)} over {self.num_tokens}")

    # Its readers and its lease.

    def begin_epoch(self, epoch: int, now_s: float) -> None:
        """Readers of older ones have given way."""
        self.epoch = epoch
        self.epoch_began_s = now_s
        self.epoch_bytes = 0

    def stop_lease(self) -> None:
        """Somebody reads."""
        self.lease_end_s = math.inf

    def judge_lease(self, now_s: float, lease_s: float) -> None:
        """It begins to count, unless it does already, where the leg is gone and nobody reads."""
        read = bool(self.pulls) or any(self.reading.values())
        if not self.leg_open and not read and self.lease_end_s == math.inf:
            self.lease_end_s = now_s + lease_s

    # Its end.

    @property
    def live(self) -> bool:
        return self.outcome is None

    @property
    def settled(self) -> bool:
        """Nothing reads its blocks any more, on any rank."""
        return self.outcome is not None and self.running_sends == 0 and not self.sending

    def report(self) -> ExportEnded:
        assert self.outcome is not None
        began_s = self.ended_s if self.epoch_began_s is None else self.epoch_began_s
        ms = (self.ended_s - began_s) * 1000.0
        return ExportEnded(
            ticket=self.ticket, outcome=self.outcome, bytes=self.arrived_bytes or self.epoch_bytes, ms=ms
        )
