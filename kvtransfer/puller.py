"""The decode side's shell of a handoff: drives the machine over a wire and writes pieces into blocks.

Lives in the worker's loop and writes there too: a piece takes some 0.2 ms per MiB, and fresh from the wire it is still
in the cache. While the instance decodes, the pull leaves the loop, and with it the GIL, to the decode most of the time.

Two things end a pull whose source has stopped: keepalive (see grpc_setup), and silence of SILENCE_S where the source
should have sent a piece or, while it computes, a beat. A source that computes slowly is left alone as long as it beats
and gets on.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from biphase.kernels.kv_pack import KvMemory
from biphase.kvtransfer import frames
from biphase.kvtransfer.allocator import keep_freed_memory
from biphase.kvtransfer.exports import short
from biphase.kvtransfer.frames import FrameError, FrameKind, Header
from biphase.kvtransfer.grpc_transport import GrpcTransport
from biphase.kvtransfer.handoff import Acknowledged, CancelAsked, Connected, Handoff, Lost, State, TrailerArrived
from biphase.kvtransfer.signature import BYTES_DIGEST, KvSignatureValue, common_codecs, common_digest, mismatch
from biphase.kvtransfer.wire import Arrival, PullOrder, Source, SourceRefused, SourceUnreachable, Transport
from biphase.protos.errors import HandoffFailed
from biphase.protos.ids import BlockId
from biphase.protos.values import KvTicket

_log = logging.getLogger(__name__)

SILENCE_S = 2.5
"""A source not heard for so long is gone. Five beats."""

HANDSHAKE_S = 2.5
RELEASE_S = 1.0
"""How long the handoff itself waits for the answer to Release; later tries go on beside it."""

_TICK_S = 0.25
_RELEASE_AGAIN_S = 0.25
_MOST_BAD = 1024
_REST_OF_WORK = 4.0
"""Seconds of rest per second of the loop's CPU time, for a pull beside a decode. The decode takes the GIL some hundred
times in a step and waits each time for whatever copy holds it, so the loop may hold it only a fifth of the time."""

_SHORTEST_REST_S = 0.002


@dataclass(frozen=True, slots=True, kw_only=True)
class PullResult:
    """A complete handoff. ``ms`` is the whole pull; ``exposed_ms`` the part after token 0 was sampled at the source.

    ``released`` is False where the source has not yet answered Release: it is then told again in the background.
    """

    bytes: int
    ms: float
    first_token: int
    exposed_ms: float
    released: bool = True


class KvPuller:
    """Pulls KV into this instance's blocks. ``decoding`` tells whether a decode wants the time that a pull takes."""

    def __init__(
        self,
        *,
        memory: KvMemory,
        signature: KvSignatureValue,
        transport: Transport | None = None,
        decoding: Callable[[], bool] = lambda: False,
    ) -> None:
        keep_freed_memory()
        self._memory = memory
        self._decoding = decoding
        self._signature = signature
        self._transport: Transport = transport or GrpcTransport()
        self._peers: dict[str, _Peer] = {}
        self._open_pulls = 0
        self._releases: set[asyncio.Task[None]] = set()
        self._closing: set[asyncio.Task[None]] = set()
        self._counters = {
            "pulls_done": 0,
            "pulls_failed": 0,
            "pulls_cancelled": 0,
            "bytes_pulled": 0,
            "bad_pieces": 0,
            "releases_unanswered": 0,
        }

    async def pull(self, ticket: KvTicket, epoch: int, blocks: Sequence[BlockId], *, timeout_s: float) -> PullResult:
        """Pull a ticket's KV into ``blocks`` and release it at its source.

        ``timeout_s`` bounds the time without progress (a new piece, or more tokens computed). Raises HandoffFailed.
        Whatever the outcome, cancellation included, nothing writes into ``blocks`` once this has returned or raised.
        """
        began_s = time.monotonic()
        layout = self._memory.layout
        if ticket.num_tokens < 1 or layout.blocks_for(ticket.num_tokens) > len(blocks):
            raise HandoffFailed(
                f"ticket {short(ticket.id)} is over {ticket.num_tokens} tokens, "
                f"{len(blocks)} blocks hold {len(blocks) * layout.block_size}"
            )
        whole = layout.box(ticket.num_tokens)
        handoff = Handoff(layout=layout, epoch=epoch, whole=whole)
        peer = self._peer(ticket.kv_address)
        peer.users += 1
        self._open_pulls += 1
        try:
            codec, digest = await self._shake_hands(peer, ticket, timeout_s)
            handoff.on(Connected())
            order = PullOrder(
                ticket=ticket.id,
                epoch=epoch,
                incarnation=ticket.incarnation,
                box=whole,
                codec=codec,
                digest=digest,
            )
            trailer_s = await self._drain(peer.source, order, handoff, blocks, timeout_s)
            if handoff.stream_ended() is State.REPAIRING:
                _log.warning("asking %s again: %s", ticket.instance, handoff.last_bad or "pieces are missing")
                trailer_s = await self._repair(peer.source, order, handoff, blocks, timeout_s) or trailer_s
                if handoff.stream_ended() is State.FAILED:
                    raise SourceRefused(handoff.reason)
            released = await self._release(peer, ticket, epoch, timeout_s)
            handoff.on(Acknowledged())
        except SourceUnreachable as error:
            self._forget(peer)
            raise self._failed(
                handoff, f"cannot reach {ticket.instance} at {ticket.kv_address} for its KV: {error}"
            ) from None
        except SourceRefused as error:
            raise self._failed(handoff, f"no KV from {ticket.instance} at {ticket.kv_address}: {error}") from None
        except asyncio.CancelledError:
            self._counters["pulls_cancelled"] += 1
            if handoff.state is not State.FAILED:
                handoff.on(CancelAsked())
            raise
        finally:
            self._open_pulls -= 1
            self._counters["bad_pieces"] += handoff.num_bad
            self._leave(peer)
        done_s = time.monotonic()
        self._counters["pulls_done"] += 1
        self._counters["bytes_pulled"] += handoff.num_bytes
        assert handoff.trailer is not None
        return PullResult(
            bytes=handoff.num_bytes,
            ms=(done_s - began_s) * 1000.0,
            first_token=handoff.trailer.first_token,
            exposed_ms=handoff.trailer.age_ms + (done_s - (trailer_s or done_s)) * 1000.0,
            released=released,
        )

    async def close(self) -> None:
        """Close every connection. Pulls must have ended; unanswered releases are given up."""
        tasks = [*self._releases, *self._closing]
        for task in self._releases:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        peers, self._peers = list(self._peers.values()), {}
        for peer in peers:
            await peer.source.close()

    def counters(self) -> dict[str, int]:
        return {**self._counters, "open_pulls": self._open_pulls, "peers": len(self._peers)}

    # The steps of a pull.

    async def _shake_hands(self, peer: "_Peer", ticket: KvTicket, timeout_s: float) -> tuple[str, str]:
        """Compare signatures, once per address and incarnation; returns codec and digest."""
        async with peer.shaking:
            known = peer.signatures.get(ticket.incarnation)
            if known is None:
                known = await self._compare(peer, ticket, timeout_s)
                peer.signatures[ticket.incarnation] = known
        return common_codecs(self._signature, known)[0], common_digest(self._signature, known) or BYTES_DIGEST

    async def _compare(self, peer: "_Peer", ticket: KvTicket, timeout_s: float) -> KvSignatureValue:
        known = await peer.source.handshake(self._signature, min(HANDSHAKE_S, timeout_s))
        if (known.instance, known.incarnation) != (ticket.instance, ticket.incarnation):
            raise SourceRefused(
                f"there is {known.instance} incarnation {known.incarnation}, "
                f"the ticket is of {ticket.instance} incarnation {ticket.incarnation}"
            )
        reason = mismatch(self._signature, known)
        if reason is not None:
            raise SourceRefused(reason)
        return known

    async def _drain(
        self, source: Source, order: PullOrder, handoff: Handoff, blocks: Sequence[BlockId], timeout_s: float
    ) -> float | None:
        """Take one stream to its end; returns when the trailer came."""
        stream = source.pull(order)
        watch = _Watch(timeout_s, stream.break_off)
        pace = _Pace(self._decoding)
        trailer_s = None
        num_bad_before = handoff.num_bad
        try:
            async for arrival in stream:
                watch.heard()
                before = handoff.computed_tokens
                try:
                    header = frames.parse_header(arrival.header, arrival.num_bytes)
                    await self._take(arrival, header, order, handoff, blocks)
                except FrameError as error:
                    handoff.reject(str(error))
                    if handoff.num_bad - num_bad_before > _MOST_BAD:
                        raise SourceRefused(f"{_MOST_BAD} bad frames in one stream, the last: {error}") from None
                    continue
                finally:
                    del arrival  # free for the message that is received meanwhile
                if header.kind is FrameKind.TRAILER:
                    trailer_s = time.monotonic()
                if header.kind is FrameKind.PIECE or handoff.computed_tokens > before:
                    watch.progressed()
                await pace.rest()
        finally:
            watch.end()
            stream.break_off("the reader has ended it")
        return trailer_s

    async def _take(
        self, arrival: Arrival, header: Header, order: PullOrder, handoff: Handoff, blocks: Sequence[BlockId]
    ) -> None:
        """Write a piece, or note what else the frame says. Raises FrameError for one that does not count."""
        if header.kind is not FrameKind.PIECE:
            payload = await arrival.payload() if header.payload_bytes else b""
            frames.check_digest(header, order.ticket, (payload,))
            handoff.heard(header)
            if header.kind is FrameKind.TRAILER:
                handoff.on(TrailerArrived(frames.read_trailer(payload)))
            return
        handoff.admit(header, order.box, order.codec)
        payload = await arrival.payload()
        frames.check_piece_digest(header, order.ticket, (payload,), order.digest)
        self._memory.unpack(blocks, header.box, payload)
        if not arrival.intact():
            raise FrameError(f"a piece at {frames.where(header.box)} was overwritten while it was read")
        handoff.piece_arrived(header)

    async def _repair(
        self, source: Source, order: PullOrder, handoff: Handoff, blocks: Sequence[BlockId], timeout_s: float
    ) -> float | None:
        """Ask once more for what is missing, box by box, and for the trailer if that is."""
        for box in handoff.wanted():
            await self._drain(source, replace(order, box=box, pieces_only=True), handoff, blocks, timeout_s)
        if handoff.trailer is None:
            nothing = replace(order.box, token_start=order.box.token_end)
            return await self._drain(source, replace(order, box=nothing), handoff, blocks, timeout_s)
        return None

    async def _release(self, peer: "_Peer", ticket: KvTicket, epoch: int, timeout_s: float) -> bool:
        """Acknowledge. Where no answer comes the KV is ours all the same; the source is told again beside us."""
        try:
            await peer.source.release(ticket.id, epoch, ticket.incarnation, min(RELEASE_S, timeout_s))
        except SourceUnreachable as error:
            _log.warning("%s at %s has not answered Release: %s", ticket.instance, ticket.kv_address, error)
            self._counters["releases_unanswered"] += 1
            task = asyncio.get_running_loop().create_task(self._release_again(peer, ticket, epoch, timeout_s))
            self._releases.add(task)
            task.add_done_callback(self._releases.discard)
            return False
        return True

    async def _release_again(self, peer: "_Peer", ticket: KvTicket, epoch: int, timeout_s: float) -> None:
        peer.users += 1
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    await asyncio.sleep(_RELEASE_AGAIN_S)
                    with suppress(SourceUnreachable):
                        await peer.source.release(ticket.id, epoch, ticket.incarnation, RELEASE_S)
                        return
        except TimeoutError:
            _log.warning("%s at %s never answered Release", ticket.instance, ticket.kv_address)
        except SourceRefused as error:
            _log.info("%s at %s on a late Release: %s", ticket.instance, ticket.kv_address, error)
        finally:
            self._leave(peer)

    def _failed(self, handoff: Handoff, text: str) -> HandoffFailed:
        if handoff.state is not State.FAILED:
            handoff.on(Lost(text))
        self._counters["pulls_failed"] += 1
        return HandoffFailed(text)

    # Peers.

    def _peer(self, address: str) -> "_Peer":
        peer = self._peers.get(address)
        if peer is None:
            peer = self._peers[address] = _Peer(address, self._transport.open(address))
        return peer

    def _forget(self, peer: "_Peer") -> None:
        """The next pull connects afresh: no waiting out of a reconnect backoff, and a new handshake."""
        if self._peers.get(peer.address) is peer:
            del self._peers[peer.address]

    def _leave(self, peer: "_Peer") -> None:
        peer.users -= 1
        if peer.users == 0 and self._peers.get(peer.address) is not peer:
            task = asyncio.get_running_loop().create_task(peer.source.close())
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)


