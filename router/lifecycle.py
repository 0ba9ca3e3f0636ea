"""One request's way through its legs, as a state machine. Pure: events in, effects out; no clock, no network.

Every transition lives in this file. The machine does not know which instances serve the legs, nor what text the
tokens make; it orders tokens, decides when the decode leg opens, and what an instance's death or refusal means.

    way            prefill leg                          decode leg
    disaggregated  open -> started -> closed            (on started) seeking -> open -> handed_off -> closed
    local          none                                 open -> closed
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Literal, assert_never

from biphase.protos.values import FinishReason, KvTicket, Role
from biphase.router.events import HandedOff, LegEnded, LegEvent, Lost, Refused, Started, Token

Phase = Literal["queue", "prefill", "started", "handoff", "first_step", "local_prefill", "decode"]
"""prefill: offered, its first chunk not scheduled; started: before the first token; handoff: after it, KV on its way."""

FailureKind = Literal["invalid", "unavailable", "handoff_failed", "internal"]


class Leg(Enum):
    """Where a leg stands."""

    NONE = auto()
    SEEKING = auto()
    """Decode only: the ticket is there, an instance with room is not yet."""
    OPEN = auto()
    STARTED = auto()
    """Prefill only."""
    HANDED_OFF = auto()
    """Decode only: the prefill instance is needed no more."""
    IN_DOUBT = auto()
    """Decode only: the prefill instance is gone; whether the handoff was complete is being asked."""
    CLOSED = auto()


_LIVE = (Leg.OPEN, Leg.STARTED, Leg.HANDED_OFF, Leg.IN_DOUBT)


@dataclass(frozen=True, slots=True, kw_only=True)
class Requeue:
    """Offer the request to the dispatcher again; ``refusals``: how often the role that refused has done so."""

    refusals: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SeekDecode:
    """Find a decode instance with room and open a leg there with this ticket."""

    ticket: KvTicket
    pull_epoch: int
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
class Fail:
    """The request ends with an error. Always the last effect."""

    kind: FailureKind
    detail: str


Effect = Requeue | SeekDecode | CancelLeg | Emit | Fail


class Lifecycle:
    """Owned by one request. ``first_index``: the output index of the first token to be made (forced ones before it)."""

    def __init__(self, first_index: int = 0) -> None:
        self.prefill = Leg.NONE
        self.decode = Leg.NONE
        self.ended = False
        self.pull_epoch = 0
        self._local = False
        self._first_index = first_index
        self._next_index = first_index
        self._early: dict[int, Token] = {}
        self._ticket: KvTicket | None = None
        self._refusals: dict[Role, int] = {"prefill": 0, "decode": 0}
        self._gone: Fail | None = None  # why the prefill leg is no longer there, when it did not end well
        self._doomed: Fail | None = None  # the handoff failed; the prefill leg, called off, has the last word

    @property
    def awaits(self) -> Role | None:
        """Whose next token is due now, if anybody's."""
        if self.ended:
            return None
        if self.decode is Leg.HANDED_OFF or (self._local and self._next_index > self._first_index):
            return "decode"
        if self.prefill is Leg.STARTED and self._next_index == self._first_index:
            return "prefill"
        return None

    @property
    def phase(self) -> Phase:
        """How far it is, for people: counters and logs."""
        if self.prefill is Leg.NONE and self.decode is Leg.NONE:
            return "queue"
        num_tokens = self._next_index - self._first_index
        if self._local:
            return "decode" if num_tokens else "local_prefill"
        if self.decode is Leg.HANDED_OFF:
            return "decode" if num_tokens > 1 else "first_step"
        if self.prefill is Leg.OPEN:
            return "prefill"
        return "handoff" if num_tokens else "started"

    # ---- what the router does

    def opened_prefill(self) -> None:
        self._expect(self.prefill is Leg.NONE and self.decode is Leg.NONE)
        self.prefill, self._local = Leg.OPEN, False

    def opened_decode(self) -> None:
        """A decode leg was opened: with the ticket when one was sought for, else to prefill locally."""
        self._expect(self.decode in (Leg.NONE, Leg.SEEKING))
        self._local = self.decode is Leg.NONE
        self.decode = Leg.OPEN

    def end(self, reason: str) -> list[Effect]:
        """The router ends the request (stop string, cancel, deadline): both legs are called off."""
        if self.ended:
            return []
        self.ended = True
        return self._cancel("prefill", reason) + self._cancel("decode", reason)

    # ---- what the instances say

    def handle(self, event: LegEvent) -> list[Effect]:
        """Take one event and return what to do, in order."""
        if isinstance(event, LegEnded | Refused | Lost):
            was = self.prefill if event.role == "prefill" else self.decode
            self._set(event.role, Leg.CLOSED)
            if self.ended or was is Leg.CLOSED:
                return []
        if self.ended:
            return []
        match event:
            case Token():
                return self._token(event)
            case Started():
                return self._started(event)
            case HandedOff():
                return self._handed_off(event)
            case Refused():
                return self._refused(event)
            case Lost():
                return self._lost(event, was)
            case LegEnded():
                return self._leg_ended(event, was)
            case _:
                assert_never(event)

    def _token(self, token: Token) -> list[Effect]:
        if token.index < self._next_index or token.index in self._early:
            return []
        self._early[token.index] = token
        return self._drain()

    def _drain(self) -> list[Effect]:
        """Emit what is next in order. The finishing token ends the request."""
        first, ids = self._next_index, []
        finish: FinishReason | None = None
        while finish is None and (token := self._early.pop(self._next_index, None)) is not None:
            ids.append(token.token_id)
            self._next_index += 1
            finish = token.finish
        if not ids:
            return []
        effects: list[Effect] = [Emit(first_index=first, token_ids=tuple(ids), finish=finish)]
        if finish is not None:
            self.ended = True
            if not self._local and self._next_index == self._first_index + 1:  # the prefill leg's own token ends it
                effects = self._cancel("decode", "the first token ended the request") + effects
        return effects

    def _started(self, event: Started) -> list[Effect]:
        if self.prefill is not Leg.OPEN:
            return []
        self.prefill = Leg.STARTED
        if event.ticket is None:
            return []
        self._ticket = event.ticket
        return self._seek()

    def _seek(self) -> list[Effect]:
        assert self._ticket is not None
        self.decode = Leg.SEEKING
        self.pull_epoch += 1
        return [SeekDecode(ticket=self._ticket, pull_epoch=self.pull_epoch, refusals=self._refusals["decode"])]

    def _handed_off(self, event: HandedOff) -> list[Effect]:
        if self.decode not in (Leg.OPEN, Leg.IN_DOUBT):
            return []
        self.decode = Leg.HANDED_OFF
        effects: list[Effect] = []
        if event.first_token is not None:
            effects = self._token(Token(role="decode", index=self._first_index, token_id=event.first_token))
        return effects or self._check_first_token()

    def _check_first_token(self) -> list[Effect]:
        """With the prefill leg gone nobody will bring the first token, if it has not come."""
        if self._gone is None or self._next_index > self._first_index:
            return []
        return self._fail(self._gone)

    def _refused(self, event: Refused) -> list[Effect]:
        if event.reason == "invalid":
            return self._fail(Fail(kind="invalid", detail=event.detail))
        self._refusals[event.role] += 1
        self._set(event.role, Leg.NONE)
        if event.role == "prefill" or self._local:
            return [Requeue(refusals=self._refusals[event.role])]
        if self._gone is not None:
            return self._fail(self._gone)
        return self._seek()

    def _lost(self, event: Lost, was: Leg) -> list[Effect]:
        failure = Fail(kind="unavailable", detail=event.detail)
        if event.role == "decode":
            return self._fail(failure)
        return self._prefill_gone(failure, was)

    def _prefill_gone(self, failure: Fail, was: Leg) -> list[Effect]:
        if was not in _LIVE:
            return []
        if self._doomed is not None:
            return self._fail(self._doomed)
        self._gone = failure
        match self.decode:
            case Leg.HANDED_OFF:
                return self._check_first_token()
            case Leg.OPEN:
                self.decode = Leg.IN_DOUBT
                return [CancelLeg(role="decode", reason="prefill instance lost", unless_handed_off=True)]
            case Leg.CLOSED:
                return self._check_first_token()
            case _:
                return self._fail(failure)

    def _leg_ended(self, event: LegEnded, was: Leg) -> list[Effect]:
        if event.role == "prefill":
            return self._prefill_ended(event, was)
        return self._decode_ended(event)

    def _prefill_ended(self, event: LegEnded, was: Leg) -> list[Effect]:
        match event.outcome:
            case "done":
                if self._doomed is not None:
                    return self._fail(self._doomed)
                if self._next_index > self._first_index:
                    return []
                failure = Fail(kind="internal", detail="the prefill leg is done, but its first token never came")
                return self._fail(failure)
            case "cancelled" | "drained":
                failure = Fail(kind="unavailable", detail=event.detail or "the prefill instance ended the request")
            case "lease_expired":
                failure = Fail(kind="handoff_failed", detail=event.detail or "the lease of the prompt's KV expired")
            case _:
                failure = Fail(kind="internal", detail=event.detail or "the prefill instance failed")
        return self._prefill_gone(failure, was)

    def _decode_ended(self, event: LegEnded) -> list[Effect]:
        match event.outcome:
            case "done":  # its last token waits for the prefill leg's, which comes over another link
                if any(token.finish is not None for token in self._early.values()):
                    return self._check_first_token()
                return self._fail(Fail(kind="internal", detail="the decode leg is done, but its output has no end"))
            case "handoff_failed":
                failure = self._gone or Fail(kind="handoff_failed", detail=event.detail or "the handoff failed")
                if self.prefill not in _LIVE or self._next_index > self._first_index:
                    return self._fail(failure)
                # The instance revokes a ticket itself when its first token ends the request, and that token may
                # still be on its way over the other link: revoke, and judge when the prefill leg has ended.
                self._doomed = failure
                return [CancelLeg(role="prefill", reason=failure.detail)]
            case "cancelled" | "drained":
                detail = event.detail or "the decode instance ended the request"
                return self._fail(self._gone or Fail(kind="unavailable", detail=detail))
            case _:
                return self._fail(Fail(kind="internal", detail=event.detail or "the decode instance failed"))

    # ---- helpers

    def _fail(self, failure: Fail) -> list[Effect]:
        """Call off what is open, the prefill leg (and with it the ticket) first, then end with the error."""
        self.ended = True
        return [*self._cancel("prefill", failure.detail), *self._cancel("decode", failure.detail), failure]

    def _cancel(self, role: Role, reason: str) -> list[Effect]:
        leg = self.prefill if role == "prefill" else self.decode
        if role == "decode" and leg is Leg.SEEKING:
            self.decode = Leg.CLOSED
        return [CancelLeg(role=role, reason=reason)] if leg in _LIVE else []

    def _set(self, role: Role, leg: Leg) -> None:
        if role == "prefill":
            self.prefill = leg
        else:
            self.decode = leg

    def _expect(self, condition: bool) -> None:
        if not condition:
            raise RuntimeError(f"{self!r} cannot open this leg now")

    @property
    def pending(self) -> Sequence[int]:
        """Output indices that came before their turn."""
        return sorted(self._early)

    def __repr__(self) -> str:
        state = "ended" if self.ended else "live"
        return (
            f"<Lifecycle [{state}, prefill {self.prefill.name.lower()}, decode {self.decode.name.lower()}, "
            f"next token {self._next_index}, {len(self._early)} early]>"
        )
