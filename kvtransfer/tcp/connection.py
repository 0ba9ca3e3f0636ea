"""One connected socket in the event loop, and the one place where sockets are made.

Sends from and receives into other people's memory, many pieces of it in one system call, without a buffer of its own.
Whoever adds TLS adds it here. A connection breaks once, for good, with one line that says why; every later use raises it.
"""

import asyncio
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from biphase.protos.errors import SetupError

PIECE_S = 5.0
"""A far end that takes nothing for so long while we send is cut."""

_MOST_PARTS = 1024
"""IOV_MAX of Linux."""

_CONNECTIONS_WAITING = 128
_GONE_AFTER_MS = 10_000
"""Unacknowledged for so long, a host is gone: its own kernel answers even for a stopped process."""

_AT_ONCE_BYTES = 256 * 1024
"""A reader that waits for more than that is woken when so much is there: waking it for every segment costs more."""

Buffer = bytes | bytearray | memoryview


async def connect(address: str) -> "Connection":
    """To ``host:port``. Raises ConnectionError, one line."""
    loop = asyncio.get_running_loop()
    try:
        found = await _addresses(address, loop)
    except (OSError, ValueError) as error:
        raise ConnectionError(f"no address {address}: {error}") from None
    failure: OSError | None = None
    for family, kind, protocol, _, where in found:
        sock = socket.socket(family, kind, protocol)
        sock.setblocking(False)
        try:
            await loop.sock_connect(sock, where)
            return Connection(sock)
        except OSError as error:
            sock.close()
            failure = error
        except BaseException:
            sock.close()
            raise
    raise ConnectionError(f"cannot connect to {address}: {failure}")


async def _addresses(address: str, loop: asyncio.AbstractEventLoop) -> list[tuple[Any, ...]]:
    """Addresses as sockets take them. Numbers are read here: a name costs a thread that stays, and a way to its server."""
    host, _, port = address.rpartition(":")
    host, number = host.strip("[]"), int(port)
    with suppress(socket.gaierror):
        return list(socket.getaddrinfo(host, number, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST))
    return list(await loop.getaddrinfo(host, number, type=socket.SOCK_STREAM))


