"""What instances tell a router about one leg, as values. Links make them, lifecycles take them. Pure."""

from dataclasses import dataclass
from typing import Literal

from biphase.protos.values import FinishReason, KvTicket, LegOutcome, LegStats, Role

RefusalReason = Literal["busy", "draining", "invalid"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """The instance does not take the leg; there will be no LegEnded."""

    role: Role
    reason: RefusalReason
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """The prefill leg's first chunk is scheduled. No ticket: the request ends with its first token."""

    ticket: KvTicket | None
    queue_ms: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class HandedOff:
    """The decode instance holds all of the prompt's KV and has released the ticket.

    ``first_token`` came with the KV: with it a prefill instance that died before its own word of that token arrived
    is missed by nobody. None: the instance did not say.
    """

    num_bytes: int = 0
    ms: float = 0.0
    exposed_ms: float = 0.0
    first_token: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """One output token; ``index`` counts from 0 over the request's whole output."""

    role: Role
    index: int
    token_id: int
    finish: FinishReason | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LegEnded:
    """The last word on a leg."""

    role: Role
    outcome: LegOutcome
    detail: str = ""
    stats: LegStats


@dataclass(frozen=True, slots=True, kw_only=True)
class Lost:
    """The link to the leg's instance is gone, and the leg with it. ``detail`` names the instance."""

    role: Role
    detail: str


LegEvent = Refused | Started | HandedOff | Token | LegEnded | Lost
