"""A decode instance's handoffs, from its rank 0: handshake, who pulls what, all or nothing, and the only acknowledgement.

A handoff is done when every rank has its moves and the source was told so; it has failed when any rank fails: then the
others are cancelled, and it is over only when each says that its receives have ended.
"""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

from biphase.kernels.kv_pack import KvMemory
from biphase.kvtransfer.codec_choice import CodecChooser
from biphase.kvtransfer.exports import short
from biphase.kvtransfer.grpc_transport import GrpcTransport
from biphase.kvtransfer.jobs import Choose, JobMaker
from biphase.kvtransfer.peers import Peer
from biphase.kvtransfer.pull_job import PartsPulled, PullJob, Route
from biphase.kvtransfer.rank_memory import RankMemory
from biphase.kvtransfer.rank_pull import RankPuller
from biphase.kvtransfer.signature import KvSignatureValue, mismatch
from biphase.kvtransfer.together import together
from biphase.kvtransfer.wire import SourceRefused, SourceUnreachable, Transport
from biphase.protos.errors import HandoffFailed
from biphase.protos.ids import BlockId
from biphase.protos.values import KvTicket

_log = logging.getLogger(__name__)

HANDSHAKE_S = 2.5
RELEASE_S = 1.0
"""How long the handoff itself waits for the answer to Release; later tries go on beside it."""

_RELEASE_AGAIN_S = 0.25