class _Peer:
    """A source, what we know of it, and how many pulls use its connections."""

    def __init__(self, address: str, source: Source) -> None:
        self.address = address
        self.source = source
        self.signatures: dict[int, KvSignatureValue] = {}
        self.users = 0
        self.shaking = asyncio.Lock()


class _Pace:
    """Rests in proportion to the loop's CPU time while a decode runs: what gRPC does for us there counts too."""

    def __init__(self, decoding: Callable[[], bool]) -> None:
        self._decoding = decoding
        self._worked_s = time.thread_time()
        self._owed_s = 0.0

    async def rest(self) -> None:
        worked_s = time.thread_time()
        owed_s = self._owed_s + (worked_s - self._worked_s) * _REST_OF_WORK
        self._worked_s = worked_s
        if not self._decoding():
            owed_s = 0.0
        elif owed_s >= _SHORTEST_REST_S:
            began_s = time.monotonic()
            await asyncio.sleep(owed_s)
            owed_s = max(0.0, owed_s - (time.monotonic() - began_s))
        self._owed_s = owed_s


class _Watch:
    """Breaks a stream off when its source falls silent or gets nowhere.

    Counts ticks, not seconds: while our own loop is held up no tick passes, so frames that wait to be read are never
    taken for silence.
    """

    def __init__(self, timeout_s: float, break_off: Callable[[str], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._timeout_s = timeout_s
        self._break_off = break_off
        self._silent_ticks = 0
        self._idle_ticks = 0
        self._timer = self._loop.call_later(_TICK_S, self._tick)

    def heard(self) -> None:
        self._silent_ticks = 0

    def progressed(self) -> None:
        self._idle_ticks = 0

    def end(self) -> None:
        self._timer.cancel()

    def _tick(self) -> None:
        self._silent_ticks += 1
        self._idle_ticks += 1
        if self._silent_ticks * _TICK_S >= SILENCE_S:
            self._break_off(f"nothing heard for {SILENCE_S} s")
        elif self._idle_ticks * _TICK_S >= self._timeout_s:
            self._break_off(f"no progress for {self._timeout_s} s")
        else:
            self._timer = self._loop.call_later(_TICK_S, self._tick)
