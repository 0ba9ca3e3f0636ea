"""One live request: drives its lifecycle machine with what its legs say, and performs what the machine asks for.

All of it runs in the loop, without awaiting. The client's handler only takes replies from ``replies``; a request goes
on to its legs' ends after the client has gone.
"""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Literal, Protocol

from biphase.protos.errors import (
    BiphaseError,
    Cancelled,
    DeadlinePassed,
    HandoffFailed,
    Internal,
    InvalidRequest,
    Overloaded,
    Unavailable,
)
from biphase.protos.ids import RequestId
from biphase.protos.values import FinishReason, Role
from biphase.router.config import RequestLimits, Waits
from biphase.router.deadline import has_run_out
from biphase.router.effects import CancelLeg, Effect, Emit, Fail, FailureKind, Replay, Requeue, SeekDecode
from biphase.router.events import HandedOff, LegEnded, LegEvent, Lost, Started
from biphase.router.lifecycle import Leg as LegState
from biphase.router.lifecycle import Lifecycle
from biphase.router.links import Leg, LegRequest, Link
from biphase.router.output import Output, Piece
from biphase.router.record import Record
from biphase.router.reply_stream import ReplyStream
from biphase.router.view import InstanceKey, Pair, PlaceRequest

logger = logging.getLogger(__name__)

_ERRORS: dict[FailureKind, type[BiphaseError]] = {
    "invalid": InvalidRequest,
    "unavailable": Unavailable,
    "handoff_failed": HandoffFailed,
    "internal": Internal,
    "suspect": Internal,
}


class RequestHost(Protocol):
    """Who a request turns to."""

    def requeue(self, request: "Request") -> None:
        """It was refused; find it another instance."""

    def seek_decode(self, request: "Request") -> None:
        """Its ticket is there; find it a decode instance."""

    def can_pull_again(self, request: "Request", gone: InstanceKey | None) -> bool:
        """Its decode instance is gone: whether another one could pull what the prefill instance has."""

    def pulls_again(self, request: "Request") -> None:
        """Another decode instance pulls now."""

    def replay(self, request: "Request", effect: Replay, pair: Pair | None) -> None:
        """It was cut off from an instance; find it others. ``pair``: the two that it was on, when it was on two."""

    def went_on(self, request: "Request") -> None:
        """The first token since a replay has come."""

    def handed_off(self, request: "Request", pair: Pair) -> None:
        """Its KV has come from one to the other."""

    def decided(self, request: "Request") -> None:
        """Its placement has borne a first token, or it ended; called once."""

    def over(self, request: "Request", error: BiphaseError | None) -> None:
        """The client's side has ended: its ids are free and nothing of it waits any more."""

    def closed(self, request: "Request") -> None:
        """Its last leg has ended too."""


