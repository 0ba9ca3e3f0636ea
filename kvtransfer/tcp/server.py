"""The serving end of the tcp wire: one listener, a task per connection, and a bound on how many there are.

Whoever may come without a ticket may connect too, so connections that say nothing keep nobody out: one without a whole
first call is closed within seconds, and where there are too many the one that has been of no use for longest gives way.
"""

import asyncio
import logging
import socket
from collections.abc import Iterable

from biphase.kvtransfer.service import KvService
from biphase.kvtransfer.tcp.connection import PIECE_S, listen
from biphase.kvtransfer.tcp.served import Served
from biphase.kvtransfer.wire import DataPlane

_log = logging.getLogger(__name__)

_ACCEPT_AGAIN_S = 0.1
MOST_CONNECTIONS = 1024
"""For a further one the idle one of longest standing is closed; the further one itself where none is idle."""


class TcpKvServer:
    """Handshake, pull and release of one service over raw sockets. ``planes``: the ways for payloads beside the stream."""

    def __init__(
        self,
        service: KvService,
        planes: Iterable[DataPlane] = (),
        *,
        piece_s: float = PIECE_S,
        most_connections: int = MOST_CONNECTIONS,
    ) -> None:
        self._service = service
        self._planes = {plane.name: plane for plane in planes}
        self._piece_s = piece_s
        self._most_connections = most_connections
        self._listener: socket.socket | None = None
        self._accepting: asyncio.Task[None] | None = None
        self._connections: dict[asyncio.Task[None], Served] = {}

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
            if not self._make_room():
                _log.warning("a connection for KV is closed: there are %d, all at work", self._most_connections)
                sock.close()
                continue
            connection = Served(sock, self._service, self._planes, self._piece_s)
            task = loop.create_task(connection.run())
            self._connections[task] = connection
            task.add_done_callback(self._ended)
            task.add_done_callback(connection.close)

    def _make_room(self) -> bool:
        """For one more. First go those that have never said what they want, then those that lay idle for longest."""
        if len(self._connections) < self._most_connections:
            return True
        open_ones = [connection for connection in self._connections.values() if not connection.closed]
        if len(open_ones) < self._most_connections:
            return True
        idle = [connection for connection in open_ones if connection.idle_since_s is not None]
        if not idle:
            return False
        longest = min(idle, key=lambda connection: (connection.has_called, connection.idle_since_s))
        longest.give_way(f"there are {self._most_connections} connections for KV, and it was idle for longest")
        return True

    def _ended(self, task: "asyncio.Task[None]") -> None:
        del self._connections[task]
        if not task.cancelled() and task.exception() is not None:
            _log.error("a connection for KV is closed", exc_info=task.exception())
