"""The frames of one pull as they come in over a connection, their payloads behind them or out of band."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

from biphase.kvtransfer.frames import HEADER_BYTES
from biphase.kvtransfer.tcp.connection import Connection
from biphase.kvtransfer.tcp.messages import (
    PREFIX_BYTES,
    Kind,
    Prefix,
    PullCall,
    WireError,
    message,
    prefix,
    pull_body,
    read_body,
    read_prefix,
)
from biphase.kvtransfer.wire import DataPlane, PayloadReceiver, PullOrder, SourceRefused, SourceUnreachable

_HEAD_BYTES = PREFIX_BYTES + HEADER_BYTES
_AHEAD_BYTES = 4096


class TcpFrameStream:
    """The frames of one pull, a FrameStream (wire.py).

    ``take`` brings a connection for it, ``give_back`` gets it when the stream has come to an end that leaves it usable.
    """

    def __init__(
        self,
        order: PullOrder,
        *,
        take: Callable[[], Awaitable[Connection]],
        give_back: Callable[[Connection], None],
        plane: DataPlane | None = None,
        peer: str = "",
    ) -> None:
        self._order = order
        self._take = take
        self._give_back = give_back
        self._plane = plane
        self._peer = peer
        self._connection: Connection | None = None
        self._receiver: PayloadReceiver | None = None
        self._opening: asyncio.Task[Any] | None = None
        self._over: SourceUnreachable | SourceRefused | None = None
        self._ended = False
        self._arrival: _Inline | _Shown | None = None
        # What was received beyond what was asked for: heads, and with a plane references.
        self._ahead = bytearray(_AHEAD_BYTES)
        self._view = memoryview(self._ahead)
        self._start = self._end = 0

    def __aiter__(self) -> AsyncIterator["_Inline | _Shown"]:
        return self

    async def __anext__(self) -> "_Inline | _Shown":
        if self._over is not None:
            raise self._over
        if self._ended:
            raise StopAsyncIteration
        try:
            if self._connection is None:
                await self._open()
            else:
                await self._finish_arrival()
            return await self._next()
        except ConnectionError as error:
            raise self.fail(SourceUnreachable(str(error))) from None

    def break_off(self, reason: str) -> None:
        if self._over is None and not self._ended:
            self.fail(SourceUnreachable(reason))
            if self._opening is not None:
                self._opening.cancel()

    # Opening.

    async def _open(self) -> None:
        # A task of its own where break_off can reach it without a trace in the reader's task.
        self._opening = asyncio.get_running_loop().create_task(self._call())
        try:
            await self._opening
        except asyncio.CancelledError:
            self._opening.cancel()
            if self._over is None:
                raise
            raise ConnectionError(str(self._over)) from None
        finally:
            self._opening = None

    async def _call(self) -> None:
        connection = self._connection = await self._take()
        hello = b""
        if self._plane is not None:
            self._receiver = await self._plane.receiver(self._peer)
            hello = self._receiver.hello
        name = self._plane.name if self._plane is not None else ""
        await connection.send([message(Kind.CALL, pull_body(PullCall(self._order, name, hello)))])
        if self._receiver is not None:
            body = await self._reply(await self._prefix())
            answer = body.get("answer")
            if not isinstance(answer, bytes):
                raise WireError(f"a plane's answer is {answer!r:.40}")
            await self._receiver.start(answer)

    # The next frame.

    async def _next(self) -> "_Inline | _Shown":
        head = await self._prefix()
        if head.kind is Kind.FRAME or head.kind is Kind.SHOWN:
            if self._end - self._start < HEADER_BYTES + head.reference_bytes:
                await self._need(HEADER_BYTES + head.reference_bytes)
            header = bytes(self._view[self._start : self._start + HEADER_BYTES])
            self._start += HEADER_BYTES
            if head.kind is Kind.FRAME:
                self._arrival = _Inline(self, header, head.size)
                return self._arrival
            if self._receiver is None:
                raise WireError("a reference without a data plane")
            reference = bytes(self._view[self._start : self._start + head.reference_bytes])
            self._start += head.reference_bytes
            self._arrival = _Shown(self._receiver, header, head.size, reference)
            self._look_ahead(self._receiver)
            return self._arrival
        if head.kind is Kind.END:
            self._end_well()
            raise StopAsyncIteration
        if head.kind is Kind.REPLY:
            await self._reply(head)
        raise WireError(f"a {head.kind.name} in place of a frame")

    def _look_ahead(self, receiver: PayloadReceiver) -> None:
        """Payloads whose references are here already may come while this one is used, where the plane can have that."""
        expect = getattr(receiver, "expect", None)
        if expect is None:
            return
        if len(self._ahead) - self._end >= _AHEAD_BYTES // 4:
            self._end += self._live().receive_some([self._view[self._end :]])
        at, last = self._start, b""
        while self._end - at >= PREFIX_BYTES:
            head = read_prefix(self._ahead, at)
            until = at + _HEAD_BYTES + head.reference_bytes
            if head.kind is not Kind.SHOWN or until > self._end:
                break
            last = bytes(self._view[until - head.reference_bytes : until])
            at = until
        if last:
            expect(last)

    async def _prefix(self) -> Prefix:
        if self._end - self._start < PREFIX_BYTES:
            await self._need(PREFIX_BYTES)
        head = read_prefix(self._ahead, self._start)
        self._start += PREFIX_BYTES
        return head

    async def _reply(self, head: Prefix) -> dict[str, Any]:
        """Raises SourceRefused or SourceUnreachable for one that says no."""
        if head.kind is not Kind.REPLY:
            raise WireError(f"a {head.kind.name} in place of a reply")
        await self._need(head.size)
        body = read_body(self._view[self._start : self._start + head.size])
        self._start += head.size
        failure = refusal_of(body)
        if failure is not None:
            self._end_well()
            self._over = failure
            raise failure
        return body

    async def _finish_arrival(self) -> None:
        """The payload of the last frame: give it back, or skip what was left of it."""
        arrival, self._arrival = self._arrival, None
        if isinstance(arrival, _Shown):
            arrival.finish()
            self._acknowledge(arrival.reference)
        elif arrival is not None and arrival.left:
            await self._skip(arrival.num_bytes)

    async def _skip(self, num_bytes: int) -> None:
        scratch = memoryview(self._scratch(min(num_bytes, 1 << 20)))
        while num_bytes:
            part = scratch[: min(num_bytes, len(scratch))]
            await self.receive([part])
            num_bytes -= len(part)

    def _acknowledge(self, reference: bytes) -> None:
        if self._connection is not None:
            self._connection.send_now(prefix(Kind.TAKEN, 0, len(reference)) + reference)

    # Bytes.

    async def receive(self, parts: Sequence[memoryview]) -> None:
        """Fill ``parts``; with them comes the next head, if it is there."""
        connection = self._live()
        remaining = sum(map(len, parts))
        at = 0
        while self._end > self._start and at < len(parts):  # received ahead
            count = min(len(parts[at]), self._end - self._start)
            parts[at][:count] = self._view[self._start : self._start + count]
            self._start += count
            remaining -= count
            if count < len(parts[at]):
                parts = [parts[at][count:], *parts[at + 1 :]]
                at = 0
            else:
                at += 1
        if not remaining:
            return
        self._start = self._end = 0
        parts = [*parts[at:], self._view[:_HEAD_BYTES]]
        while remaining > 0:
            count = connection.receive_some(parts)
            if not count:
                await connection.wait_readable(remaining)
                connection = self._live()
            elif count >= remaining:
                self._end = count - remaining
                remaining = 0
            else:
                remaining -= count
                parts = _after(parts, count)

    async def _need(self, count: int) -> None:
        """Have so many bytes ahead."""
        while self._end - self._start < count:
            connection = self._live()
            if self._start + count > len(self._ahead) or self._start == self._end:
                kept = bytes(self._view[self._start : self._end])
                if count > len(self._ahead):
                    self._view.release()
                    self._ahead = bytearray(count)
                    self._view = memoryview(self._ahead)
                self._view[: len(kept)] = kept
                self._start, self._end = 0, len(kept)
            # beyond a head lies a payload that wants to go to its own place
            until = len(self._ahead) if self._plane is not None else self._start + max(count, _HEAD_BYTES)
            received = connection.receive_some([self._view[self._end : min(until, len(self._ahead))]])
            self._end += received
            if not received:
                await connection.wait_readable()

    def _scratch(self, num_bytes: int) -> bytearray:
        connection = self._live()
        if len(connection.scratch) < num_bytes:
            connection.scratch = bytearray(num_bytes)
        return connection.scratch

    def scratch(self, num_bytes: int) -> memoryview:
        return memoryview(self._scratch(num_bytes))[:num_bytes]

    # The end.

    def _live(self) -> Connection:
        if self._over is not None:
            raise ConnectionError(str(self._over))
        assert self._connection is not None
        return self._connection

    def _end_well(self) -> None:
        """The source has said its last word; the connection may serve another call."""
        self._ended = True
        connection, self._connection = self._connection, None
        self._close_receiver()
        if connection is not None:
            self._give_back(connection)

    def fail(self, failure: SourceUnreachable | SourceRefused) -> SourceUnreachable | SourceRefused:
        if self._over is None:
            self._over = failure
            if self._connection is not None:
                self._connection.break_with(str(failure))
                self._give_back(self._connection)
            self._close_receiver()
        return self._over

    def _close_receiver(self) -> None:
        arrival, self._arrival = self._arrival, None
        if isinstance(arrival, _Shown):
            arrival.finish()
        receiver, self._receiver = self._receiver, None
        if receiver is not None:
            receiver.close()


class _Inline:
    """A frame whose payload is still in the socket."""

    scatters = True
    __slots__ = ("_stream", "header", "left", "num_bytes")

    def __init__(self, stream: TcpFrameStream, header: bytes, num_bytes: int) -> None:
        self._stream = stream
        self.header = header
        self.num_bytes = num_bytes
        self.left = num_bytes > 0

    async def payload(self) -> memoryview:
        payload = self._stream.scratch(self.num_bytes)
        await self.read_into([payload] if self.num_bytes else [])
        return payload

    async def read_into(self, parts: Sequence[memoryview]) -> None:
        self.left = False
        try:
            await self._stream.receive(parts)
        except ConnectionError as error:
            raise self._stream.fail(SourceUnreachable(str(error))) from None

    def intact(self) -> bool:
        return True


class _Shown:
    """A frame whose payload goes over a data plane."""

    scatters = False
    __slots__ = ("_fetched", "_receiver", "header", "num_bytes", "reference")

    def __init__(self, receiver: PayloadReceiver, header: bytes, num_bytes: int, reference: bytes) -> None:
        self._receiver = receiver
        self._fetched = False
        self.header = header
        self.num_bytes = num_bytes
        self.reference = reference

    async def payload(self) -> Any:
        self._fetched = True
        try:
            return await self._receiver.fetch(self.reference, self.num_bytes)
        except ConnectionError as error:
            raise SourceUnreachable(str(error)) from None

    async def read_into(self, parts: Sequence[memoryview]) -> None:
        payload = memoryview(await self.payload())
        at = 0
        for part in parts:
            part[:] = payload[at : at + len(part)]
            at += len(part)

    def intact(self) -> bool:
        return self._receiver.intact(self.reference)

    def finish(self) -> None:
        if self._fetched:
            self._receiver.done(self.reference)


def refusal_of(body: dict[str, Any]) -> SourceRefused | SourceUnreachable | None:
    """What a reply that says no means."""
    if "refused" in body:
        return SourceRefused(" ".join(str(body["refused"]).split()))
    if "unavailable" in body:
        return SourceUnreachable(" ".join(str(body["unavailable"]).split()))
    return None


def _after(parts: Sequence[memoryview], count: int) -> Sequence[memoryview]:
    at = 0
    while count >= len(parts[at]):
        count -= len(parts[at])
        at += 1
    return [parts[at][count:], *parts[at + 1 :]]
