"""One request's way through its legs, as a state machine. Pure: events in, effects out; no clock, no network.

Every transition lives in this file. The machine does not know which instances serve the legs, nor what text the
tokens make; it orders tokens, decides when the decode leg opens, and what an instance's death or refusal means.

    way            prefill leg                          decode leg
    disaggregated  open -> started -> closed            (on started) seeking -> open -> handed_off -> closed
    local          none                                 open -> closed

A leg that is lost does not end the request: what is left of it is called off, and both legs begin anew (a replay), with
the tokens emitted so far forced. A decode leg that is lost before its handoff is complete costs less: what the prefill
instance has, and goes on computing, another decode instance pulls with the next epoch. The caller passes on no events of
legs that were given up.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum, auto
from typing import Literal, assert_never

from biphase.protos.values import FinishReason, KvTicket, Role
from biphase.router.effects import CancelLeg, Effect, Emit, Fail, Replay, ReplayCause, Requeue, SeekDecode
from biphase.router.events import HandedOff, LegEnded, LegEvent, Lost, Refused, Started, Token

Phase = Literal["queue", "prefill", "started", "handoff", "first_step", "local_prefill", "decode"]
"""prefill: offered, its first chunk not scheduled; started: before the first token; handoff: after it, KV on its way."""


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


MAX_FAILED_HANDOFFS = 8
"""In one request's life. Each is tried elsewhere, or later: a pair that fails is left alone for longer every time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Trouble:
    """Why a leg is no longer there. An internal error ends the request; anything else is made good by a replay."""

    cause: ReplayCause | Literal["internal"]
    detail: str
    blames_pair: bool = False


