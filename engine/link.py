"""The worker's end of a link: one bidirectional stream per router (or controller), its way out bounded.

Here the wire's messages end: the worker sees values, and says values. Whatever a peer sends, the worker lives on:
bytes that are no message and messages for another incarnation end that stream with a status that says so, a leg that
makes no sense is refused on it. A peer that does not read what it is sent is cut.
"""

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import grpc
import grpc.aio

from biphase.engine.sequence import Refusal, TokenOut
from biphase.protos import convert, worker_pb2
from biphase.protos.errors import one_line
from biphase.protos.grpc_setup import Undecodable
from biphase.protos.ids import LegId, RequestId
from biphase.protos.values import FinishReason, KvTicket, LegOutcome, LegStats, Load, ModelInfo, Role, Sampling

_log = logging.getLogger(__name__)

MAX_OUTGOING = 1024
"""Messages that may wait for a peer to read them; at one per step that is minutes."""

_REFUSAL_TO_PROTO = {
    "busy": worker_pb2.REFUSAL_BUSY,
    "draining": worker_pb2.REFUSAL_DRAINING,
    "invalid": worker_pb2.REFUSAL_INVALID,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenLeg:
    """A leg that a router wants opened. ``token_ids``: the prompt, then forced output tokens."""

    role: Role
    leg_id: LegId
    request_id: RequestId
    token_ids: list[int]
    num_prompt_tokens: int
    sampling: Sampling
    refusals: int
    ticket: KvTicket | None = None
    pull_epoch: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """Who this worker is and what it can hold: the content of its Welcome."""

    name: str
    role: Role
    incarnation: int
    pid: int
    model: ModelInfo
    kv_address: str
    num_blocks: int
    block_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_queued_tokens: int
    threads: int
    kv_bytes: int
    version: str


class Link:
    """One peer's stream as the worker sees it: where its legs' events go. Never blocks; cut when too much waits."""

    def __init__(self, incarnation: int, peer_name: str, peer_kind: str) -> None:
        self.peer_name = peer_name
        self.peer_kind = peer_kind
        self._incarnation = incarnation
        self._outgoing: deque[worker_pb2.LinkUp] = deque()
        self._load: worker_pb2.Load | None = None
        self._something = asyncio.Event()
        self._open = True
        self.cut_reason: str | None = None

    def welcome(self, identity: Identity) -> None:
        message = worker_pb2.Welcome(
            name=identity.name,
            role=convert.role_to_proto(identity.role),
            pid=identity.pid,
            model=convert.model_to_proto(identity.model),
            kv_address=identity.kv_address,
            num_blocks=identity.num_blocks,
            block_size=identity.block_size,
            max_num_seqs=identity.max_num_seqs,
            max_num_batched_tokens=identity.max_num_batched_tokens,
            max_queued_tokens=identity.max_queued_tokens,
            threads=identity.threads,
            kv_bytes=identity.kv_bytes,
            version=identity.version,
        )
        self._send(worker_pb2.LinkUp(incarnation=self._incarnation, welcome=message))

    def refused(self, leg_id: LegId, refusal: Refusal) -> None:
        message = worker_pb2.Refused(
            leg_id=leg_id,
            reason=_REFUSAL_TO_PROTO[refusal.reason],
            detail=refusal.detail,
            queued_tokens=refusal.queued_tokens,
        )
        self._send(worker_pb2.LinkUp(incarnation=self._incarnation, refused=message))

    def started(self, leg_id: LegId, ticket: KvTicket | None, queue_ms: float) -> None:
        wire_ticket = None if ticket is None else convert.ticket_to_proto(ticket)
        message = worker_pb2.Started(leg_id=leg_id, ticket=wire_ticket, queue_ms=queue_ms)
        self._send(worker_pb2.LinkUp(incarnation=self._incarnation, started=message))

    def handed_off(self, leg_id: LegId, *, num_bytes: int, ms: float, exposed_ms: float, first_token: int) -> None:
        message = worker_pb2.HandedOff(
            leg_id=leg_id, bytes=num_bytes, ms=ms, exposed_ms=exposed_ms, first_token=first_token
        )
        self._send(worker_pb2.LinkUp(incarnation=self._incarnation, handed_off=message))

    def tokens(self, tokens: Iterable[tuple[LegId, TokenOut]]) -> None:
        """One step's tokens of all of this link's legs, in one message."""
        message = worker_pb2.StepTokens()
        for leg_id, token in tokens:
            message.leg_ids.append(leg_id)
            message.indices.append(token.index)
            message.token_ids.append(token.token_id)
            message.finish.append(_FINISH[token.finish])
        self._send(worker_pb2.LinkUp(incarnation=self._incarnation, tokens=message))

    def ended(self, leg_id: LegId, outcome: LegOutcome, detail: str, stats: LegStats) -> None:
        message = worker_pb2.LegEnded(
            leg_id=leg_id,
            outcome=convert.outcome_to_proto(outcome),
            detail=detail,
            stats=convert.stats_to_proto(stats),
        )
        self._send(worker_pb2.LinkUp(incarnation=self._incarnation, ended=message))

    def load(self, load: Load) -> None:
        """Announce the load; only the newest waits to be sent."""
        if self._open:
            self._load = convert.load_to_proto(load)
            self._something.set()

    def _send(self, message: worker_pb2.LinkUp) -> None:
        if not self._open:
            return
        if len(self._outgoing) >= MAX_OUTGOING:
            self.cut_reason = f"{self.peer_name} has not read {MAX_OUTGOING} messages, the link is cut"
            self.close()
            return
        self._outgoing.append(message)
        self._something.set()

    def close(self) -> None:
        """Nothing more is taken; what waits is still written where the stream lives."""
        self._open = False
        if self.cut_reason is not None:
            self._outgoing.clear()
            self._load = None
        self._something.set()

    async def pump(self, context: Any) -> None:
        """Write what waits until the link is closed and empty."""
        while True:
            if self._outgoing:
                await context.write(self._outgoing.popleft())
            elif self._load is not None:
                load, self._load = self._load, None
                await context.write(worker_pb2.LinkUp(incarnation=self._incarnation, load=load))
            elif self._open:
                self._something.clear()
                await self._something.wait()
            else:
                return

    def __repr__(self) -> str:
        return f"<Link {self.peer_kind} {self.peer_name} [{len(self._outgoing)} waiting]>"


_FINISH = {finish: convert.finish_to_proto(finish) for finish in (None, *FinishReason)}


class LinkHandler(Protocol):
    """The worker behind the links. Every call is quick and raises nothing a peer could provoke."""

    def link_opened(self, link: Link) -> None: ...

    def link_closed(self, link: Link) -> None: ...

    def open_leg(self, link: Link, leg: OpenLeg) -> None: ...

    def cancel_leg(self, link: Link, leg_id: LegId, reason: str, *, unless_handed_off: bool) -> None: ...

    def drain(self) -> None: ...

    def counters(self) -> dict[str, int]: ...


Ending = tuple[grpc.StatusCode, str]


class LinkService:
    """The servicer of biphase.v1.Worker."""

    def __init__(self, identity: Identity, handler: LinkHandler) -> None:
        self._identity = identity
        self._handler = handler
        self._links: set[Link] = set()
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
        )

    async def Link(self, requests: AsyncIterator[Any], context: grpc.aio.ServicerContext) -> None:
        hello = await anext(aiter(requests), None)
        refusal = self._reason_against(hello)
        if refusal is not None:
            _log.warning("link refused: %s", refusal[1])
            await context.abort(*refusal)
        assert isinstance(hello, worker_pb2.LinkDown)
        link = Link(self._identity.incarnation, hello.hello.peer_name, hello.hello.peer_kind)
        link.welcome(self._identity)
        self._links.add(link)
        self._no_links.clear()
        self._handler.link_opened(link)
        _log.info("link opened by %s %s", link.peer_kind, link.peer_name)
        reading = asyncio.create_task(self._read(link, requests))
        writing = asyncio.create_task(link.pump(context))
        ending: Ending | None = None
        try:
            await asyncio.wait({reading, writing}, return_when=asyncio.FIRST_COMPLETED)
            if link.cut_reason is not None:
                ending = (grpc.StatusCode.RESOURCE_EXHAUSTED, link.cut_reason)
            elif reading.done() and not reading.cancelled() and reading.exception() is None:
                ending = reading.result()
        finally:
            link.close()
            self._handler.link_closed(link)
            reading.cancel()
            writing.cancel()
            await asyncio.wait({reading, writing})
            for task in (reading, writing):
                error = None if task.cancelled() else task.exception()
                if error is not None:
                    _log.info("link of %s broke: %s", link.peer_name, one_line(error))
            self._links.discard(link)
            if not self._links:
                self._no_links.set()
            _log.info("link of %s closed%s", link.peer_name, f": {ending[1]}" if ending else "")
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

    async def _read(self, link: Link, requests: AsyncIterator[Any]) -> Ending | None:
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

    def _open(self, role: Role, link: Link, message: Any) -> None:
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
            OpenLeg(
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