def listen(host: str, port: int) -> socket.socket:
    """Raises SetupError when the port is taken or the host is none of ours."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        sock = socket.create_server((host, port), family=family, backlog=_CONNECTIONS_WAITING)
    except OSError as error:
        raise SetupError(f"cannot listen on {host}:{port} for KV: {error}") from None
    sock.setblocking(False)
    return sock


class Connection:
    """Used by one task for reading and one for writing; lives in one loop."""

    def __init__(self, sock: socket.socket, piece_s: float = PIECE_S) -> None:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _GONE_AFTER_MS)
        self._sock = sock
        self._piece_s = piece_s
        self._fd = sock.fileno()
        self._loop = asyncio.get_running_loop()
        self._broken: str | None = None
        self._readable: asyncio.Future[None] | None = None
        self._writable: asyncio.Future[None] | None = None
        self._watched = False
        self._on_readable: Callable[[], None] | None = None
        self._low_bytes = 1
        self.num_sent = 0
        self.scratch = bytearray()
        """Of whoever reads; kept with the connection because its pages are there already."""

    @property
    def peer(self) -> str:
        try:
            host, port = self._sock.getpeername()[:2]
        except OSError:
            return "nobody"
        return f"{host}:{port}"

    @property
    def broken(self) -> str | None:
        return self._broken

    def stale(self) -> bool:
        """Whether one that lay idle is of no use any more: the far end has closed it, or said what nobody asked."""
        try:
            self._check()
            self._sock.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            pass
        self.break_with("it was closed while it lay idle")
        return True

    # Sending.

    async def send(self, parts: Sequence[Buffer]) -> None:
        """All of it, from the parts themselves. Raises ConnectionError; then, or when cancelled, some of it may have
        gone, and ``num_sent`` tells."""
        while parts:
            count = self._send_some(parts[:_MOST_PARTS])
            parts = _after(parts, count)
            if parts and count == 0:
                await self._wait_writable()

    def send_now(self, data: bytes) -> None:
        """A few bytes. Raises ConnectionError, too where the far end has not taken thousands like it."""
        if self._send_some([data]) != len(data):
            self.break_with("the far end takes nothing")
            self._check()

    def _send_some(self, parts: Sequence[Buffer]) -> int:
        self._check()
        try:
            count = self._sock.sendmsg(parts)
        except (BlockingIOError, InterruptedError):
            return 0
        except OSError as error:
            raise self._lost(error) from None
        self.num_sent += count
        return count

    async def _wait_writable(self) -> None:
        waiting = self._writable = self._loop.create_future()
        self._loop.add_writer(self._fd, _resolve, waiting)
        timer = self._loop.call_later(self._piece_s, self._stalled, waiting)
        try:
            await waiting
        finally:
            timer.cancel()
            self._writable = None
            if self._broken is None:
                self._loop.remove_writer(self._fd)
        self._check()

    # Receiving.

    def receive_some(self, parts: Sequence[Any]) -> int:
        """What is there, 0 where nothing is. Raises ConnectionError, also at the far end's orderly end."""
        self._check()
        try:
            count = (
                self._sock.recvmsg_into(parts[:_MOST_PARTS])[0] if len(parts) > 1 else self._sock.recv_into(parts[0])
            )
        except (BlockingIOError, InterruptedError):
            return 0
        except OSError as error:
            raise self._lost(error) from None
        if count == 0:
            self.break_with("the connection was closed by the far end")
            self._check()
        return count

    async def wait_readable(self, least_bytes: int = 1) -> None:
        """Until so many bytes are there, or as many as are worth waking for."""
        self._check()
        least_bytes = min(least_bytes, _AT_ONCE_BYTES)
        if least_bytes != self._low_bytes:
            self._low_bytes = least_bytes
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, least_bytes)
        waiting = self._readable = self._loop.create_future()
        if not self._watched:
            self._watched = True
            self._loop.add_reader(self._fd, self._seen)
        try:
            await waiting
        finally:
            self._readable = None
        self._check()

    def on_readable(self, heard: Callable[[], None] | None) -> None:
        """Have ``heard`` called whenever there is something to receive, in place of waiting; None ends it."""
        self._on_readable = heard
        if heard is not None and not self._watched and self._broken is None:
            self._watched = True
            self._loop.add_reader(self._fd, self._seen)

    def _seen(self) -> None:
        # Left registered after a wait: mostly the next wait comes before the loop looks again.
        if self._readable is not None:
            _resolve(self._readable)
        elif self._on_readable is not None:
            self._on_readable()
        else:
            self._watched = False
            self._loop.remove_reader(self._fd)

    # Ending.

    def break_with(self, reason: str) -> None:
        """Close it; whoever waits for it is told. Idempotent: the first reason stays."""
        if self._broken is not None:
            return
        self._broken = reason
        if not self._loop.is_closed():
            self._loop.remove_reader(self._fd)
            self._loop.remove_writer(self._fd)
        for waiting in (self._readable, self._writable):
            if waiting is not None:
                _resolve(waiting)
        with suppress(OSError):
            self._sock.close()

    def _stalled(self, waiting: "asyncio.Future[None]") -> None:
        if not waiting.done():  # else our own loop was held up
            self.break_with(f"the far end took nothing for {self._piece_s:g} s")

    def _lost(self, error: OSError) -> ConnectionError:
        self.break_with(f"the connection broke: {error.strerror or error}")
        return ConnectionError(self._broken)

    def _check(self) -> None:
        if self._broken is not None:
            raise ConnectionError(self._broken)


def _resolve(waiting: "asyncio.Future[None]") -> None:
    if not waiting.done():
        waiting.set_result(None)


def _after(parts: Sequence[Buffer], count: int) -> Sequence[Buffer]:
    """What of ``parts`` comes after its first ``count`` bytes."""
    at = 0
    while at < len(parts) and count >= len(parts[at]):
        count -= len(parts[at])
        at += 1
    if count == 0:
        return parts[at:] if at else parts
    return [memoryview(parts[at])[count:], *parts[at + 1 :]]