class Lifecycle:
    """Owned by one request. ``first_index``: the output index of the first token to be made (forced ones before it).

    ``replays`` counts all of them, ``losses`` the instances that went down with the request aboard: more than
    ``max_replays`` of those end it.
    """

    def __init__(self, first_index: int = 0, *, max_replays: int = 3) -> None:
        self.replays = 0
        self.losses = 0
        self._failed_handoffs = 0
        self._max_replays = max_replays
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
        self._gone: _Trouble | None = None  # why the prefill leg is no longer there, when it did not end well
        self._instead: Replay | None = None  # what to do where nobody else pulls what a lost decode instance had not
        self._doomed: _Trouble | None = None  # the handoff failed; the prefill leg, called off, has the last word

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

    def begin_anew(self) -> list[Effect]:
        """Do what a ``SeekDecode`` has ``instead``: nobody else can pull."""
        self._expect(self.decode is Leg.SEEKING and self._instead is not None)
        assert self._instead is not None
        return self._replay(self._instead)

    # ---- what the instances say

    def handle(self, event: LegEvent) -> list[Effect]:
        """Take one event and return what to do, in order."""
        if isinstance(event, LegEnded | Refused | Lost):
            was = self.prefill if event.role == "prefill" else self.decode
            if was is Leg.NONE:
                return []
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

    def _seek(self, *, gone: bool = False) -> list[Effect]:
        assert self._ticket is not None
        self.decode = Leg.SEEKING
        self.pull_epoch += 1
        return [
            SeekDecode(
                ticket=self._ticket,
                pull_epoch=self.pull_epoch,
                refusals=self._refusals["decode"],
                instead=self._instead,
                gone=gone,
            )
        ]

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
        return self._make_good(self._gone)

    def _refused(self, event: Refused) -> list[Effect]:
        if event.reason == "invalid":
            return self._fail(Fail(kind="invalid", detail=event.detail))
        self._refusals[event.role] += 1
        self._set(event.role, Leg.NONE)
        if event.role == "prefill" or self._local:
            return [Requeue(refusals=self._refusals[event.role])]
        if self._gone is not None:
            return self._make_good(self._gone)
        if (
            self._instead is not None and self.prefill not in _LIVE
        ):  # the lost one had pulled it all, nothing is left there
            return self._replay(self._instead)
        return self._seek()

    def _lost(self, event: Lost, was: Leg) -> list[Effect]:
        trouble = _Trouble(cause="lost", detail=event.detail)
        if event.role == "decode":
            return self._make_good(trouble, pulled=was is Leg.OPEN)
        return self._prefill_gone(trouble, was)

    def _prefill_gone(self, trouble: _Trouble, was: Leg) -> list[Effect]:
        if was not in _LIVE:
            return []
        if self._doomed is not None:  # cancelled is what we asked for; a loss explains the failed handoff
            return self._make_good(trouble if trouble.cause == "lost" else self._doomed)
        self._gone = trouble
        match self.decode:
            case Leg.HANDED_OFF:
                return self._check_first_token()
            case Leg.OPEN:
                self.decode = Leg.IN_DOUBT
                return [CancelLeg(role="decode", reason="prefill instance lost", unless_handed_off=True)]
            case Leg.CLOSED:
                return self._check_first_token()
            case _:
                return self._make_good(trouble)

    def _leg_ended(self, event: LegEnded, was: Leg) -> list[Effect]:
        if event.role == "prefill":
            return self._prefill_ended(event, was)
        return self._decode_ended(event, was)

    def _prefill_ended(self, event: LegEnded, was: Leg) -> list[Effect]:
        match event.outcome:
            case "done":
                if self._doomed is not None:
                    return self._make_good(self._doomed)
                if self._instead is not None and self.decode is Leg.SEEKING:  # the lost one had pulled it all
                    return self._replay(self._instead)
                if self._next_index > self._first_index:
                    return []
                failure = Fail(kind="internal", detail="the prefill leg is done, but its first token never came")
                return self._fail(failure)
            case "cancelled":  # if that was our doing, the way it ended is known already
                detail = event.detail or "the prefill instance ended the request"
                return self._prefill_gone(self._doomed or _Trouble(cause="lost", detail=detail), was)
            case "drained":
                detail = event.detail or "the prefill instance drains"
                return self._prefill_gone(_Trouble(cause="drained", detail=detail), was)
            case "lease_expired":
                detail = event.detail or "the lease of the prompt's KV expired"
                return self._prefill_gone(_Trouble(cause="handoff_failed", detail=detail), was)
            case _:
                detail = event.detail or "the prefill instance failed"
                return self._prefill_gone(_Trouble(cause="internal", detail=detail), was)

    def _decode_ended(self, event: LegEnded, was: Leg) -> list[Effect]:
        match event.outcome:
            case "done":  # its last token waits for the prefill leg's, which comes over another link
                if any(token.finish is not None for token in self._early.values()):
                    return self._check_first_token()
                return self._fail(Fail(kind="internal", detail="the decode leg is done, but its output has no end"))
            case "handoff_failed":
                detail = event.detail or "the handoff failed"
                trouble = self._gone or _Trouble(cause="handoff_failed", detail=detail, blames_pair=True)
                if self.prefill not in _LIVE or self._next_index > self._first_index:
                    return self._make_good(replace(trouble, blames_pair=self.prefill in _LIVE))
                # The instance revokes a ticket itself when its first token ends the request, and that token may
                # still be on its way over the other link: revoke, and judge when the prefill leg has ended.
                self._doomed = trouble
                return [CancelLeg(role="prefill", reason=detail)]
            case "cancelled" | "drained":
                detail = event.detail or "the decode instance ended the request"
                cause: ReplayCause = "drained" if event.outcome == "drained" else "lost"
                gone = self._gone if was is Leg.IN_DOUBT else None
                return self._make_good(gone or _Trouble(cause=cause, detail=detail), pulled=was is Leg.OPEN)
            case _:
                return self._fail(Fail(kind="internal", detail=event.detail or "the decode instance failed"))

    # ---- replay

    def _make_good(self, trouble: _Trouble, *, pulled: bool = False) -> list[Effect]:
        """Go on elsewhere, unless that was tried too often or makes no sense. ``pulled``: what is gone is a decode leg whose
        handoff was not complete."""
        if trouble.cause == "internal":
            return self._fail(Fail(kind="internal", detail=trouble.detail))
        if trouble.cause == "lost":
            self.losses += 1
            if self.losses > self._max_replays:
                detail = (
                    f"{self.losses} instances were lost with the request aboard, the limit is {self._max_replays}; "
                    f"the last: {trouble.detail}"
                )
                return self._fail(Fail(kind="suspect", detail=detail))
        elif trouble.cause == "handoff_failed":
            self._failed_handoffs += 1
            if self._failed_handoffs > MAX_FAILED_HANDOFFS:
                detail = f"{self._failed_handoffs} handoffs failed; the last: {trouble.detail}"
                return self._fail(Fail(kind="handoff_failed", detail=detail))
        replay = Replay(cause=trouble.cause, detail=trouble.detail, blames_pair=trouble.blames_pair)
        if pulled and self._ticket is not None and self.prefill in _LIVE:
            self._instead = replay
            return self._seek(gone=True)
        return self._replay(replay)

    def _replay(self, replay: Replay) -> list[Effect]:
        effects = [*self._cancel("prefill", replay.detail), *self._cancel("decode", replay.detail)]
        self._begin_anew()
        return [*effects, replay]

    def _begin_anew(self) -> None:
        """As a new request that has emitted what this one has. Tokens that came before their turn are made again."""
        self.replays += 1
        self.prefill = self.decode = Leg.NONE
        self._local = False
        self._first_index = self._next_index
        self._early.clear()
        self._ticket = self._instead = self._gone = self._doomed = None
        self._refusals = {"prefill": 0, "decode": 0}

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
