"""The servicer of biphase.v1.Worker: greets peers, reads their commands, answers GetStats.

Whatever a peer sends, the worker lives on: bytes that are no message and messages for another incarnation end that
stream with a status that says so, a leg that makes no sense is refused on it. Only controllers give orders, and of those
only the one of the highest membership epoch: the links of others end when it comes.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, Protocol

import grpc
import grpc.aio

from biphase.engine import link as links
from biphase.engine.orders import Orders
from biphase.engine.sequence import Refusal
from biphase.protos import convert, worker_pb2
from biphase.protos.errors import one_line
from biphase.protos.grpc_setup import Undecodable
from biphase.protos.ids import LegId, RequestId
from biphase.protos.values import ROLES, Role

_log = logging.getLogger(__name__)


class LinkHandler(Protocol):
    """The worker behind the links. Every call is quick and raises nothing a peer could provoke."""

    def link_opened(self, link: links.Link) -> None: ...

    def link_closed(self, link: links.Link) -> None: ...

    def open_leg(self, link: links.Link, leg: links.OpenLeg) -> None: ...

    def cancel_leg(self, link: links.Link, leg_id: LegId, reason: str, *, unless_handed_off: bool) -> None: ...

    def counters(self) -> dict[str, int]: ...

    def transports(self) -> dict[str, str]: ...


Ending = tuple[grpc.StatusCode, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Life:
    """Who answers: one role under one incarnation."""

    identity: links.Identity
    handler: LinkHandler
    orders: Orders

    def wrong_incarnation(self, meant: int) -> str:
        us = self.identity
        return f"{us.name} is incarnation {us.incarnation}, the message is meant for incarnation {meant}"


class LinkService:
    """The servicer of biphase.v1.Worker, for the lives that an instance has one after the other: between them it answers
    that it is away."""

    def __init__(self) -> None:
        self._life: _Life | None = None
        self._away = "the instance is not ready yet"
        self._links: set[links.Link] = set()
        self._no_links = asyncio.Event()
        self._no_links.set()
        self._highest_epoch = 0

    def begin(self, identity: links.Identity, handler: LinkHandler, orders: Orders) -> None:
        """From now on links are welcome, to that life."""
        self._life = _Life(identity=identity, handler=handler, orders=orders)

    async def end(self, reason: str, within_s: float) -> None:
        """Take no links until the next life begins. Those that are open end for ``reason`` after what waits on them has been
        written; those that do not read it are cut after ``within_s``."""
        self._life, self._away = None, reason
        for link in self._links:
            link.end(grpc.StatusCode.UNAVAILABLE, reason)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                await self._no_links.wait()
        for link in self._links:
            link.cut.set()
        await self._no_links.wait()

    @property
    def num_links(self) -> int:
        return len(self._links)

    async def GetStats(
        self, request: worker_pb2.StatsRequest, context: grpc.aio.ServicerContext
    ) -> worker_pb2.WorkerStats:
        life = self._life
        if life is None:
            await context.abort(grpc.StatusCode.UNAVAILABLE, self._away)
        assert life is not None  # abort raises
        identity = life.identity
        return worker_pb2.WorkerStats(
            name=identity.name,
            role=convert.role_to_proto(identity.role),
            incarnation=identity.incarnation,
            pid=identity.pid,
            counters={**life.handler.counters(), "links": len(self._links)},
            transports=life.handler.transports(),
        )

    async def Link(self, requests: AsyncIterator[Any], context: grpc.aio.ServicerContext) -> None:
        hello = await anext(aiter(requests), None)
        life = self._life
        refusal = (grpc.StatusCode.UNAVAILABLE, self._away) if life is None else self._reason_against(life, hello)
        if refusal is not None:
            _log.warning("link refused: %s", refusal[1])
            await context.abort(*refusal)
        assert life is not None and isinstance(hello, worker_pb2.LinkDown)
        peer = hello.hello
        link = links.Link(life.identity.incarnation, peer.peer_name, peer.peer_kind, peer.membership_epoch)
        link.welcome(life.identity)
        self._links.add(link)
        self._no_links.clear()
        life.handler.link_opened(link)
        _log.info("link opened by %s %s", link.peer_kind, link.peer_name)
        reading = asyncio.create_task(self._read(life, link, requests))
        writing = asyncio.create_task(link.pump(context))
        cutting = asyncio.create_task(link.cut.wait())
        ending: Ending | None = None
        try:
            await asyncio.wait({reading, writing, cutting}, return_when=asyncio.FIRST_COMPLETED)
            if link.cut_reason is not None:
                ending = (grpc.StatusCode.RESOURCE_EXHAUSTED, link.cut_reason)
            elif link.ending is not None:
                ending = link.ending
            elif reading.done() and not reading.cancelled() and reading.exception() is None:
                ending = reading.result()
        finally:
            # all of the books first: gRPC may cancel this task a second time while it waits
            link.close()
            life.handler.link_closed(link)
            self._links.discard(link)
            if not self._links:
                self._no_links.set()
            _log.info("link of %s closed%s", link.peer_name, f": {ending[1]}" if ending else "")
            for task in (reading, writing, cutting):
                task.cancel()
                task.add_done_callback(_note_break)
            await asyncio.wait({reading, writing, cutting})
        if ending is not None:
            await context.abort(*ending)

    def _reason_against(self, life: _Life, hello: Any) -> Ending | None:
        """Why a stream that begins with this is no link, None where it is."""
        if hello is None:
            return grpc.StatusCode.INVALID_ARGUMENT, "the stream ended before its Hello"
        if isinstance(hello, Undecodable):
            return grpc.StatusCode.INVALID_ARGUMENT, str(hello)
        if hello.WhichOneof("command") != "hello":
            first = hello.WhichOneof("command") or "nothing known"
            return grpc.StatusCode.INVALID_ARGUMENT, f"a link begins with hello, not with {first}"
        if hello.incarnation not in (0, life.identity.incarnation):  # 0: whoever you are
            return grpc.StatusCode.FAILED_PRECONDITION, life.wrong_incarnation(hello.incarnation)
        if hello.hello.peer_kind == "controller":
            epoch = hello.hello.membership_epoch
            if epoch < self._highest_epoch:
                return self._superseded(epoch)
            self._obey_from(epoch)
        return None

    def _obey_from(self, epoch: int) -> None:
        """Controllers of older epochs command nothing any more."""
        self._highest_epoch = epoch
        for link in self._links:
            if link.peer_kind == "controller" and link.epoch < epoch:
                link.end(*self._superseded(link.epoch))

    def _superseded(self, epoch: int) -> Ending:
        text = f"membership epoch {epoch} has given way to epoch {self._highest_epoch}"
        return grpc.StatusCode.FAILED_PRECONDITION, text

    async def _read(self, life: _Life, link: links.Link, requests: AsyncIterator[Any]) -> Ending | None:
        """Take commands until the peer is done (None) or has said what ends a link."""
        async for message in requests:
            if isinstance(message, Undecodable):
                return grpc.StatusCode.INVALID_ARGUMENT, str(message)
            if message.incarnation != life.identity.incarnation:
                return grpc.StatusCode.FAILED_PRECONDITION, life.wrong_incarnation(message.incarnation)
            if not link.is_open:
                continue  # it ends: who says anything on it does not know that yet
            match message.WhichOneof("command"):
                case "open_prefill":
                    self._open(life, "prefill", link, message.open_prefill)
                case "open_decode":
                    self._open(life, "decode", link, message.open_decode)
                case "cancel":
                    cancel = message.cancel
                    leg_id = LegId(cancel.leg_id)
                    life.handler.cancel_leg(link, leg_id, cancel.reason, unless_handed_off=cancel.unless_handed_off)
                case "drain" | "resume" | "flip" | "retire" as order:
                    if link.peer_kind != "controller":
                        text = f"{order} is for controllers to ask, {link.peer_name} is a {link.peer_kind or 'nobody'}"
                        return grpc.StatusCode.PERMISSION_DENIED, text
                    self._order(life.orders, order, link, message)
                case other:
                    return grpc.StatusCode.INVALID_ARGUMENT, f"{other or 'an unknown command'} makes no sense here"
        return None

    def _order(self, orders: Orders, order: str, link: links.Link, message: Any) -> None:
        _log.info("asked to %s by %s %s", order, link.peer_kind, link.peer_name)
        refusal = None
        match order:
            case "drain":
                refusal = orders.drain(message.drain.grace_s)
            case "resume":
                refusal = orders.resume()
            case "flip":
                flip = message.flip
                known = flip.role in (convert.role_to_proto(role) for role in ROLES)
                role = convert.role_from_proto(flip.role) if known else None
                refusal = orders.flip(role, flip.incarnation, flip.grace_s)
            case "retire":
                refusal = orders.retire(message.retire.reason)
        if refusal is not None:
            _log.warning("%s refused: %s", order, refusal)
            link.command_refused(order, refusal)

    def _open(self, life: _Life, role: Role, link: links.Link, message: Any) -> None:
        leg_id, us = LegId(message.leg_id), life.identity
        if role != us.role:
            detail = f"{us.name} is a {us.role} instance, it opens no {role} legs"
            link.refused(leg_id, Refusal(reason="invalid", detail=detail))
            return
        if len(message.token_ids) % 4:
            detail = f"token_ids has {len(message.token_ids)} bytes, which is no multiple of 4"
            link.refused(leg_id, Refusal(reason="invalid", detail=detail))
            return
        with_ticket = role == "decode" and message.HasField("ticket")
        life.handler.open_leg(
            link,
            links.OpenLeg(
                role=role,
                leg_id=leg_id,
                request_id=RequestId(message.request_id),
                token_ids=convert.unpack_tokens(message.token_ids),
                num_prompt_tokens=message.num_prompt_tokens,
                sampling=convert.sampling_from_proto(message.sampling),
                refusals=message.refusals,
                ticket=convert.ticket_from_proto(message.ticket) if with_ticket else None,
                pull_epoch=message.pull_epoch if with_ticket else 0,
            ),
        )


def _note_break(task: "asyncio.Task[Any]") -> None:
    """Take a stream task's last error, so that it is told once and in one line."""
    error = None if task.cancelled() else task.exception()
    if error is not None:
        _log.info("a link broke: %s", one_line(error))