class PullFollowers(Protocol):
    """The other ranks of this instance."""

    async def pull(self, rank: int, job: PullJob) -> PartsPulled:
        """As RankPuller.pull, there. However it ends, cancelled too, the rank has then said that it writes no more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PullResult:
    """A complete handoff. ``ms`` is the whole pull; ``exposed_ms`` the part after token 0 was sampled at the source, short
    of it by what the clocks of both ends are known too badly (timing.SourceClock).

    ``released`` is False where the source has not yet answered Release: it is then told again in the background.
    """

    bytes: int
    ms: float
    first_token: int
    exposed_ms: float
    released: bool = True


class KvPuller:
    """Pulls KV into this instance's blocks, block ids being common to its ranks. Lives on rank 0.

    ``memory``: rank 0's. ``signature``: with the endpoints of all ranks where there are several. ``choose``: transports,
    by default gRPC; ``codecs``: by default the first of the signature. ``decoding`` tells whether a decode wants the time
    that a pull takes.
    """

    def __init__(
        self,
        *,
        memory: KvMemory | RankMemory,
        signature: KvSignatureValue,
        transports: Sequence[Transport] | None = None,
        choose: Choose | None = None,
        codecs: CodecChooser | None = None,
        followers: PullFollowers | None = None,
        decoding: Callable[[], bool] = lambda: False,
    ) -> None:
        self._signature = signature
        self._followers = followers
        self._decoding = decoding
        self._own = RankPuller(memory, [GrpcTransport()] if transports is None else transports, decoding)
        self._maker = JobMaker(signature, self._own.memory.layout, choose, codecs)
        self._theirs: Counter[str] = Counter()
        self._releases: set[asyncio.Task[None]] = set()
        self._counters = {
            "pulls_done": 0,
            "pulls_failed": 0,
            "pulls_cancelled": 0,
            "bytes_pulled": 0,
            "releases_unanswered": 0,
        }

    async def pull(self, ticket: KvTicket, epoch: int, blocks: Sequence[BlockId], *, timeout_s: float) -> PullResult:
        """Pull a ticket's KV into ``blocks``, on every rank, and release it at its source.

        ``timeout_s`` bounds the time without progress (a new piece, or more tokens computed). Raises HandoffFailed.
        Whatever the outcome, cancellation included, nothing writes into ``blocks`` once this has returned or raised.
        """
        began_s = time.monotonic()
        layout = self._own.memory.layout
        if ticket.num_tokens < 1 or layout.blocks_for(ticket.num_tokens) > len(blocks):
            raise HandoffFailed(
                f"ticket {short(ticket.id)} is over {ticket.num_tokens} tokens, "
                f"{len(blocks)} blocks hold {len(blocks) * layout.block_size}"
            )
        where = f"{ticket.instance} at {ticket.kv_address}"
        try:
            with self._own.peers.using("grpc", ticket.kv_address) as peer:
                source = await self._shake_hands(peer, ticket, timeout_s)
                jobs = self._maker.jobs(
                    ticket, epoch, blocks, source, timeout_s=timeout_s, beside_decode=self._decoding()
                )
                pulled = await together([self._part(rank, job) for rank, job in enumerate(jobs)])
                payload_bytes = sum(sum(part.bytes_by_transport.values()) for part in pulled)
                nearest = self._nearest(jobs[0], pulled[0], ticket)
                released = await self._release(nearest, ticket, epoch, timeout_s, payload_bytes)
        except SourceUnreachable as error:
            self._own.peers.forget("grpc", ticket.kv_address)
            self._counters["pulls_failed"] += 1
            raise HandoffFailed(f"cannot reach {where} for its KV: {error}") from None
        except SourceRefused as error:
            self._counters["pulls_failed"] += 1
            raise HandoffFailed(f"no KV from {where}: {error}") from None
        except asyncio.CancelledError:
            self._counters["pulls_cancelled"] += 1
            raise
        done_s = time.monotonic()
        for part in pulled[1:]:
            self._theirs.update({"bad_pieces": part.num_bad, "fallbacks": part.fallbacks})
            self._theirs.update({f"bytes_by_{name}": num for name, num in part.bytes_by_transport.items()})
        num_bytes = sum(part.num_bytes for part in pulled)
        self._maker.observe(ticket, jobs, pulled)
        self._counters["pulls_done"] += 1
        self._counters["bytes_pulled"] += num_bytes
        trailer = pulled[0].trailer
        assert trailer is not None
        return PullResult(
            bytes=num_bytes,
            ms=(done_s - began_s) * 1000.0,
            first_token=trailer.first_token,
            exposed_ms=max(0.0, done_s - pulled[0].sampled_s) * 1000.0,
            released=released,
        )

    async def close(self) -> None:
        """Close every connection. Pulls must have ended; unanswered releases are given up."""
        for task in self._releases:
            task.cancel()
        if self._releases:
            await asyncio.wait(self._releases)
        await self._own.close()

    @property
    def transports(self) -> dict[str, str]:
        """What pulls go by, by pair of ranks, and why; the codec too where it is not raw as configured."""
        return self._maker.described()

    def counters(self) -> dict[str, int]:
        """Totals are those of all ranks, as far as the others' pulls were complete."""
        own = Counter(self._own.counters())
        own.update(self._theirs)
        return {**self._counters, **own}

    # The steps of a pull.

    async def _shake_hands(self, peer: Peer, ticket: KvTicket, timeout_s: float) -> KvSignatureValue:
        """Compare signatures, once per address and incarnation."""
        async with peer.shaking:
            known = peer.signatures.get(ticket.incarnation)
            if known is None:
                known = await peer.source.handshake(self._signature, min(HANDSHAKE_S, timeout_s))
                self._check(known, ticket)
                peer.signatures[ticket.incarnation] = known
        return known

    def _check(self, known: KvSignatureValue, ticket: KvTicket) -> None:
        if (known.instance, known.incarnation) != (ticket.instance, ticket.incarnation):
            raise SourceRefused(
                f"there is {known.instance} incarnation {known.incarnation}, "
                f"the ticket is of {ticket.instance} incarnation {ticket.incarnation}"
            )
        reason = mismatch(self._signature, known)
        if reason is not None:
            raise SourceRefused(reason)

    async def _part(self, rank: int, job: PullJob) -> PartsPulled:
        if rank == 0:
            return await self._own.pull(job)
        assert self._followers is not None, f"{self._signature.plan}, and nobody to reach rank {rank} by"
        return await self._followers.pull(rank, job)

    def _nearest(self, job: PullJob, pulled: PartsPulled, ticket: KvTicket) -> Route:
        """The way to the source's rank 0 that its KV came by, if any did: over sockets an answer comes in a third of the
        time that gRPC takes."""
        for part, transport in zip(job.parts, pulled.carried_by, strict=True):
            if part.source_rank == 0:
                return next(route for route in part.routes if route.transport == transport)
        return Route(transport="grpc", address=ticket.kv_address)

    async def _release(self, route: Route, ticket: KvTicket, epoch: int, timeout_s: float, payload_bytes: int) -> bool:
        """Acknowledge. Where no answer comes the KV is ours all the same; the source is told again beside us, by gRPC."""
        try:
            with self._own.peers.using(route.transport, route.address) as peer:
                within_s = min(RELEASE_S, timeout_s)
                await peer.source.release(ticket.id, epoch, ticket.incarnation, within_s, payload_bytes)
        except SourceUnreachable as error:
            _log.warning("%s at %s has not answered Release: %s", ticket.instance, ticket.kv_address, error)
            self._counters["releases_unanswered"] += 1
            task = asyncio.get_running_loop().create_task(self._release_again(ticket, epoch, timeout_s, payload_bytes))
            self._releases.add(task)
            task.add_done_callback(self._releases.discard)
            return False
        return True

    async def _release_again(self, ticket: KvTicket, epoch: int, timeout_s: float, payload_bytes: int) -> None:
        try:
            with self._own.peers.using("grpc", ticket.kv_address) as peer:
                async with asyncio.timeout(timeout_s):
                    while True:
                        await asyncio.sleep(_RELEASE_AGAIN_S)
                        with suppress(SourceUnreachable):
                            await peer.source.release(ticket.id, epoch, ticket.incarnation, RELEASE_S, payload_bytes)
                            return
        except TimeoutError:
            _log.warning("%s at %s never answered Release", ticket.instance, ticket.kv_address)
        except SourceRefused as error:
            _log.info("%s at %s on a late Release: %s", ticket.instance, ticket.kv_address, error)
