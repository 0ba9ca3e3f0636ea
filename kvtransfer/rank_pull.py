"""One rank's pulls: drives the machine over wires, one stream per rank of the source, and writes pieces into blocks.

Lives in the worker's loop and writes there too: a piece takes some 0.2 ms per MiB, and fresh from the wire it is still
in the cache. While the instance decodes, the pull leaves the loop, and with it the GIL, to the decode most of the time.

A stream ends when its source has stopped: by the wire's own means, and by silence where the source should have sent a
piece or, while it computes, a beat. A source that computes slowly is left alone as long as it beats and gets on. A wire
that fails, or keeps back a payload that was announced, gives way to the next one to the same rank, once per pull, and is
left aside for a while.
"""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from biphase.kernels.kv_pack import KvMemory
from biphase.kvtransfer import frames
from biphase.kvtransfer.allocator import keep_freed_memory
from biphase.kvtransfer.frames import FrameError, FrameKind, Header
from biphase.kvtransfer.handoff import CancelAsked, Connected, Handoff, Lost, State, TrailerArrived
from biphase.kvtransfer.pace import Pace, Watch
from biphase.kvtransfer.peers import Peers
from biphase.kvtransfer.pull_job import PartsPulled, PullJob, PullPart, Route
from biphase.kvtransfer.rank_memory import RankMemory
from biphase.kvtransfer.signature import SUM_DIGEST
from biphase.kvtransfer.together import together
from biphase.kvtransfer.wire import Arrival, PullOrder, SourceRefused, SourceUnreachable, Transport
from biphase.protos.errors import one_line

_log = logging.getLogger(__name__)

AVOID_S = (1.0, 60.0)
"""How long a wire that failed to one address is tried last there: at first, and at most when it fails again and again."""

MOST_PARTS = 256
"""In more parts than that a piece is received whole and then written."""

_MOST_BAD = 1024
_MOST_AVOIDED = 1024


class SourceSilent(SourceUnreachable):
    """The source itself says nothing, or gets nowhere: no other wire to it would help."""


class RankPuller:
    """Pulls into one rank's blocks. Owns the wires' sources. ``decoding``: whether a decode wants the loop's
    time; where nobody here knows, what rank 0 knew."""

    def __init__(
        self,
        memory: KvMemory | RankMemory,
        transports: Sequence[Transport],
        decoding: Callable[[], bool] | None = None,
    ) -> None:
        keep_freed_memory()
        self.memory = RankMemory.whole(memory)
        self.peers = Peers(transports)
        self.decoding = decoding
        self._avoided: dict[Route, tuple[float, float]] = {}
        """Until when, and for how long."""
        self._open_pulls = 0
        self._totals = {"bad_pieces": 0, "fallbacks": 0}
        self._bytes: Counter[str] = Counter()

    async def pull(self, job: PullJob) -> PartsPulled:
        """Pull all parts of a job at once. Raises SourceUnreachable or SourceRefused.

        Whatever the outcome, cancellation included, nothing writes into its blocks once this has returned or raised.
        """
        run = _Run(self, job)
        self._open_pulls += 1
        try:
            return await run.to_its_end()
        finally:
            self._open_pulls -= 1
            self._totals["bad_pieces"] += run.handoff.num_bad
            self._totals["fallbacks"] += run.fallbacks
            self._bytes.update(run.bytes_by_transport)

    async def close(self) -> None:
        """Close every connection. Pulls must have ended."""
        await self.peers.close()

    def counters(self) -> dict[str, int]:
        by_transport = {f"bytes_by_{name}": num_bytes for name, num_bytes in self._bytes.items()}
        return {**self._totals, "open_pulls": self._open_pulls, "peers": len(self.peers), **by_transport}

    # For the runs.

    def in_order(self, routes: Sequence[Route]) -> Iterator[Route]:
        """Those that failed lately come last."""
        now_s = time.monotonic()
        return iter(sorted(routes, key=lambda route: self._avoided.get(route, (0.0, 0.0))[0] > now_s))

    def avoid(self, route: Route) -> None:
        if len(self._avoided) >= _MOST_AVOIDED:
            self._avoided.clear()
        first_s, most_s = AVOID_S
        for_s = min(most_s, 2 * self._avoided[route][1]) if route in self._avoided else first_s
        self._avoided[route] = (time.monotonic() + for_s, for_s)

    def trust(self, route: Route) -> None:
        """It has worked."""
        self._avoided.pop(route, None)


