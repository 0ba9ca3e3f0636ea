"""The worker's end of a link: one bidirectional stream per router (or controller), its way out bounded.

Here the wire's messages end: the worker says values, and sees them as values (link_service.py reads the other way).
A peer that does not read what it is sent is cut.
"""

import asyncio
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import grpc

from biphase.engine.sequence import Refusal, TokenOut
from biphase.protos import convert, worker_pb2
from biphase.protos.ids import LegId, RequestId
from biphase.protos.values import (
    FinishReason,
    KvTicket,
    LegOutcome,
    LegStats,
    Load,
    ModelInfo,
    Role,
    Sampling,
    WorkerSignals,
)

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

    def __init__(self, incarnation: int, peer_name: str, peer_kind: str, epoch: int = 0) -> None:
        self.peer_name = peer_name
        self.peer_kind = peer_kind
        self.epoch = epoch
        self.ending: tuple[grpc.StatusCode, str] | None = None
        """What it ends with once what waits is written."""
        self._incarnation = incarnation
        self._outgoing: deque[worker_pb2.LinkUp] = deque()
        self._load: worker_pb2.Load | None = None
        self._signals: worker_pb2.WorkerSignals | None = None
        self._something = asyncio.Event()
        self._open = True
        self.cut_reason: str | None = None
        self.cut = asyncio.Event()

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

    def signals(self, signals: WorkerSignals) -> None:
        """Report them; only the newest wait to be sent."""
        if self._open:
            self._signals = convert.signals_to_proto(signals)
            self._something.set()

    def command_refused(self, command: str, detail: str) -> None:
        message = worker_pb2.CommandRefused(command=command, detail=detail)
        self._send(worker_pb2.LinkUp(incarnation=self._incarnation, command_refused=message))

    @property
    def is_open(self) -> bool:
        return self._open

    def end(self, code: grpc.StatusCode, reason: str) -> None:
        """Nothing more is taken; what waits is still written, then the peer is told why."""
        if self._open:
            self.ending = (code, reason)
            self.close()

    def _send(self, message: worker_pb2.LinkUp) -> None:
        if not self._open:
            return
        if len(self._outgoing) >= MAX_OUTGOING:
            self.cut_reason = f"{self.peer_name} has not read {MAX_OUTGOING} messages, the link is cut"
            self.cut.set()
            self.close()
            return
        self._outgoing.append(message)
        self._something.set()

    def close(self) -> None:
        """Nothing more is taken; what waits is still written where the stream lives."""
        self._open = False
        if self.cut_reason is not None:
            self._outgoing.clear()
            self._load = self._signals = None
        self._something.set()

    async def pump(self, context: Any) -> None:
        """Write what waits until the link is closed and empty."""
        while True:
            if self._outgoing:
                await context.write(self._outgoing.popleft())
            elif self._load is not None:
                load, self._load = self._load, None
                await context.write(worker_pb2.LinkUp(incarnation=self._incarnation, load=load))
            elif self._signals is not None:
                signals, self._signals = self._signals, None
                await context.write(worker_pb2.LinkUp(incarnation=self._incarnation, signals=signals))
            elif self._open:
                self._something.clear()
                await self._something.wait()
            else:
                return

    def __repr__(self) -> str:
        return f"<Link {self.peer_kind} {self.peer_name} [{len(self._outgoing)} waiting]>"


_FINISH = {finish: convert.finish_to_proto(finish) for finish in (None, *FinishReason)}
