"""What is said of a prefill instance's tickets: their ends, who is turned away, and what the ranks tell each other. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Literal, Protocol

from biphase.protos.ids import BlockId, TicketId

Outcome = Literal["released", "revoked", "expired"]


class BlockHolder(Protocol):
    """Counts references to blocks; a block is free at zero."""

    def hold(self, blocks: Sequence[BlockId]) -> None: ...

    def release(self, blocks: Sequence[BlockId]) -> None: ...


class Followers(Protocol):
    """The other ranks' tables, as that of rank 0 tells them; ``ranks``: who they are."""

    @property
    def ranks(self) -> Sequence[int]: ...

    def opened(self, ticket: TicketId, seq_id: int, blocks: Sequence[BlockId], num_tokens: int) -> None: ...

    def finished(self, ticket: TicketId) -> None:
        """Everything is computed."""

    def superseded(self, ticket: TicketId, epoch: int) -> None:
        """Readers of epochs before this one are to be ended."""

    def ended(self, ticket: TicketId, outcome: Outcome) -> None:
        """End it; they answer with ExportTable.follower_ended."""


class NoFollowers:
    """Of an instance of one rank."""

    ranks: Sequence[int] = ()

    def opened(self, ticket: TicketId, seq_id: int, blocks: Sequence[BlockId], num_tokens: int) -> None:
        pass

    def finished(self, ticket: TicketId) -> None:
        pass

    def superseded(self, ticket: TicketId, epoch: int) -> None:
        pass

    def ended(self, ticket: TicketId, outcome: Outcome) -> None:
        pass


class Refusal(Enum):
    """Why a reader is turned away; the value is the word that the wire shows."""

    UNKNOWN = "UNKNOWN_TICKET"
    RELEASED = "RELEASED"
    REVOKED = "REVOKED"
    LEASE_EXPIRED = "LEASE_EXPIRED"
    STALE_EPOCH = "STALE_EPOCH"


class ExportRefused(Exception):
    """A pull or release that must not go on; the text is one line."""

    def __init__(self, refusal: Refusal, text: str) -> None:
        super().__init__(f"{refusal.value}: {text}")
        self.refusal = refusal


_ENDS: dict[Outcome, tuple[Refusal, str]] = {
    "released": (Refusal.RELEASED, "was released: its KV has been handed over"),
    "revoked": (Refusal.REVOKED, "was revoked"),
    "expired": (Refusal.LEASE_EXPIRED, "outlived its lease"),
}


def ended_refusal(ticket: TicketId, outcome: Outcome | None) -> ExportRefused:
    """What a reader is told of a ticket that has ended so; None: nobody knows it."""
    if outcome is None:
        return ExportRefused(Refusal.UNKNOWN, f"no ticket {short(ticket)} was ever open here, or long ago")
    refusal, text = _ENDS[outcome]
    return ExportRefused(refusal, f"ticket {short(ticket)} {text}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportEnded:
    """A ticket has ended and its blocks are back. ``bytes`` and ``ms`` count from the first pull of the last epoch.

    ``bytes``: what has arrived, as the reader says when it releases; where it says nothing, what was sent."""

    ticket: TicketId
    outcome: Outcome
    bytes: int
    ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Readable:
    """Positions below ``tokens`` are computed; those below ``ahead_tokens`` in the first ``ahead_layers`` local layers."""

    tokens: int
    ahead_tokens: int
    ahead_layers: int


@dataclass(eq=False, slots=True, kw_only=True)
class Pull:
    """One open reader of one ticket. Owned by the table; the server keeps it as a handle."""

    ticket: TicketId
    epoch: int
    blocks: tuple[BlockId, ...]
    num_tokens: int


def short(ticket: TicketId) -> str:
    """Enough of a ticket to tell it apart in a message; never the whole, which is a capability."""
    return ticket.hex()[:8] + "…"
