"""The servicer of biphase.v1.Worker: greets peers, reads their commands, answers GetStats.

Whatever a peer sends, the worker lives on: bytes that are no message and messages for another incarnation end that
stream with a status that says so, a leg that makes no sense is refused on it.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from typing import Any, Protocol

import grpc
import grpc.aio

from biphase.engine import link as links
from biphase.engine.sequence import Refusal
from biphase.protos import convert, worker_pb2
from biphase.protos.errors import one_line
from biphase.protos.grpc_setup import Undecodable
from biphase.protos.ids import LegId, RequestId
from biphase.protos.values import Role

_log = logging.getLogger(__name__)


class LinkHandler(Protocol):
    """The worker behind the links. Every call is quick and raises nothing a peer could provoke."""

    def link_opened(self, link: links.Link) -> None: ...

    def link_closed(self, link: links.Link) -> None: ...

    def open_leg(self, link: links.Link, leg: links.OpenLeg) -> None: ...

    def cancel_leg(self, link: links.Link, leg_id: LegId, reason: str, *, unless_handed_off: bool) -> None: ...

    def drain(self) -> None: ...

    def counters(self) -> dict[str, int]: ...

    def transports(self) -> dict[str, str]: ...


Ending = tuple[grpc.StatusCode, str]


class LinkService:
    """The servicer of biphase.v1.Worker."""

    def __init__(self, identity: links.Identity, handler: LinkHandler) -> None:
        self._identity = identity
        self._handler = handler
        self._links: set[links.Link] = set()
        self._no_links = asyncio.Event()
        self._no_links.set()
        self._highest_epoch = 0

    @property
    def num_links(self) -> int:
        return len(self._links)

    async def GetStats(
        self, request: worker_pb2.StatsRequest, context: grpc.aio.ServicerContext
    ) -> worker_pb2.WorkerStats:
        identity = self._identity
        return worker_pb2.WorkerStats(
            name=identity.name,
            role=convert.role_to_proto(identity.role),
            incarnation=identity.incarnation,
            pid=identity.pid,
            counters={**self._handler.counters(), "links": len(self._links)},
            transports=self._handler.transports(),
        )

    async def Link(self, requests: AsyncIterator[Any], context: grpc.aio.ServicerContext) -> None:
        hello = await anext(aiter(requests), None)
        refusal = self._reason_against(hello)
        if refusal is not None:
            _log.warning("link refused: %s", refusal[1])
            await context.abort(*refusal)
        assert isinstance(hello, worker_pb2.LinkDown)
        link = links.Link(self._identity.incarnation, hello.hello.peer_name, hello.hello.peer_kind)
        link.welcome(self._identity)
        self._links.add(link)
        self._no_links.clear()
        self._handler.link_opened(link)
        _log.info("link opened by %s %s", link.peer_kind, link.peer_name)
        reading = asyncio.create_task(self._read(link, requests))
        writing = asyncio.create_task(link.pump(context))
        cutting = asyncio.create_task(link.cut.wait())
        ending: Ending | None = None
        try:
            await asyncio.wait({reading, writing, cutting}, return_when=asyncio.FIRST_COMPLETED)
            if link.cut_reason is not None:
                ending = (grpc.StatusCode.RESOURCE_EXHAUSTED, link.cut_reason)
            elif reading.done() and not reading.cancelled() and reading.exception() is None:
                ending = reading.result()
        finally:
            # all of the books first: gRPC may cancel this task a second time while it waits
            link.close()
            self._handler.link_closed(link)
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

    async def close(self, within_s: float) -> None:
        """End every link after what waits on it has been written, for as long as ``within_s``."""
        for link in self._links:
            link.close()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                await self._no_links.wait()

    def _reason_against(self, hello: Any) -> Ending | None:
        """Why a stream that begins with this is no link, None where it is."""
        ours = self._identity.incarnation
        if hello is None:
            return grpc.StatusCode.INVALID_ARGUMENT, "the stream ended before its Hello"
        if isinstance(hello, Undecodable):
            return grpc.StatusCode.INVALID_ARGUMENT, str(hello)
        if hello.WhichOneof("command") != "hello":
            first = hello.WhichOneof("command") or "nothing known"
            return grpc.StatusCode.INVALID_ARGUMENT, f"a link begins with hello, not with {first}"
        if hello.incarnation not in (0, ours):  # 0: whoever you are
            return grpc.StatusCode.FAILED_PRECONDITION, self._wrong_incarnation(hello.incarnation)
        if hello.hello.peer_kind == "controller":
            epoch = hello.hello.membership_epoch
            if epoch < self._highest_epoch:
                text = f"membership epoch {epoch} has given way to epoch {self._highest_epoch}"
                return grpc.StatusCode.FAILED_PRECONDITION, text
            self._highest_epoch = epoch
        return None

    def _wrong_incarnation(self, meant: int) -> str:
        identity = self._identity
        return f"{identity.name} is incarnation {identity.incarnation}, the message is meant for incarnation {meant}"

    async def _read(self, link: links.Link, requests: AsyncIterator[Any]) -> Ending | None:
        """Take commands until the peer is done (None) or has said what ends a link."""
        async for message in requests:
            if isinstance(message, Undecodable):
                return grpc.StatusCode.INVALID_ARGUMENT, str(message)
            if message.incarnation != self._identity.incarnation:
                return grpc.StatusCode.FAILED_PRECONDITION, self._wrong_incarnation(message.incarnation)
            match message.WhichOneof("command"):
                case "open_prefill":
                    self._open("prefill", link, message.open_prefill)
                case "open_decode":
                    self._open("decode", link, message.open_decode)
                case "cancel":
                    cancel = message.cancel
                    leg_id = LegId(cancel.leg_id)
                    self._handler.cancel_leg(link, leg_id, cancel.reason, unless_handed_off=cancel.unless_handed_off)
                case "drain":
                    _log.info("asked to drain by %s %s", link.peer_kind, link.peer_name)
                    self._handler.drain()
                case other:
                    return grpc.StatusCode.INVALID_ARGUMENT, f"{other or 'an unknown command'} makes no sense here"
        return None

    def _open(self, role: Role, link: links.Link, message: Any) -> None:
        leg_id = LegId(message.leg_id)
        if role != self._identity.role:
            detail = f"{self._identity.name} is a {self._identity.role} instance, it opens no {role} legs"
            link.refused(leg_id, Refusal(reason="invalid", detail=detail))
            return
        if len(message.token_ids) % 4:
            detail = f"token_ids has {len(message.token_ids)} bytes, which is no multiple of 4"
            link.refused(leg_id, Refusal(reason="invalid", detail=detail))
            return
        with_ticket = role == "decode" and message.HasField("ticket")
        self._handler.open_leg(
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
