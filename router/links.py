"""Links: one bidirectional stream to each instance, kept open, and the legs that live on it.

A link owns its stream, its state and the account of its instance's load. It makes no policy: it hands events to the
owners of legs, and tells its observer when something changed that placement may care about.
"""

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import grpc
import grpc.aio

from biphase.protos import worker_pb2, worker_pb2_grpc
from biphase.protos.convert import (
    finish_from_proto,
    load_from_proto,
    model_from_proto,
    pack_tokens,
    role_from_proto,
    sampling_to_proto,
    ticket_to_proto,
)
from biphase.protos.errors import one_line
from biphase.protos.grpc_setup import channel_options
from biphase.protos.ids import Incarnation, LegId, RequestId
from biphase.protos.values import KvTicket, Load, ModelInfo, Role, Sampling
from biphase.router.account import Account
from biphase.router.config import Waits
from biphase.router.events import LegEvent, Lost, Token
from biphase.router.view import InstanceView, InState, LinkState, Member, ShownState
from biphase.router.wire import ended_from_proto, handed_off_from_proto, refused_from_proto, started_from_proto

logger = logging.getLogger(__name__)

FIRST_BACKOFF_S, LAST_BACKOFF_S = 0.05, 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceInfo:
    """An instance's Welcome."""

    name: str
    role: Role
    incarnation: Incarnation
    pid: int
    model: ModelInfo
    num_blocks: int
    block_size: int
    max_num_seqs: int
    max_queued_tokens: int
    threads: int
    kv_bytes: int

    @property
    def label(self) -> str:
        return f"{self.name}#{self.incarnation} (pid {self.pid})"


@dataclass(frozen=True, slots=True, kw_only=True)
class LegRequest:
    """What an instance needs to know of a request; ``token_ids``: the prompt, then forced output."""

    request_id: RequestId
    token_ids: Sequence[int]
    num_prompt_tokens: int
    sampling: Sampling


class LegOwner(Protocol):
    """Who opened a leg. Called in the loop, must not raise."""

    def on_leg_event(self, leg: "Leg", event: LegEvent) -> None: ...


class Leg:
    """One request's work on one instance, from Open to Refused, LegEnded or the loss of the link."""

    __slots__ = ("id", "is_open", "label", "link", "opened_s", "owner", "request_id", "role")

    def __init__(self, leg_id: LegId, request_id: RequestId, link: "Link", owner: LegOwner, opened_s: float) -> None:
        self.id = leg_id
        self.request_id = request_id
        self.role: Role = link.member.role
        self.link = link
        self.owner = owner
        self.opened_s = opened_s
        self.label = link.label
        self.is_open = True

    def cancel(self, reason: str, *, unless_handed_off: bool = False) -> None:
        self.link.cancel(self, reason, unless_handed_off=unless_handed_off)


class LinkObserver(Protocol):
    """Told, in the loop, what placement may care about."""

    router_name: str
    membership_epoch: int

    def next_leg_id(self) -> LegId: ...

    def objection(self, link: "Link", info: InstanceInfo) -> str | None:
        """Why this instance cannot be used, in one line, or None."""

    def link_changed(self, link: "Link") -> None:
        """Its state or its load is another."""


class _BrokenLink(Exception):
    """The stream cannot go on; the message says why."""


