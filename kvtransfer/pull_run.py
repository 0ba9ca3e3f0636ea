"""A job under way on one rank: one stream per rank of the source, driven into the machine of the handoff, pieces written.

A stream ends when its source has stopped: by the wire's own means, and by silence where the source should have sent a
piece or, while it computes, a beat. A source that computes slowly is left alone as long as it beats and gets on. A wire
that fails, or keeps back a payload that was announced, gives way to the next one to the same rank, once per pull, and is
left aside for a while. Owns neither the wires nor the blocks: those are the rank's.
"""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace

from biphase.kvtransfer import frames
from biphase.kvtransfer.frames import FrameError, FrameKind, Header
from biphase.kvtransfer.handoff import CancelAsked, Connected, Handoff, Lost, State, TrailerArrived
from biphase.kvtransfer.pace import Pace, Watch
from biphase.kvtransfer.peers import Peers
from biphase.kvtransfer.pull_job import PartsPulled, PullJob, PullPart, Route
from biphase.kvtransfer.rank_memory import RankMemory
from biphase.kvtransfer.signature import SUM_DIGEST
from biphase.kvtransfer.timing import SourceClock, Tail
from biphase.kvtransfer.together import together
from biphase.kvtransfer.wire import Arrival, PullOrder, SourceRefused, SourceUnreachable
from biphase.protos.errors import one_line

_log = logging.getLogger(__name__)

MOST_PARTS = 256
"""In more parts than that a piece is received whole and then written."""

_MOST_BAD = 1024


class SourceSilent(SourceUnreachable):
    """The source itself says nothing, or gets nowhere: no other wire to it would help."""


class PullRun:
    """One job under way. ``decoding``: whether a decode wants the loop's time. ``pace``: of all jobs of the rank."""

    def __init__(
        self, job: PullJob, memory: RankMemory, peers: Peers, pace: Pace, decoding: Callable[[], bool]
    ) -> None:
        self._job = job
        self._memory = memory
        self._peers = peers
        self._pace = pace
        self._decoding = decoding
        self._routes = {part.source_rank: peers.in_order(part.routes) for part in job.parts}
        self._route = {part.source_rank: next(self._routes[part.source_rank]) for part in job.parts}
        self._clocks = {part.source_rank: SourceClock() for part in job.parts}
        self._sampled_s = 0.0
        self._tail = Tail(part.source_rank for part in job.parts if part.box.num_tokens)
        self.fallbacks = 0
        self.bytes_by_transport: Counter[str] = Counter()
        self.handoff = Handoff(
            layout=replace(memory.layout, block_size=job.group_size),
            epoch=job.epoch,
            boxes=[part.box for part in job.parts],
            with_trailer=any(part.with_trailer for part in job.parts),
        )

    async def to_its_end(self) -> PartsPulled:
        handoff, tail = self.handoff, self._tail
        handoff.on(Connected())
        try:
            await together([self._ask(part) for part in self._job.parts])
            if handoff.streams_ended() is State.REPAIRING:
                tail.broken()
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
            carried_by=[self._route[part.source_rank].transport for part in self._job.parts],
            instead=[self._instead(part) for part in self._job.parts],
            trailer=handoff.trailer,
            sampled_s=self._sampled_s,
            tail_raw_bytes=tail.seen.raw_bytes,
            tail_wire_bytes=tail.seen.wire_bytes,
            tail_s=tail.seen.seconds,
        )

    async def _ask(self, part: PullPart, *, again: bool = False) -> None:
        """For all of a part, or what is missing of it, over the first wire that works."""
        while True:
            route = self._route[part.source_rank]
            try:
                for order in self._orders(part, again):
                    await self._pace.counting(self._drain(route, part, order))
                self._peers.trust(route)
                return
            except SourceUnreachable as error:
                self._peers.forget(route.transport, route.address)
                following = next(self._routes[part.source_rank], None)
                if following is None or isinstance(error, SourceSilent):
                    raise
                self._fall_back(part, route, following, error)
                again = True

    def _fall_back(self, part: PullPart, route: Route, following: Route, error: SourceUnreachable) -> None:
        self.fallbacks += 1
        self._tail.broken()
        self._peers.avoid(route, one_line(error))
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

    def _instead(self, part: PullPart) -> str:
        wanted = part.routes[0]
        if self._route[part.source_rank] == wanted:
            return ""
        why = self._peers.failure(wanted)
        return f"{wanted.transport} failed: {why}" if why else f"{wanted.transport} was not ready"

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
        with self._peers.using(route.transport, route.address) as peer:
            stream = peer.source.pull(order)
            watch = Watch(self._job.timeout_s, stream.break_off)
            num_bad_before = handoff.num_bad
            before_s = time.monotonic()
            beside = False  # whether a payload is on its way beside the stream
            try:
                async for arrival in stream:
                    watch.heard()
                    came_s = time.monotonic()
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
                    before_s = self._note_times(part, header, came_s, before_s)
                    if header.kind is FrameKind.PIECE:
                        self.bytes_by_transport[route.transport] += header.payload_bytes
                        watch.progressed()
                    elif handoff.computed_tokens > before:
                        watch.progressed()
                    with watch.resting():
                        await self._pace.rest(self._decoding())
                    self._tail.rested(before_s, time.monotonic())
            except SourceUnreachable:
                if not watch.fired:
                    raise
                if beside:  # the source has spoken, and its payload does not come: another wire may bring it
                    raise SourceUnreachable(f"a payload did not come: {watch.fired}") from None
                raise SourceSilent(watch.fired) from None
            finally:
                watch.end()
                stream.break_off("the reader has ended it")

    def _note_times(self, part: PullPart, header: Header, came_s: float, before_s: float) -> float:
        """Of a frame that began to come at ``came_s``, the one ahead of it being here at ``before_s``. Returns when it was
        here itself."""
        clock, here_s = self._clocks[part.source_rank], time.monotonic()
        clock.saw(header.sent, came_s)
        sent_s = clock.here_s(header.sent)
        if header.computed_tokens >= part.box.token_end:
            self._tail.computed(part.source_rank, sent_s=sent_s, before_s=before_s, came_s=came_s)
        if header.kind is FrameKind.PIECE:
            raw_bytes = header.box.num_bytes(self._memory.layout)
            self._tail.piece(raw_bytes, header.payload_bytes, here_s)
        elif header.kind is FrameKind.TRAILER:
            assert self.handoff.trailer is not None
            self._sampled_s = min(came_s, sent_s) - self.handoff.trailer.age_ms / 1000.0
        return here_s

    async def _take(self, arrival: Arrival, header: Header, part: PullPart, order: PullOrder) -> None:
        """Write a piece, or note what else the frame says. Raises FrameError for one that does not count."""
        handoff, memory, job = self.handoff, self._memory, self._job
        if header.kind is not FrameKind.PIECE:
            payload = await arrival.payload() if header.payload_bytes else b""
            frames.check_digest(header, order.ticket, (payload,))
            handoff.heard(header)
            if header.kind is FrameKind.TRAILER:
                handoff.on(TrailerArrived(frames.read_trailer(payload)))
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
