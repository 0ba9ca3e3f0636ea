"""What a request's lifecycle machine asks of its request, as values. Pure."""

from dataclasses import dataclass
from typing import Literal

from biphase.protos.values import FinishReason, KvTicket, Role

FailureKind = Literal["invalid", "unavailable", "handoff_failed", "internal", "suspect"]
"""suspect: it was aboard more lost instances than a request may be."""

ReplayCause = Literal["lost", "drained", "handoff_failed"]
"""lost: an instance went down with the request aboard, which counts against max_replays; the others do not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Requeue:
    """Offer the request to the dispatcher again; ``refusals``: how often the role that refused has done so."""

    refusals: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CancelLeg:
    """Tell the leg's instance to end it."""

    role: Role
    reason: str
    unless_handed_off: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Emit:
    """Output tokens in order, ``first_index`` on; with ``finish`` they are the last."""

    first_index: int
    token_ids: tuple[int, ...]
    finish: FinishReason | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """Go on elsewhere, the emitted tokens forced. Every leg has ended or was called off before. Always the last effect.

    ``blames_pair``: the decode instance could not pull from the prefill instance, which was there.
    """

    cause: ReplayCause
    detail: str
    blames_pair: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class SeekDecode:
    """Find a decode instance with room and open a leg there with this ticket.

    ``instead``: a decode instance that pulled is gone, and where no other one can pull this is what to do; ``gone``: it is
    the last one that had the leg, which did not refuse it.
    """

    ticket: KvTicket
    pull_epoch: int
    refusals: int
    instead: Replay | None = None
    gone: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Fail:
    """The request ends with an error. Always the last effect."""

    kind: FailureKind
    detail: str


Effect = Requeue | SeekDecode | CancelLeg | Emit | Replay | Fail