class Link:
    """One member's link; reconnects by itself until closed. Everything runs in the loop that called ``start``."""

    def __init__(self, member: Member, observer: LinkObserver, waits: Waits) -> None:
        self.member = member
        self.legs: dict[LegId, Leg] = {}
        self.state: LinkState = "connecting"
        self.retiring = False
        """The controller no longer names it: no new work, and it goes when its legs have ended."""
        self.info: InstanceInfo | None = None
        """The last Welcome; kept while the link is lost."""
        self.account = Account(Load())
        self.heard_s = 0.0
        self._observer = observer
        self._waits = waits
        self._loop = asyncio.get_running_loop()
        self.shown = InState(state="connecting", since_s=self._loop.time())
        self._outbox: deque[worker_pb2.LinkDown] = deque()
        self._outbox_filled = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @property
    def label(self) -> str:
        return self.info.label if self.info is not None else f"{self.member.key} at {self.member.address}"

    def start(self) -> None:
        self._task = self._loop.create_task(self._run(), name=f"link {self.member.key}")

    async def close(self, reason: str) -> None:
        """End the stream; legs that are still open are lost for ``reason``."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
        self._set_lost(reason, on_purpose=True)

    @property
    def draining(self) -> bool:
        return self.member.draining or self.retiring or self.account.draining

    def view(self) -> InstanceView:
        info, account = self.info, self.account
        return InstanceView(
            key=self.member.key,
            role=self.member.role,
            state=self.state,
            since_s=self.shown.since_s,
            draining=self.draining,
            full=account.full,
            queued_tokens=account.queued_tokens,
            requests=account.requests,
            room_blocks=account.room_blocks,
            num_blocks=info.num_blocks if info else 0,
            block_size=info.block_size if info else 1,
            max_num_seqs=info.max_num_seqs if info else 0,
            max_queued_tokens=info.max_queued_tokens if info else 0,
            generation=self.member.generation,
        )

    # ---- down

    def open_prefill(self, request: LegRequest, owner: LegOwner, *, refusals: int) -> Leg:
        leg = self._new_leg(request.request_id, owner)
        command = worker_pb2.OpenPrefill(
            leg_id=leg.id,
            request_id=request.request_id,
            token_ids=pack_tokens(list(request.token_ids)),
            num_prompt_tokens=request.num_prompt_tokens,
            sampling=sampling_to_proto(request.sampling),
            refusals=refusals,
        )
        self._send(open_prefill=command)
        return leg

    def open_decode(
        self, request: LegRequest, owner: LegOwner, *, ticket: KvTicket | None, pull_epoch: int, refusals: int
    ) -> Leg:
        leg = self._new_leg(request.request_id, owner)
        command = worker_pb2.OpenDecode(
            leg_id=leg.id,
            request_id=request.request_id,
            token_ids=pack_tokens(list(request.token_ids)),
            num_prompt_tokens=request.num_prompt_tokens,
            sampling=sampling_to_proto(request.sampling),
            ticket=ticket_to_proto(ticket) if ticket is not None else None,
            pull_epoch=pull_epoch,
            refusals=refusals,
        )
        self._send(open_decode=command)
        return leg

    def cancel(self, leg: Leg, reason: str, *, unless_handed_off: bool) -> None:
        if leg.id in self.legs:
            command = worker_pb2.CancelLeg(leg_id=leg.id, reason=reason, unless_handed_off=unless_handed_off)
            self._send(cancel=command)

    def forget(self, leg: Leg) -> bool:
        """Stop waiting for a leg's end; whether it was still waited for."""
        leg.is_open = False
        return self.legs.pop(leg.id, None) is not None

    def _new_leg(self, request_id: RequestId, owner: LegOwner) -> Leg:
        leg = Leg(self._observer.next_leg_id(), request_id, self, owner, self._loop.time())
        self.legs[leg.id] = leg
        self.account.opened(request_id)
        return leg

    def _send(self, **command: Any) -> None:
        assert self.info is not None
        self._outbox.append(worker_pb2.LinkDown(incarnation=self.info.incarnation, **command))
        self._outbox_filled.set()

    # ---- the stream

    async def _run(self) -> None:
        backoff_s = FIRST_BACKOFF_S
        async with grpc.aio.insecure_channel(self.member.address, options=channel_options()) as channel:
            stub = worker_pb2_grpc.WorkerStub(channel)
            while True:
                reason = await self._live(stub)
                backoff_s = FIRST_BACKOFF_S if self.state == "ready" else min(2 * backoff_s, LAST_BACKOFF_S)
                self._set_lost(reason)
                await asyncio.sleep(backoff_s)

    async def _live(self, stub: Any) -> str:
        """One life of the stream; returns why it ended."""
        call = stub.Link()
        self._outbox.clear()
        self._outbox_filled.clear()
        writer: asyncio.Task[None] | None = None
        try:
            hello = worker_pb2.Hello(
                peer_name=self._observer.router_name,
                peer_kind="router",
                membership_epoch=self._observer.membership_epoch,
            )
            await call.write(worker_pb2.LinkDown(incarnation=self.member.incarnation, hello=hello))
            async with asyncio.timeout(self._waits.welcome_s):
                first = await call.read()
            self._welcome(first)
            writer = self._loop.create_task(self._write(call), name=f"link writer {self.member.key}")
            while (message := await call.read()) is not grpc.aio.EOF:
                self._take(message)
            return "it ended the link"
        except _BrokenLink as error:
            return one_line(error)
        except TimeoutError:
            return f"no Welcome within {self._waits.welcome_s:g} s"
        except grpc.aio.AioRpcError as error:
            return f"{error.code().name} {one_line(Exception(error.details() or ''))}"
        except asyncio.InvalidStateError as error:
            return one_line(error)
        except (KeyError, ValueError) as error:
            return f"it sent a malformed message: {one_line(error)}"
        except Exception as error:
            logger.exception("the link to %s broke by our own fault", self.label)
            return f"internal error of the router: {one_line(error)}"
        finally:
            call.cancel()
            if writer is not None:
                writer.cancel()
                await asyncio.gather(writer, return_exceptions=True)

    async def _write(self, call: Any) -> None:
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):  # the reader says why
            while True:
                await self._outbox_filled.wait()
                self._outbox_filled.clear()
                while self._outbox:
                    await call.write(self._outbox.popleft())

    def _welcome(self, message: Any) -> None:
        if message is grpc.aio.EOF or message.WhichOneof("event") != "welcome":
            raise _BrokenLink("it did not begin with a Welcome")
        welcome = message.welcome
        if self.member.incarnation not in (0, message.incarnation):
            raise _BrokenLink(f"incarnation {message.incarnation} answered, {self.member.incarnation} was expected")
        info = InstanceInfo(
            name=welcome.name,
            role=role_from_proto(welcome.role),
            incarnation=Incarnation(message.incarnation),
            pid=welcome.pid,
            model=model_from_proto(welcome.model),
            num_blocks=welcome.num_blocks,
            block_size=max(1, welcome.block_size),
            max_num_seqs=welcome.max_num_seqs,
            max_queued_tokens=welcome.max_queued_tokens,
            threads=welcome.threads,
            kv_bytes=welcome.kv_bytes,
        )
        if info.role != self.member.role:
            raise _BrokenLink(f"{info.label} is a {info.role} instance, a {self.member.role} one was expected")
        objection = self._observer.objection(self, info)
        if objection is not None:
            raise _BrokenLink(objection)
        self.info = info
        self.account = Account(Load(free_blocks=info.num_blocks, room_blocks=info.num_blocks))
        self.heard_s = self._loop.time()
        self._set_state("ready")
        logger.info("link to %s at %s is ready", info.label, self.member.address)

    def _take(self, message: worker_pb2.LinkUp) -> None:
        assert self.info is not None
        if message.incarnation != self.info.incarnation:
            raise _BrokenLink(f"a message of incarnation {message.incarnation} came, {self.info.incarnation} is linked")
        self.heard_s = self._loop.time()
        match message.WhichOneof("event"):
            case "tokens":
                self._take_tokens(message.tokens)
            case "load":
                self.account.on_load(load_from_proto(message.load))
                self._observer.link_changed(self)
            case "started":
                self._deliver(message.started.leg_id, started_from_proto(message.started))
            case "handed_off":
                self._deliver(message.handed_off.leg_id, handed_off_from_proto(message.handed_off))
            case "refused":
                self._take_refusal(message.refused)
            case "ended":
                event = ended_from_proto(message.ended, self.member.role)
                self._deliver(message.ended.leg_id, event, last=True)
            case _:
                pass  # an event of a later version

    def _take_tokens(self, tokens: worker_pb2.StepTokens) -> None:
        role = self.member.role
        rows = zip(tokens.leg_ids, tokens.indices, tokens.token_ids, tokens.finish, strict=True)
        for leg_id, index, token_id, finish in rows:
            self._deliver(leg_id, Token(role=role, index=index, token_id=token_id, finish=finish_from_proto(finish)))

    def _take_refusal(self, message: worker_pb2.Refused) -> None:
        event = refused_from_proto(message, self.member.role)
        if event.reason == "busy":
            self.account.on_busy(message.queued_tokens)
            self._loop.call_later(self._waits.busy_retry_s, self._ask_again, self.account)
        elif event.reason == "draining":
            self.account.on_draining()
        self._deliver(message.leg_id, event, last=True)

    def _ask_again(self, account: Account) -> None:
        if account is self.account and account.full:
            account.ask_again()
            self._observer.link_changed(self)

    def _deliver(self, leg_id: int, event: LegEvent, *, last: bool = False) -> None:
        leg = self.legs.get(LegId(leg_id))
        if leg is None:
            return  # it ended here while the message was on its way
        if last:
            leg.is_open = False
            del self.legs[leg.id]
            self.account.settle(leg.request_id)
        leg.owner.on_leg_event(leg, event)
        if last and self.retiring and not self.legs:
            self._observer.link_changed(self)

    # ---- state

    def _set_state(self, state: LinkState) -> None:
        if state != self.state:
            self.state = state
            self.note_state()
            self._observer.link_changed(self)

    def note_state(self) -> None:
        """Keep since when it is what it is; to be called when that may have changed."""
        state: ShownState = "draining" if self.state == "ready" and self.draining else self.state
        self.shown = self.shown.then(state, self._loop.time())

    def _set_lost(self, reason: str, *, on_purpose: bool = False) -> None:
        """From here on nothing is dispatched to it; every leg on it is over."""
        if on_purpose:
            logger.info("link to %s is closed: %s", self.label, reason)
        elif self.state == "ready":
            logger.warning("link to %s is lost with %d legs: %s", self.label, len(self.legs), reason)
        elif self.state == "connecting":
            logger.info("no link to %s at %s yet: %s", self.member.key, self.member.address, reason)
        legs, self.legs = list(self.legs.values()), {}
        self.account = Account(Load())
        self._set_state("lost")
        for leg in legs:
            leg.is_open = False
            detail = f"{self.member.role} instance {leg.label} was lost: {reason}"
            leg.owner.on_leg_event(leg, Lost(role=self.member.role, detail=detail))

    def __repr__(self) -> str:
        return f"<Link [{self.label}, {self.state}, {len(self.legs)} legs]>"
