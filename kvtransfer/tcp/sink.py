"""Where the frames of one pull go at the serving end: behind their headers, or out of band with a reference."""

from collections.abc import Sequence
from typing import Any

from biphase.kvtransfer.frames import HEADER_BYTES
from biphase.kvtransfer.tcp.connection import Connection
from biphase.kvtransfer.tcp.messages import MOST_REFERENCE_BYTES, Kind, prefix
from biphase.kvtransfer.wire import PayloadSender, Room

_LARGER = 2
"""A socket takes pieces of two messages: fewer of them, and still in the cache between digest and send."""


class BufferRoom:
    """Memory for one payload, the same for every payload of a connection: it is sent before the next one is packed."""

    __slots__ = ("payload",)

    def __init__(self, payload: memoryview) -> None:
        self.payload = payload


class InlineSink:
    """A FrameSink (wire.py) whose payloads follow their headers."""

    gathers = True

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._began = self._due = connection.num_sent

    def piece_bytes(self, message_bytes: int) -> int:
        return _LARGER * (message_bytes + HEADER_BYTES)

    @property
    def aligned(self) -> bool:
        """Whether what was sent ends with a whole message, so that another may follow."""
        return self._connection.num_sent in (self._began, self._due)

    async def room(self, num_bytes: int) -> BufferRoom:
        connection = self._connection
        if len(connection.scratch) < num_bytes:
            connection.scratch = bytearray(num_bytes)
        return BufferRoom(memoryview(connection.scratch)[:num_bytes])

    async def send(self, header: bytes, payload: Room | Sequence[memoryview] | bytes) -> None:
        parts = _parts(payload)
        num_bytes = sum(map(len, parts))
        head = prefix(Kind.FRAME, num_bytes) + header
        await self._send([head, *parts], len(head) + num_bytes)

    async def send_message(self, data: bytes) -> None:
        """One that has no payload."""
        await self._send([data], len(data))

    async def _send(self, parts: Sequence[Any], num_bytes: int) -> None:
        self._began = self._connection.num_sent
        self._due = self._began + num_bytes
        await self._connection.send(parts)

    async def abort(self, header: bytes, payload: Room | Sequence[memoryview] | bytes, share: float) -> None:
        data = b"".join(_parts(payload))
        await self.break_after(prefix(Kind.FRAME, len(data)) + header + data, share)

    async def break_after(self, data: bytes, share: float) -> None:
        """Send the beginning of a message and break the connection."""
        try:
            await self._connection.send([data[: int(share * len(data))]])
        finally:
            self._connection.break_with("broken on purpose")

    def close(self) -> None:
        pass


class PlaneSink:
    """A FrameSink whose pieces go over a data plane; whatever is no room of the plane's follows its header.

    ``close`` comes at the end of serving, when the reader of a pull that went well has yet to take its last payloads:
    the plane's sender is closed by ``void``, which its connection calls.
    """

    gathers = False

    def __init__(self, connection: Connection, sender: PayloadSender) -> None:
        self._inline = InlineSink(connection)
        self._sender = sender
        self._void = False
        self.num_shown = 0
        """Payloads that the reader has not said to have done with."""

    def piece_bytes(self, message_bytes: int) -> int:
        return self._sender.piece_bytes(message_bytes)

    @property
    def aligned(self) -> bool:
        return self._inline.aligned

    async def room(self, num_bytes: int) -> Room:
        return await self._sender.room(num_bytes)

    async def send_message(self, data: bytes) -> None:
        await self._inline.send_message(data)

    async def send(self, header: bytes, payload: Room | Sequence[memoryview] | bytes) -> None:
        if isinstance(payload, bytes | Sequence):
            await self._inline.send(header, payload)
            return
        num_bytes = payload_bytes(payload.payload)
        reference = await self._sender.send(payload)
        if len(reference) > MOST_REFERENCE_BYTES:
            raise ValueError(f"a reference of {len(reference)} bytes, {MOST_REFERENCE_BYTES} are the most")
        self.num_shown += 1
        await self._inline.send_message(prefix(Kind.SHOWN, num_bytes, len(reference)) + header + reference)

    async def abort(self, header: bytes, payload: Room | Sequence[memoryview] | bytes, share: float) -> None:
        """The second half of the frame is its payload: then all of the reference has gone."""
        if isinstance(payload, bytes | Sequence):
            await self._inline.abort(header, payload, share)
            return
        reference = await self._sender.send(payload)
        message = prefix(Kind.SHOWN, payload_bytes(payload.payload), len(reference)) + header + reference
        await self._inline.break_after(message, min(1.0, 2 * share))

    def taken(self, reference: bytes) -> None:
        self.num_shown -= 1
        if not self._void:
            self._sender.taken(reference)

    def close(self) -> None:
        pass

    def void(self) -> None:
        """Whatever the reader has not taken by now it will not get. Idempotent."""
        if not self._void:
            self._void = True
            self._sender.close()


def payload_bytes(payload: Any) -> int:
    """Of a buffer or a tensor."""
    nbytes = getattr(payload, "nbytes", None)
    return len(payload) if nbytes is None else int(nbytes)


def _parts(payload: Room | Sequence[memoryview] | bytes) -> Sequence[Any]:
    if isinstance(payload, bytes):
        return (payload,) if payload else ()
    return payload if isinstance(payload, Sequence) else (payload.payload,)
