"""The serving end of the tcp wire: one listener, a task per connection, one call of a connection at a time.

While a pull is served its connection is watched: a reader that closes it ends the pull at once, one that has done with
payloads of a data plane says so in between. Decides nothing about tickets; that is the service's.
"""

import asyncio
import logging
import socket
from collections.abc import Iterable
from typing import Any

from google.protobuf.message import DecodeError

from biphase.kvtransfer.refusals import KvRefused
from biphase.kvtransfer.service import KvService
from biphase.kvtransfer.signature import KvSignatureValue
from biphase.kvtransfer.tcp.connection import PIECE_S, Connection, listen
from biphase.kvtransfer.tcp.messages import (
    PREFIX_BYTES,
    Kind,
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
from biphase.kvtransfer.wire import DataPlane
from biphase.protos import kv_pb2

_log = logging.getLogger(__name__)

_BUFFER_BYTES = 64 * 1024
_ACCEPT_AGAIN_S = 0.1
MOST_CONNECTIONS = 1024
"""Further ones are closed at once."""


class TcpKvServer:
    """Handshake, pull and release of one service over raw sockets. ``planes``: the ways for payloads beside the stream."""

    def __init__(self, service: KvService, planes: Iterable[DataPlane] = (), *, piece_s: float = PIECE_S) -> None:
        self._service = service
        self._planes = {plane.name: plane for plane in planes}
        self._piece_s = piece_s
        self._listener: socket.socket | None = None
        self._accepting: asyncio.Task[None] | None = None
        self._connections: set[asyncio.Task[None]] = set()

    async def start(self, host: str, port: int) -> int:
        """Listen, and return the bound port. Raises SetupError when it is taken."""
        self._listener = listen(host, port)
        self._accepting = asyncio.get_running_loop().create_task(self._accept(self._listener))
        return int(self._listener.getsockname()[1])

    async def stop(self) -> None:
        """Stop listening, and end every connection with what it serves."""
        tasks = [*self._connections] + ([self._accepting] if self._accepting is not None else [])
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        self._accepting = None
        if self._listener is not None:
            self._listener.close()
            self._listener = None

    def counters(self) -> dict[str, int]:
        return {"tcp_connections": len(self._connections)}

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                sock, _ = await loop.sock_accept(listener)
            except OSError as error:  # out of file descriptors, or the far end has given up already
                _log.warning("cannot accept a connection for KV: %s", error.strerror)
                await asyncio.sleep(_ACCEPT_AGAIN_S)
                continue
            if len(self._connections) >= MOST_CONNECTIONS:
                _log.warning("a connection for KV is closed: there are %d", MOST_CONNECTIONS)
                sock.close()
                continue
            connection = Served(sock, self._service, self._planes, self._piece_s)
            task = loop.create_task(connection.run())
            self._connections.add(task)
            task.add_done_callback(self._ended)
            task.add_done_callback(connection.close)

    def _ended(self, task: "asyncio.Task[None]") -> None:
        self._connections.discard(task)
        if not task.cancelled() and task.exception() is not None:
            _log.error("a connection for KV is closed", exc_info=task.exception())


class Served:
    """One connection of a reader's."""

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

    async def run(self) -> None:
        """Until the reader has closed it, or the task is cancelled."""
        connection = self._connection
        try:
            while True:
                await self._answer(await self._next_call())
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

    async def _answer(self, body: dict[str, Any]) -> None:
        call = body.get("call")
        if call == "pull":
            await self._pull(body)
            return
        try:
            if call == "handshake":
                reply = {"signature": self._service.handshake(_signature(body)).to_proto().SerializeToString()}
            elif call == "release":
                self._service.release(read_ticket(body), read_epoch(body), read_count(body, "incarnation"))
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
            plane = self._planes.get(call.plane)
            try:
                if plane is None:
                    raise ConnectionError(f"{self._service.signature.instance} has no {call.plane}")
                sender = await plane.sender(call.hello, connection.peer)
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
            if head.kind is Kind.CALL:
                self._end_drain()
                return read_body(await self._some(head.size))
            if head.kind is not Kind.TAKEN:  # of a pull that has ended
                raise WireError(f"a {head.kind.name} in place of a call")
            reference = await self._some(head.reference_bytes)
            if self._draining is not None:
                self._draining.taken(reference)
                if self._draining.num_shown <= 0:
                    self._end_drain()

    async def _some(self, count: int) -> bytes:
        """The next bytes of that number."""
        while self._end - self._start < count:
            if count > len(self._buffer):
                self._buffer += bytes(count - len(self._buffer))
            if not self._receive():
                await self._connection.wait_readable()
        self._start += count
        return bytes(self._buffer[self._start - count : self._start])

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
