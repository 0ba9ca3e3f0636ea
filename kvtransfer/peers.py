"""The sources that a rank pulls from, by transport and address: opened once, shared by pulls, closed when none is left."""

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from biphase.kvtransfer.signature import KvSignatureValue
from biphase.kvtransfer.wire import Source, SourceUnreachable, Transport


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
