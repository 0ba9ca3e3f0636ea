"""One connection of a reader's to the tcp listener: its calls, one at a time, and what comes while a pull is served.

While a pull is served its connection is watched: a reader that closes it ends the pull at once, one that has done with
payloads of a data plane says so in between. Decides nothing about tickets; that is the service's.
"""

import asyncio
import logging
import socket
from typing import Any

from google.protobuf.message import DecodeError

from biphase.kvtransfer.refusals import KvRefused
from biphase.kvtransfer.service import KvService
from biphase.kvtransfer.signature import KvSignatureValue
from biphase.kvtransfer.tcp.connection import PIECE_S, Connection
from biphase.kvtransfer.tcp.messages import (
    PREFIX_BYTES,
    Kind,
    PullCall,
    WireError,
    message,
    prefix,
    read_body,
    read_count,
    read_epoch,
    read_prefix,
    read_pull,
    read_ticket,
)
from biphase.kvtransfer.tcp.sink import InlineSink, PlaneSink
from biphase.kvtransfer.wire import DataPlane, PayloadSender
from biphase.protos import kv_pb2

_log = logging.getLogger(__name__)

_BUFFER_BYTES = 64 * 1024


class Served:
    """``has_called``: it has made a whole call. ``idle_since_s``: on the loop's clock, None while a call is answered."""

    def __init__(
        self, sock: socket.socket, service: KvService, planes: dict[str, DataPlane], piece_s: float = PIECE_S
    ) -> None:
        self._connection = Connection(sock, piece_s)
        self._service = service
        self._planes = planes
        self._piece_s = piece_s
        self._buffer = bytearray(_BUFFER_BYTES)
        self._start = self._end = 0
        self._pulling: tuple[asyncio.Task[object], PlaneSink | None] | None = None
        self._draining: PlaneSink | None = None
        self._drained: asyncio.TimerHandle
        self._late: asyncio.TimerHandle | None = None
        self._loop = asyncio.get_running_loop()
        self.has_called = False
        self.idle_since_s: float | None = self._loop.time()

    @property
    def closed(self) -> bool:
        return self._connection.broken is not None

    def give_way(self, reason: str) -> None:
        """Close it for another."""
        _log.info("a connection for KV from %s is closed: %s", self._connection.peer, reason)
        self._connection.break_with(reason)

    async def run(self) -> None:
        """Until the reader has closed it, or the task is cancelled."""
        connection = self._connection
        self._expect_soon()
        try:
            while True:
                call = await self._next_call()
                self.idle_since_s, self.has_called = None, True
                await self._answer(call)
                self.idle_since_s = self._loop.time()
        except WireError as error:
            _log.warning("a connection for KV from %s is closed: %s", connection.peer, error)
        except ConnectionError as error:
            _log.debug("a connection for KV has ended: %s", error)
        finally:
            self.close()

    def close(self, _: object = None) -> None:
        """Also where its task was cancelled before it began."""
        self._connection.break_with("closed by us")
        self._end_drain()
        self._is_whole()

    async def _answer(self, body: dict[str, Any]) -> None:
        call = body.get("call")
        if call == "pull":
            await self._pull(body)
            return
        if call == "prepare":
            await self._prepare(body)
            return
        try:
            if call == "handshake":
                reply = {"signature": self._service.handshake(_signature(body)).to_proto().SerializeToString()}
            elif call == "release":
                num_bytes = read_count({"bytes": 0, **body}, "bytes")
                self._service.release(read_ticket(body), read_epoch(body), read_count(body, "incarnation"), num_bytes)
                reply = {}
            else:
                raise WireError(f"a call of {call!r:.40}")
        except KvRefused as refused:
            reply = _refusal(refused)
        await self._connection.send([message(Kind.REPLY, reply)])

    # A pull.

    async def _pull(self, body: dict[str, Any]) -> None:
        call, connection = read_pull(body), self._connection
        sink: InlineSink | PlaneSink = InlineSink(connection)
        if call.plane:
            try:
                sender = await self._sender(call)
            except KvRefused as refused:
                await connection.send([message(Kind.REPLY, _refusal(refused))])
                return
            except ConnectionError as error:
                await connection.send([message(Kind.REPLY, {"unavailable": str(error)})])
                return
            sink = PlaneSink(connection, sender)
        task = asyncio.current_task()
        assert task is not None
        well = False
        try:
            if isinstance(sink, PlaneSink):
                await sink.send_message(message(Kind.REPLY, {"answer": sender.answer}))
            self._pulling = (task, sink if isinstance(sink, PlaneSink) else None)
            connection.on_readable(self._heard)
            await self._service.serve(call.order, sink)
            well = True
            last = prefix(Kind.END)
        except KvRefused as refused:
            if not sink.aligned:
                raise ConnectionError(f"a pull ended in mid-frame: {refused}") from None
            last = message(Kind.REPLY, _refusal(refused))
        except ConnectionError as error:
            if connection.broken is not None or not sink.aligned:
                raise
            last = message(Kind.REPLY, {"unavailable": str(error)})
        except asyncio.CancelledError:
            if connection.broken is None:
                raise
            task.uncancel()  # it was _heard
            raise ConnectionError(connection.broken) from None
        finally:
            connection.on_readable(None)
            self._pulling = None
            if isinstance(sink, PlaneSink):
                if well and sink.num_shown > 0:
                    self._drain(sink)
                else:
                    sink.void()
        await connection.send([last])

    async def _prepare(self, body: dict[str, Any]) -> None:
        """What a plane needs for this reader is begun, and nothing is sent: its pulls find it later."""
        try:
            sender = await self._sender(read_pull(body))
            sender.close()
            reply: dict[str, Any] = {"answer": sender.answer}
        except KvRefused as refused:
            reply = _refusal(refused)
        except WireError:
            raise
        except ConnectionError as error:
            reply = {"unavailable": str(error)}
        await self._connection.send([message(Kind.REPLY, reply)])

    async def _sender(self, call: PullCall) -> PayloadSender:
        """A plane keeps slots or a group for its reader: only for one that holds a ticket."""
        plane = self._planes.get(call.plane)
        if plane is None:
            raise ConnectionError(f"{self._service.signature.instance} has no {call.plane}")
        await self._service.admit(call.order)
        return await plane.sender(call.hello, self._connection.peer)

    def _drain(self, sink: PlaneSink) -> None:
        """The reader of a pull that went well may take its last payloads, until its next call at most."""
        self._draining = sink
        self._drained = asyncio.get_running_loop().call_later(self._piece_s, sink.void)

    def _end_drain(self) -> None:
        if self._draining is not None:
            self._drained.cancel()
            self._draining.void()
            self._draining = None

    def _heard(self) -> None:
        """Something has come while a pull is served: payloads that the reader has done with, or its end."""
        assert self._pulling is not None
        task, sink = self._pulling
        try:
            self._receive()
            while self._end - self._start >= PREFIX_BYTES:
                head = read_prefix(self._buffer, self._start)
                if head.kind is not Kind.TAKEN or sink is None:
                    raise WireError(f"a {head.kind.name} while a pull is served")
                until = self._start + PREFIX_BYTES + head.reference_bytes
                if until > self._end:
                    return
                sink.taken(bytes(self._buffer[self._start + PREFIX_BYTES : until]))
                self._start = until
        except ConnectionError as error:
            self._connection.break_with(str(error))
            task.cancel()

    # Calls.

    async def _next_call(self) -> dict[str, Any]:
        while True:
            head = read_prefix(await self._some(PREFIX_BYTES))
            self._expect_soon()
            if head.kind is Kind.CALL:
                self._end_drain()
                body = read_body(await self._some(head.size))
                self._is_whole()
                return body
            if head.kind is not Kind.TAKEN:  # of a pull that has ended
                raise WireError(f"a {head.kind.name} in place of a call")
            reference = await self._some(head.reference_bytes)
            if self.has_called:
                self._is_whole()
            if self._draining is not None:
                self._draining.taken(reference)
                if self._draining.num_shown <= 0:
                    self._end_drain()

    async def _some(self, count: int) -> bytes:
        """The next bytes of that number."""
        while self._end - self._start < count:
            if count > len(self._buffer):
                self._buffer += bytes(count - len(self._buffer))
            if self._start < self._end:
                self._expect_soon()
            if not self._receive():
                await self._connection.wait_readable()
        self._start += count
        return bytes(self._buffer[self._start - count : self._start])

    def _expect_soon(self) -> None:
        """A first call, and the rest of whatever has begun to come."""
        if self._late is None:
            due_s = self._loop.time() + self._piece_s
            self._late = self._loop.call_at(due_s, self._is_late, due_s)

    def _is_late(self, due_s: float) -> None:
        self._late = None
        if self._loop.time() - due_s > self._piece_s / 2:  # our own loop was held up: it may be there
            self._expect_soon()
        else:
            self._connection.break_with(f"no whole call came within {self._piece_s:g} s")

    def _is_whole(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _receive(self) -> int:
        if self._start == self._end:
            self._start = self._end = 0
        elif self._end == len(self._buffer) or self._start > len(self._buffer) // 2:
            kept = self._buffer[self._start : self._end]
            self._buffer[: len(kept)] = kept
            self._start, self._end = 0, len(kept)
        with memoryview(self._buffer)[self._end :] as free:
            count = self._connection.receive_some([free])
        self._end += count
        return count


def _signature(body: dict[str, Any]) -> KvSignatureValue:
    data = body.get("signature")
    try:
        if not isinstance(data, bytes):
            raise WireError(f"a signature that is {data!r:.40}")
        return KvSignatureValue.from_proto(kv_pb2.KvSignature.FromString(data))
    except (DecodeError, ValueError) as error:
        raise WireError(f"a handshake without a signature: {error}") from None


def _refusal(refused: KvRefused) -> dict[str, Any]:
    return {"refused": str(refused), "because": refused.because}
