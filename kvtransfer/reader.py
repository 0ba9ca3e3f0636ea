"""One open pull at the serving end: what may leave leaves, in pieces, with beats while there is nothing, then the trailer."""

import asyncio
import time
from contextlib import suppress
from dataclasses import replace
from typing import Any

from biphase.kernels.kv_layout import KvBox
from biphase.kernels.kv_pack.codec import packed_bytes
from biphase.kvtransfer import frames
from biphase.kvtransfer.due import Due
from biphase.kvtransfer.exports import ExportRefused, ExportTable, Pull
from biphase.kvtransfer.frames import FrameKind, Trailer
from biphase.kvtransfer.pieces import split
from biphase.kvtransfer.rank_memory import RankMemory
from biphase.kvtransfer.signature import HEADER_DIGEST, SUM_DIGEST
from biphase.kvtransfer.timing import stamp
from biphase.kvtransfer.wire import FrameSink, PullOrder, Room

MOST_PARTS = 256
"""In more parts than that a piece is packed: each costs some 0.3 us, and a call takes 1024."""

LARGE_BLOCK_BYTES = 2 * 1024 * 1024
"""Such a block is a piece of its own, in as few runs as it has layers, rather than one of several, head by head."""

BEAT_S = 0.5
"""A waiting reader hears from us at least this often; see pace.SILENCE_S."""


class Reader:
    """Owned by the service, run in the pull's task. ``evicted``: that was cancelled because the pull must end."""

    def __init__(self, pull: Pull, order: PullOrder, exports: ExportTable, memory: RankMemory, sink: FrameSink) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.pull = pull
        self.task: asyncio.Task[Any] = task
        self.evicted = False
        self.num_pieces = 0
        self.num_bytes = 0
        self._changed = asyncio.Event()
        self._said_s = time.monotonic()
        self._order = order
        self._exports = exports
        self._memory = memory
        self._sink = sink

    def look_again(self) -> None:
        """Something about the ticket has changed."""
        self._changed.set()

    def evict(self) -> None:
        if not self.evicted:
            self.evicted = True
            self.task.cancel()

    async def run(self, payload_bytes: int, *, overlap: bool) -> None:
        """Serve the whole order, in pieces of at most ``payload_bytes`` or what pays on this wire; see KvService for
        ``overlap``. Raises ExportRefused and whatever the sink raises."""
        exports, pull, layout = self._exports, self.pull, self._memory.layout
        payload_bytes = self._sink.piece_bytes(payload_bytes)
        await self._beat()
        due = Due(self._order.box, self._memory.part.layer_start, layout)
        while not due.done:
            readable = exports.readable(pull)
            box = due.take(readable) if overlap or readable.tokens == pull.num_tokens else None
            if box is not None:
                await self._send(box, payload_bytes)
            elif not due.done:  # looking may have found that the last of it had left ahead
                await self._wait()
        if self._order.pieces_only:
            return
        while (first := exports.first_token(pull)) is None:
            await self._wait()
        first_token, sampled_s = first
        now_s = time.monotonic()
        trailer = Trailer(
            first_token=first_token,
            total_bytes=self.num_bytes,
            num_pieces=self.num_pieces,
            age_ms=(now_s - sampled_s) * 1000.0,
        )
        await self._sink.send(*frames.trailer(pull.ticket, pull.epoch, trailer, pull.num_tokens, stamp(now_s)))

    async def _send(self, box: KvBox, payload_bytes: int) -> None:
        """Send a box that may be read now."""
        order = self._order
        layout = self._memory.layout
        in_place = self._sink.gathers and order.codec == "raw" and order.digest != SUM_DIGEST
        block = replace(box, token_start=0, token_end=layout.block_size).num_bytes(layout)
        for piece in split(layout, box, payload_bytes, by_block=in_place or block >= LARGE_BLOCK_BYTES):
            parts = self._memory.parts(self.pull.blocks, piece) if in_place else None
            if parts is not None and len(parts) <= MOST_PARTS:
                num_bytes = await self._send_in_place(piece, parts)
            else:
                num_bytes = await self._send_packed(piece)
            self.num_pieces += 1
            self.num_bytes += num_bytes
            self._said_s = time.monotonic()

    async def _send_packed(self, piece: KvBox) -> int:
        """From memory of the sink's: the blocks are read only while the piece is packed."""
        exports, pull, codec = self._exports, self.pull, self._order.codec
        num_bytes = packed_bytes(self._memory.layout, piece, codec)
        room = await self._room(num_bytes)
        computed = exports.readable_tokens(pull)  # a pull that must end ends here, within one piece
        exports.begin_send(pull)
        try:
            content_sum = self._memory.pack(pull.blocks, piece, room.payload, codec)
        finally:
            exports.end_send(pull, num_bytes)
        await self._sink.send(self._seal(piece, num_bytes, computed, [room.payload], content_sum), room)
        return num_bytes

    async def _room(self, num_bytes: int) -> Room:
        """Of the sink. It may come only when other readers have gone on, and ours must not take us for dead meanwhile."""
        loop = asyncio.get_running_loop()
        beating: asyncio.Task[None] | None = None
        timer: asyncio.TimerHandle

        def beat() -> None:
            nonlocal beating, timer
            if beating is None or beating.done():
                beating = loop.create_task(self._beat_beside())
            timer = loop.call_later(BEAT_S, beat)

        timer = loop.call_later(BEAT_S, beat)
        try:
            room = await self._sink.room(num_bytes)
        except BaseException:
            timer.cancel()
            if beating is not None:
                beating.cancel()
                await asyncio.wait([beating])
            raise
        timer.cancel()
        if beating is not None:  # one task at a time may use the sink's stream
            await beating
        return room

    async def _beat_beside(self) -> None:
        with suppress(ConnectionError, ExportRefused):  # whatever is sent next meets the same
            await self._beat()

    async def _send_in_place(self, piece: KvBox, parts: list[memoryview]) -> int:
        """From the blocks themselves, which are held until the sink has really done with them."""
        exports, pull = self._exports, self.pull
        num_bytes, sent = piece.num_bytes(self._memory.layout), 0
        computed = exports.readable_tokens(pull)
        exports.begin_send(pull)
        try:
            await self._sink.send(self._seal(piece, num_bytes, computed, parts, None), parts)
            sent = num_bytes
        finally:
            exports.end_send(pull, sent)
        return num_bytes

    def _seal(
        self, piece: KvBox, num_bytes: int, computed_tokens: int, contents: list[Any], content_sum: int | None
    ) -> bytes:
        digest = self._order.digest
        return frames.seal(
            self.pull.ticket,
            FrameKind.PIECE,
            epoch=self.pull.epoch,
            box=piece,
            payload_bytes=num_bytes,
            computed_tokens=computed_tokens,
            sent=stamp(time.monotonic()),
            contents=() if digest == HEADER_DIGEST else contents,
            content_sum=content_sum if digest == SUM_DIGEST else None,
        )

    async def _wait(self) -> None:
        """Until something has changed, or it is time for a beat: counted from the last word, as changes that let nothing
        leave yet (layers of a chunk) may come more often than beats."""
        try:
            async with asyncio.timeout(max(0.0, self._said_s + BEAT_S - time.monotonic())):
                await self._changed.wait()
            self._changed.clear()
        except TimeoutError:
            await self._beat()

    async def _beat(self) -> None:
        pull, sent = self.pull, stamp(time.monotonic())
        await self._sink.send(frames.beat(pull.ticket, pull.epoch, self._exports.readable_tokens(pull), sent), b"")
        self._said_s = time.monotonic()