class _Run:
    """One job under way."""

    def __init__(self, puller: RankPuller, job: PullJob) -> None:
        self._puller = puller
        self._job = job
        self._layout = replace(puller.memory.layout, block_size=job.group_size)
        self._pace = Pace(puller.decoding or (lambda: job.beside_decode))
        self._routes = {part.source_rank: puller.in_order(part.routes) for part in job.parts}
        self._route = {part.source_rank: next(self._routes[part.source_rank]) for part in job.parts}
        self._trailer_s = 0.0
        self.fallbacks = 0
        self.bytes_by_transport: Counter[str] = Counter()
        self.handoff = Handoff(
            layout=self._layout,
            epoch=job.epoch,
            boxes=[part.box for part in job.parts],
            with_trailer=any(part.with_trailer for part in job.parts),
        )

    async def to_its_end(self) -> PartsPulled:
        handoff = self.handoff
        handoff.on(Connected())
        try:
            await together([self._ask(part) for part in self._job.parts])
            if handoff.streams_ended() is State.REPAIRING:
                _log.warning("asking %s again: %s", self._job.instance, handoff.last_bad or "pieces are missing")
                await together([self._ask(part, again=True) for part in self._job.parts])
                if handoff.streams_ended() is State.FAILED:
                    raise SourceRefused(handoff.reason)
        except (SourceUnreachable, SourceRefused) as error:
            if handoff.state is not State.FAILED:
                handoff.on(Lost(str(error)))
            raise
        except asyncio.CancelledError:
            handoff.on(CancelAsked())
            raise
        return PartsPulled(
            num_bytes=handoff.num_bytes,
            num_bad=handoff.num_bad,
            fallbacks=self.fallbacks,
            bytes_by_transport=dict(self.bytes_by_transport),
            trailer=handoff.trailer,
            trailer_s=self._trailer_s,
        )

    async def _ask(self, part: PullPart, *, again: bool = False) -> None:
        """For all of a part, or what is missing of it, over the first wire that works."""
        while True:
            route = self._route[part.source_rank]
            try:
                for order in self._orders(part, again):
                    await self._drain(route, part, order)
                self._puller.trust(route)
                return
            except SourceUnreachable as error:
                self._puller.peers.forget(route.transport, route.address)
                following = next(self._routes[part.source_rank], None)
                if following is None or isinstance(error, SourceSilent):
                    raise
                self._fall_back(part, route, following, error)
                again = True

    def _fall_back(self, part: PullPart, route: Route, following: Route, error: SourceUnreachable) -> None:
        self.fallbacks += 1
        self._puller.avoid(route)
        self._route[part.source_rank] = following
        _log.warning(
            "%s to rank %d of %s at %s failed, going on by %s: %s",
            route.transport,
            part.source_rank,
            self._job.instance,
            route.address,
            following.transport,
            one_line(error),
        )

    def _orders(self, part: PullPart, again: bool) -> Iterator[PullOrder]:
        job = self._job
        whole = PullOrder(
            ticket=job.ticket,
            epoch=job.epoch,
            incarnation=job.incarnation,
            box=part.box,
            codec=job.codec,
            digest=job.digest,
            pieces_only=not part.with_trailer,
        )
        if not again:
            yield whole
            return
        for box in self.handoff.missing(part.box):
            yield replace(whole, box=box, pieces_only=True)
        if part.with_trailer and self.handoff.wants_trailer:
            yield replace(whole, box=replace(part.box, token_start=part.box.token_end))

    async def _drain(self, route: Route, part: PullPart, order: PullOrder) -> None:
        """Take one stream to its end."""
        handoff = self.handoff
        with self._puller.peers.using(route.transport, route.address) as peer:
            stream = peer.source.pull(order)
            watch = Watch(self._job.timeout_s, stream.break_off)
            num_bad_before = handoff.num_bad
            beside = False  # whether a payload is on its way beside the stream
            try:
                async for arrival in stream:
                    watch.heard()
                    before = handoff.computed_tokens
                    try:
                        header = frames.parse_header(arrival.header, arrival.num_bytes)
                        beside = not arrival.scatters
                        await self._take(arrival, header, part, order)
                        beside = False
                    except FrameError as error:
                        beside = False
                        handoff.reject(str(error))
                        if handoff.num_bad - num_bad_before > _MOST_BAD:
                            raise SourceRefused(f"{_MOST_BAD} bad frames in one stream, the last: {error}") from None
                        continue
                    finally:
                        del arrival  # free for the message that is received meanwhile
                    if header.kind is FrameKind.PIECE:
                        self.bytes_by_transport[route.transport] += header.payload_bytes
                        watch.progressed()
                    elif handoff.computed_tokens > before:
                        watch.progressed()
                    await self._pace.rest()
            except SourceUnreachable:
                if not watch.fired:
                    raise
                if beside:  # the source has spoken, and its payload does not come: another wire may bring it
                    raise SourceUnreachable(f"a payload did not come: {watch.fired}") from None
                raise SourceSilent(watch.fired) from None
            finally:
                watch.end()
                stream.break_off("the reader has ended it")

    async def _take(self, arrival: Arrival, header: Header, part: PullPart, order: PullOrder) -> None:
        """Write a piece, or note what else the frame says. Raises FrameError for one that does not count."""
        handoff, memory, job = self.handoff, self._puller.memory, self._job
        if header.kind is not FrameKind.PIECE:
            payload = await arrival.payload() if header.payload_bytes else b""
            frames.check_digest(header, order.ticket, (payload,))
            handoff.heard(header)
            if header.kind is FrameKind.TRAILER:
                handoff.on(TrailerArrived(frames.read_trailer(payload)))
                self._trailer_s = time.monotonic()
            return
        handoff.admit(header, part.box, order.box, order.codec)
        in_place = arrival.scatters and order.codec == "raw" and order.digest != SUM_DIGEST
        parts = memory.parts(job.blocks, header.box) if in_place else None
        if parts is not None and len(parts) <= MOST_PARTS:
            await arrival.read_into(parts)
            frames.check_piece_digest(header, order.ticket, parts, order.digest)
        else:
            payload = await arrival.payload()
            on_device = hasattr(payload, "data_ptr") and order.digest == SUM_DIGEST  # summed by what writes it
            if not on_device:
                frames.check_piece_digest(header, order.ticket, (payload,), order.digest)
            content_sum = memory.unpack(job.blocks, header.box, payload, order.codec, job.group_size)
            if on_device:
                frames.check_digest(header, order.ticket, (), content_sum)
        if not arrival.intact():
            raise FrameError(f"a piece at {frames.where(header.box)} was overwritten while it was read")
        handoff.piece_arrived(header, part.box)
