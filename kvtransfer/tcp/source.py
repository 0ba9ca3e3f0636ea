"""The reading end of the tcp wire, and of every data plane that has its frames' stream over it."""

import asyncio
from typing import Any

from google.protobuf.message import DecodeError

from biphase.kvtransfer.signature import KvSignatureValue
from biphase.kvtransfer.tcp.connection import Connection, connect
from biphase.kvtransfer.tcp.messages import (
    PREFIX_BYTES,
    Kind,
    PullCall,
    WireError,
    message,
    pull_body,
    read_body,
    read_prefix,
)
from biphase.kvtransfer.tcp.stream import TcpFrameStream, refusal_of
from biphase.kvtransfer.wire import DataPlane, NotReady, PullOrder, SourceUnreachable
from biphase.protos import kv_pb2
from biphase.protos.ids import TicketId

MOST_IDLE = 4
"""Bulk connections to one source that are kept for the next pulls."""

CONNECT_S = 2.5


class TcpTransport:
    """Sources reached by raw sockets: a connection for control, and as many for bulk as there are pulls at a time.

    With ``plane`` the payloads go over that, and the transport has its name.
    """

    def __init__(self, plane: DataPlane | None = None) -> None:
        self._plane = plane
        self.name = plane.name if plane is not None else "tcp"

    def ready(self, address: str) -> bool:
        """Whether a pull from there finds all that it needs: False while a plane's group with it is yet to be built."""
        ready = getattr(self._plane, "ready", None)
        return ready is None or bool(ready(address))

    def open(self, address: str) -> "TcpSource":
        return TcpSource(address, self._plane)

    async def close(self) -> None:
        """The plane is closed by whoever made it: serving and reading ends of a process share it."""


class TcpSource:
    """One rank's KV endpoint."""

    def __init__(self, address: str, plane: DataPlane | None = None) -> None:
        self._address = address
        self._plane = plane
        self._control: Connection | None = None
        self._calling = asyncio.Lock()
        self._idle: list[Connection] = []
        self._pulls: set[Connection] = set()
        self._closed = False

    async def handshake(self, signature: KvSignatureValue, timeout_s: float) -> KvSignatureValue:
        body = {"call": "handshake", "signature": signature.to_proto().SerializeToString()}
        reply = await self._call(body, timeout_s)
        try:
            return KvSignatureValue.from_proto(kv_pb2.KvSignature.FromString(reply.get("signature", b"")))
        except (DecodeError, TypeError, ValueError) as error:
            raise SourceUnreachable(f"an answer to a handshake without a signature: {error}") from None

    def pull(self, order: PullOrder) -> TcpFrameStream:
        return TcpFrameStream(order, take=self._take, give_back=self._give_back, plane=self._plane, peer=self._address)

    async def prepare(self, order: PullOrder, timeout_s: float) -> None:
        """Have the plane's group with this source built, for pulls to come. ``order``: of a ticket that lets us. Returns
        when it is there or goes on being built without us."""
        assert self._plane is not None
        receiver = await self._plane.receiver(self._address)
        try:
            call = pull_body(PullCall(order, self._plane.name, receiver.hello))
            reply = await self._call({**call, "call": "prepare"}, timeout_s)
            answer = reply.get("answer")
            if not isinstance(answer, bytes):
                raise SourceUnreachable(f"a plane's answer is {answer!r:.40}")
            await receiver.start(answer)
        except NotReady:
            pass
        except ConnectionError as error:
            raise SourceUnreachable(str(error)) from None
        finally:
            receiver.close()

    async def release(
        self, ticket: TicketId, epoch: int, incarnation: int, timeout_s: float, num_bytes: int = 0
    ) -> None:
        body = {"call": "release", "ticket": ticket, "epoch": epoch, "incarnation": incarnation, "bytes": num_bytes}
        await self._call(body, timeout_s)

    async def close(self) -> None:
        self._closed = True
        for connection in (*self._idle, *self._pulls, *([self._control] if self._control is not None else [])):
            connection.break_with("closed by us")
        self._idle, self._control = [], None

    # Control.

    async def _call(self, body: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        try:
            async with asyncio.timeout(timeout_s):
                async with self._calling:
                    try:
                        reply = await self._exchange(message(Kind.CALL, body))
                    except BaseException:
                        # cancelled, too: its answer would be taken for the next call's
                        control, self._control = self._control, None
                        if control is not None:
                            control.break_with("a call has failed")
                        raise
        except TimeoutError:
            raise SourceUnreachable(f"no answer to {body['call']} within {timeout_s:g} s") from None
        except ConnectionError as error:
            raise SourceUnreachable(str(error)) from None
        failure = refusal_of(reply)
        if failure is not None:
            raise failure
        return reply

    async def _exchange(self, call: bytes) -> dict[str, Any]:
        control = self._control
        if control is None or control.stale():
            control = self._control = await self._connect()
        await control.send([call])
        head = read_prefix(await _receive(control, PREFIX_BYTES))
        if head.kind is not Kind.REPLY:
            raise WireError(f"a {head.kind.name} in place of a reply")
        return read_body(await _receive(control, head.size))

    # Bulk.

    async def _take(self) -> Connection:
        while self._idle:
            connection = self._idle.pop()
            if not connection.stale():
                break
        else:
            connection = await self._connect()
        self._pulls.add(connection)
        return connection

    def _give_back(self, connection: Connection) -> None:
        self._pulls.discard(connection)
        if self._closed or len(self._idle) >= MOST_IDLE:
            connection.break_with("closed by us")
        elif connection.broken is None:
            self._idle.append(connection)

    async def _connect(self) -> Connection:
        if self._closed:
            raise ConnectionError("closed by us")
        try:
            async with asyncio.timeout(CONNECT_S):
                return await connect(self._address)
        except TimeoutError:
            raise ConnectionError(f"cannot connect to {self._address} within {CONNECT_S:g} s") from None


async def _receive(connection: Connection, count: int) -> bytes:
    data = bytearray(count)
    view = memoryview(data)
    at = 0
    while at < count:
        received = connection.receive_some([view[at:]])
        at += received
        if not received:
            await connection.wait_readable()
    return bytes(data)
