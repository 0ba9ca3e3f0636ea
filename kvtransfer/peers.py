"""The sources that a rank pulls from, by transport and address: opened once, shared by pulls, closed when none is left.

Of several ways to one source, those that failed lately are tried last.
"""

import asyncio
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from biphase.kvtransfer.pull_job import Route
from biphase.kvtransfer.signature import KvSignatureValue
from biphase.kvtransfer.wire import Source, SourceUnreachable, Transport

AVOID_S = (1.0, 60.0)
"""How long a wire that failed to one address is tried last there: at first, and at most when it fails again and again."""

_MOST_AVOIDED = 1024


class Peer:
    """A source, what we know of it, and how many use its connections."""

    def __init__(self, transport: str, address: str, source: Source) -> None:
        self.transport = transport
        self.address = address
        self.source = source
        self.signatures: dict[int, KvSignatureValue] = {}
        self.users = 0
        self.shaking = asyncio.Lock()


class Peers:
    """Owns sources and transports."""

    def __init__(self, transports: Sequence[Transport]) -> None:
        self._transports = {transport.name: transport for transport in transports}
        self._peers: dict[tuple[str, str], Peer] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._avoided: dict[Route, tuple[float, float, str]] = {}
        """Until when, for how long, and why."""

    def __len__(self) -> int:
        return len(self._peers)

    @property
    def transports(self) -> tuple[str, ...]:
        return tuple(self._transports)

    @contextmanager
    def using(self, transport: str, address: str) -> Iterator[Peer]:
        """The peer stays open meanwhile. Raises SourceUnreachable for a transport that is not here."""
        key = (transport, address)
        peer = self._peers.get(key)
        if peer is None:
            if transport not in self._transports:
                raise SourceUnreachable(f"transport {transport} is none of {', '.join(self._transports)}")
            peer = self._peers[key] = Peer(transport, address, self._transports[transport].open(address))
        peer.users += 1
        try:
            yield peer
        finally:
            peer.users -= 1
            self._close_if_forgotten(peer)

    def forget(self, transport: str, address: str) -> None:
        """The next one to use it connects afresh: no waiting out of a reconnect backoff, and a new handshake."""
        peer = self._peers.pop((transport, address), None)
        if peer is not None:
            self._close_if_forgotten(peer)

    def in_order(self, routes: Sequence[Route]) -> Iterator[Route]:
        """Those that failed lately come last."""
        now_s = time.monotonic()
        return iter(sorted(routes, key=lambda route: self._avoided.get(route, (0.0, 0.0, ""))[0] > now_s))

    def avoid(self, route: Route, why: str) -> None:
        """It has failed, and another way is taken."""
        if len(self._avoided) >= _MOST_AVOIDED:
            self._avoided.clear()
        first_s, most_s = AVOID_S
        for_s = min(most_s, 2 * self._avoided[route][1]) if route in self._avoided else first_s
        self._avoided[route] = (time.monotonic() + for_s, for_s, why)

    def failure(self, route: Route) -> str:
        """Why it was last avoided; empty where it has worked since."""
        return self._avoided[route][2] if route in self._avoided else ""

    def trust(self, route: Route) -> None:
        """It has worked."""
        self._avoided.pop(route, None)

    def _close_if_forgotten(self, peer: Peer) -> None:
        if peer.users == 0 and self._peers.get((peer.transport, peer.address)) is not peer:
            task = asyncio.get_running_loop().create_task(peer.source.close())
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    async def close(self) -> None:
        """Close all. None may be in use."""
        if self._closing:
            await asyncio.wait(self._closing)
        peers, self._peers = list(self._peers.values()), {}
        for peer in peers:
            await peer.source.close()
        for transport in self._transports.values():
            await transport.close()