class Request:
    """Created by the front door for an admitted request; owned by its table of live requests until closed."""

    def __init__(
        self,
        *,
        asked: LegRequest,
        client_request_id: str,
        output: Output,
        host: RequestHost,
        limits: RequestLimits,
        waits: Waits,
        arrived_s: float,
        deadline_s: float | None,
        sequence: int,
        max_replays: int = 3,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self.asked = asked
        self.client_request_id = client_request_id
        self.sequence = sequence
        """Counts arrivals; the queue is ordered by it."""
        self.replies = ReplyStream(self._loop.time, limits.max_buffered_tokens)
        self.record = Record(arrived_s=arrived_s)
        self.lifecycle = Lifecycle(len(asked.token_ids) - asked.num_prompt_tokens, max_replays=max_replays)
        self.seeking: SeekDecode | None = None
        self.promised_decode: InstanceKey | None = None
        self.refusals = 0
        self.place = PlaceRequest(
            request_id=asked.request_id,
            prompt_tokens=len(asked.token_ids),
            max_tokens=asked.sampling.max_tokens - (len(asked.token_ids) - asked.num_prompt_tokens),
            arrived_s=arrived_s,
            deadline_s=deadline_s,
        )
        self._output = output
        self._output_ids = list(asked.token_ids[asked.num_prompt_tokens :])
        """Forced and emitted ones."""
        self._is_catching_up = False
        self._given_up: list[Leg] = []
        self._host = host
        self._waits = waits
        self._write_timeout_s = limits.write_timeout_s
        self._legs: dict[Role, Leg] = {}
        self._is_over = False
        self._is_closed = False
        self._is_decided = False
        self._last_piece: Piece | None = None
        self._touched_s = arrived_s
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._after("silence", waits.silence_s, self._look_for_silence)
        self._after("write", limits.write_timeout_s, self._look_at_reader)
        if deadline_s is not None:
            self._timers["deadline"] = self._loop.call_at(deadline_s, self._deadline_passed)

    @property
    def id(self) -> RequestId:
        return self.asked.request_id

    @property
    def is_over(self) -> bool:
        """The client's side has ended."""
        return self._is_over

    @property
    def num_output_tokens(self) -> int:
        return self._output.num_tokens

    @property
    def open_legs(self) -> list[Leg]:
        return [leg for leg in (*self._given_up, *self._legs.values()) if leg.is_open]

    @property
    def is_seeking(self) -> bool:
        """It waits for a decode instance with its ticket in hand."""
        return self.lifecycle.decode is LegState.SEEKING

    @property
    def has_lost_decode(self) -> bool:
        """It seeks one in place of one that was lost."""
        return self.seeking is not None and self.seeking.instead is not None

    @property
    def is_replay(self) -> bool:
        """It has been cut off from an instance before."""
        return self.lifecycle.replays > 0

    @property
    def prefill_key(self) -> InstanceKey | None:
        """Its prefill instance, if it is or was on one since it was last placed."""
        leg = self._legs.get("prefill")
        return None if leg is None else leg.link.member.key

    def pair(self) -> Pair | None:
        """The two instances that it is on; None where it is on one."""
        prefill, decode = self._legs.get("prefill"), self._legs.get("decode")
        if prefill is None or decode is None:
            return None
        return Pair(prefill=prefill.link.member.key, decode=decode.link.member.key)

    # ---- what the dispatcher does

    def open_prefill(self, link: Link, reason: str) -> None:
        self.record.placed("disaggregated", reason, self._loop.time())
        self.lifecycle.opened_prefill()
        self._open("prefill", link.open_prefill(self.asked, self, refusals=self.refusals))

    def open_local(self, link: Link, reason: str) -> None:
        self.record.placed("local", reason, self._loop.time())
        self.lifecycle.opened_decode()
        self._open("decode", link.open_decode(self.asked, self, ticket=None, pull_epoch=0, refusals=self.refusals))

    def open_decode(self, link: Link) -> None:
        """Open the decode leg that ``seeking`` asked for."""
        assert self.seeking is not None
        sought, self.seeking = self.seeking, None
        if sought.instead is not None:
            logger.warning("%s is pulled by another decode instance: %s", self.id, sought.instead.detail)
            self._host.pulls_again(self)
        self.lifecycle.opened_decode()
        leg = link.open_decode(
            self.asked, self, ticket=sought.ticket, pull_epoch=sought.pull_epoch, refusals=sought.refusals
        )
        self._open("decode", leg)

    def _open(self, role: Role, leg: Leg) -> None:
        self._legs[role] = leg
        self.record.instances[role] = leg.label
        self.place = replace(self.place, generation=leg.link.member.generation)

    # ---- what ends it from this side

    def end(self, error: BiphaseError) -> None:
        """End with an error of the router's or the client's making; both legs are called off."""
        self.record.ended_in = self.lifecycle.phase
        self._perform(self.lifecycle.end(str(error)))
        self._over(error)

    def client_gone(self) -> None:
        """Its stream has ended, by the client's wish or at the deadline, which gRPC keeps too."""
        arrived_s, deadline_s = self.record.arrived_s, self.place.deadline_s
        if has_run_out(self._loop.time(), arrived_s=arrived_s, deadline_s=deadline_s):
            self._deadline_passed()
        else:
            self.end(Cancelled("the client is gone"))

    def _deadline_passed(self) -> None:
        waited_s = self._loop.time() - self.record.arrived_s
        self.end(DeadlinePassed(f"the client's deadline of {waited_s:.3f} s has passed"))

    # ---- what its legs say

    def on_leg_event(self, leg: Leg, event: LegEvent) -> None:
        try:
            self._touched_s = self._loop.time()
            if leg is self._legs.get(leg.role):
                self._note(event)
                self._perform(self.lifecycle.handle(event))
            self._check_closed()
        except Exception as error:  # one request's trouble must not take the link down
            logger.exception("%s failed by a fault of the router", self.id)
            self.end(Internal(f"the router failed with {type(error).__name__}; its log says more"))

    def _note(self, event: LegEvent) -> None:
        if isinstance(event, LegEnded):
            self.record.stats[event.role] = event.stats
        elif isinstance(event, Started):
            if self.record.first_token_s is None:
                self.record.started_s = self._loop.time()
                self.record.prefill_queue_ms = event.queue_ms
        elif isinstance(event, HandedOff):
            self.record.handoff = event
            pair = self.pair()
            if pair is not None:
                self._host.handed_off(self, pair)

    def _perform(self, effects: list[Effect]) -> None:
        for effect in effects:
            match effect:
                case Emit():
                    self._emit(effect)
                case CancelLeg():
                    leg = self._legs.get(effect.role)
                    if leg is not None and leg.is_open:
                        leg.cancel(effect.reason, unless_handed_off=effect.unless_handed_off)
                case SeekDecode():
                    self._seek(effect)
                case Requeue():
                    self.refusals = effect.refusals
                    self._legs.clear()  # the refused one
                    self._unpin()
                    self._host.requeue(self)
                case Replay():
                    self._replay(effect)
                case Fail():
                    if effect.kind == "suspect":
                        logger.error(
                            "%s is suspect: client id %r, %d prompt tokens, %d output tokens; %s",
                            self.id,
                            self.client_request_id,
                            self.asked.num_prompt_tokens,
                            self._output.num_tokens,
                            effect.detail,
                        )
                    self._over(_ERRORS[effect.kind](f"{self.id}: {effect.detail}"))

    def _seek(self, effect: SeekDecode) -> None:
        self.seeking = effect
        leg = self._legs.pop("decode", None)
        self.record.stats.pop("decode", None)
        gone = leg.link.member.key if leg is not None and effect.gone else None
        if effect.instead is not None and not self._host.can_pull_again(self, gone):
            self.begin_anew()
        else:
            self._host.seek_decode(self)

    def begin_anew(self) -> None:
        """It seeks a decode instance in place of a lost one, and none is left that could pull."""
        self._perform(self.lifecycle.begin_anew())

    def _replay(self, effect: Replay) -> None:
        """Ask for a place again, for the prompt and what was emitted of the output. What is left of its legs was called
        off, but has to end."""
        pair = self.pair()
        self._given_up = [leg for leg in self.open_legs if leg.is_open]
        if self._given_up:
            self._after("given_up", self._waits.leg_end_s, self._forget_given_up)
        self._legs.clear()
        self.seeking = None
        self.refusals = 0
        prompt = self.asked.token_ids[: self.asked.num_prompt_tokens]
        self.asked = replace(self.asked, token_ids=[*prompt, *self._output_ids])
        self.place = replace(
            self.place,
            prompt_tokens=len(self.asked.token_ids),
            max_tokens=self.asked.sampling.max_tokens - len(self._output_ids),
            arrived_s=self._loop.time(),
            is_replay=True,
        )
        self._unpin()
        self._is_catching_up = True
        self.record.cut_off()
        logger.warning("%s goes on elsewhere after %d output tokens: %s", self.id, len(self._output_ids), effect.detail)
        self._host.replay(self, effect, pair)

    def _unpin(self) -> None:
        """Before its first token a request may begin anew on any generation of the weights; after it, on its own."""
        if self.record.first_token_s is None:
            self.place = replace(self.place, generation=None)

    def _emit(self, effect: Emit) -> None:
        if self._is_over or self._last_piece is not None:
            return
        self._output_ids += effect.token_ids
        self.record.last_token_s = self._loop.time()
        if self.record.first_token_s is None:
            self.record.first_token_s = self._loop.time()
            self._decided()
        if self._is_catching_up:
            self._is_catching_up = False
            self._host.went_on(self)
        piece = self._output.push(effect.first_index, effect.token_ids, effect.finish)
        self.replies.put(piece)
        if piece.finish is not None:
            self._finish(piece)
        elif self.replies.overfull:
            buffered, limit = self.replies.num_buffered_tokens, self.replies.max_buffered_tokens
            self._cut(f"{buffered} tokens wait for it, the limit is {limit}")

    def _finish(self, piece: Piece) -> None:
        """The output is complete. The last reply waits a moment for the legs' own figures."""
        self.record.finished_s = self._loop.time()
        self._last_piece = piece
        self._perform(self.lifecycle.end("the output has ended"))  # after a stop string; else there is nothing to do
        self._after("stats", self._waits.stats_s, self._reply_summary)

    def _reply_summary(self) -> None:
        if self._is_over or self._last_piece is None:
            return
        assert self._last_piece.finish is not None
        self.replies.finish(
            self.record.summary(
                finish=self._last_piece.finish,
                stop_reason=self._last_piece.stop_reason,
                prompt_tokens=self.asked.num_prompt_tokens,
                output_tokens=self._output.num_tokens,
                seed=self.asked.sampling.seed,
            )
        )
        self._over(None)

    # ---- its two ends

    @property
    def finish_reason(self) -> FinishReason | None:
        return self._last_piece.finish if self._last_piece is not None else None

    def _over(self, error: BiphaseError | None) -> None:
        """The client's side ends now; the legs may still have to."""
        if self._is_over:
            return
        self._is_over = True
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()
        self._is_catching_up = False
        if error is not None:
            self.replies.fail(error, drop_pending=isinstance(error, Overloaded))
        self._decided()
        self._host.over(self, error)
        if self.open_legs:
            self._after("legs", self._waits.leg_end_s, self._give_up_legs)
        self._check_closed()

    def _decided(self) -> None:
        if not self._is_decided and self.record.decision:
            self._is_decided = True
            self._host.decided(self)

    def _check_closed(self) -> None:
        if self.open_legs:
            return
        if self._last_piece is not None and not self._is_over:
            self._reply_summary()
        if self._is_over and not self._is_closed:
            self._is_closed = True
            for timer in self._timers.values():
                timer.cancel()
            self._timers.clear()
            self._host.closed(self)

    def _give_up_legs(self) -> None:
        self._forget(self.open_legs)

    def _forget_given_up(self) -> None:
        self._forget([leg for leg in self._given_up if leg.is_open])

    def _forget(self, legs: list[Leg]) -> None:
        for leg in legs:
            logger.warning("%s: no end of its %s leg came from %s", self.id, leg.role, leg.label)
            leg.cancel("no end came")
            leg.link.forget(leg)
        self._check_closed()

    # ---- what takes too long

    def _look_for_silence(self) -> None:
        """An instance that owes the next token and says nothing to anybody is given up."""
        role = self.lifecycle.awaits
        leg = self._legs.get(role) if role is not None else None
        wait_s = self._waits.silence_s
        if leg is not None and leg.is_open:
            heard_s = max(leg.link.heard_s, self._touched_s)
            wait_s = heard_s + self._waits.silence_s - self._loop.time()
            if wait_s <= 0:
                leg.cancel("the instance is silent")
                leg.link.forget(leg)
                self._after("silence", self._waits.silence_s, self._look_for_silence)
                detail = f"{leg.role} instance {leg.label} has sent nothing for {self._waits.silence_s:g} s"
                self.on_leg_event(leg, Lost(role=leg.role, detail=detail))
                return
        self._after("silence", wait_s, self._look_for_silence)

    def _look_at_reader(self) -> None:
        since_s = self.replies.writing_since_s
        now_s = self._loop.time()
        due_s = (now_s if since_s is None else since_s) + self._write_timeout_s
        if due_s <= now_s:
            self._cut(f"it has taken nothing for {self._write_timeout_s:g} s")
        else:
            self._after("write", due_s - now_s, self._look_at_reader)

    def _cut(self, why: str) -> None:
        self.end(Overloaded(f"the client reads too slowly: {why}"))

    def _after(
        self, name: Literal["silence", "write", "stats", "legs", "given_up"], delay_s: float, action: Callable[[], None]
    ) -> None:
        if name in self._timers:
            self._timers[name].cancel()
        self._timers[name] = self._loop.call_later(delay_s, action)

    def __repr__(self) -> str:
        return f"<Request [{self.id}, {self.lifecycle!r}, {len(self.open_legs)} open legs]>"
