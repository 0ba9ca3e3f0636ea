"""The sources that a rank pulls from, by transport and address: opened once, shared by pulls, closed when none is left.

Of several ways to one source, those that failed lately are tried last.
"""

import asyncio
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from biphase.kvtransfer.pull_job import Route
from biphase.kvtransfer.signature import KvSignatureValue
from biphase.kvtransfer.wire import PullOrder, Source, SourceRefused, SourceUnreachable, Transport
from biphase.protos.errors import one_line

_log = logging.getLogger(__name__)

AVOID_S = (1.0, 60.0)
"""How long a wire that failed to one address is tried last there: at first, and at most when it fails again and again."""

MOMENT_S = 0.05
"""How long a pull waits for what is built for it: gloo's groups are there in milliseconds, nccl's take a second."""

_PREPARE_S = 5.0
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
        self._preparing: dict[Route, asyncio.Task[None]] = {}
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
        """Those that failed lately come last, and those that are not ready."""
        return iter(sorted(routes, key=lambda route: self._is_avoided(route) or not self._is_ready(route)))

    async def make_ready(self, wanted: Sequence[tuple[Route, PullOrder]]) -> None:
        """Have what these ways need built, each by the leave of an order over it. What takes longer than a moment goes on
        beside, and ``in_order`` puts such a way behind the others until it is there."""
        tasks = []
        for route, order in wanted:
            if self._is_ready(route) or self._is_avoided(route):
                continue
            if route not in self._preparing:
                self._preparing[route] = asyncio.get_running_loop().create_task(self._prepare(route, order))
            tasks.append(self._preparing[route])
        if tasks:
            await asyncio.wait(tasks, timeout=MOMENT_S)

    async def _prepare(self, route: Route, order: PullOrder) -> None:
        try:
            with self.using(route.transport, route.address) as peer:
                await peer.source.prepare(order, _PREPARE_S)  # type: ignore[attr-defined]
        except SourceRefused:  # its ticket is over: the next one's may do
            pass
        except SourceUnreachable as error:
            _log.warning("%s at %s cannot be made ready: %s", route.transport, route.address, one_line(error))
            self.avoid(route, one_line(error))
        finally:
            del self._preparing[route]

    def _is_ready(self, route: Route) -> bool:
        ready = getattr(self._transports.get(route.transport), "ready", None)
        return ready is None or bool(ready(route.address))

    def _is_avoided(self, route: Route) -> bool:
        return route in self._avoided and self._avoided[route][0] > time.monotonic()

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
        """Close all. None may be in use by a pull."""
        preparing = list(self._preparing.values())
        for task in preparing:
            task.cancel()
        if preparing:
            await asyncio.wait(preparing)
        if self._closing:
            await asyncio.wait(self._closing)
        peers, self._peers = list(self._peers.values()), {}
        for peer in peers:
            await peer.source.close()
        for transport in self._transports.values():
            await transport.close()
