"""What one rank of a prefill instance answers its readers, whatever the wire: handshake, pull, release.

Lives in the worker's loop, like the export table. A piece is packed and digested in the loop, in some 0.3 ms per MiB
with the GIL released: handing it to a thread and back costs more than that. The blocks are held while a piece is packed
or, where the sink takes the pool's own memory, until it has sent it.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

from biphase.kernels.kv_pack import KvMemory
from biphase.kvtransfer import frames
from biphase.kvtransfer.allocator import keep_freed_memory
from biphase.kvtransfer.exports import ExportEnded, ExportRefused, ExportTable, Pull, Refusal, short
from biphase.kvtransfer.rank_memory import RankMemory
from biphase.kvtransfer.reader import Reader
from biphase.kvtransfer.refusals import KvRefused, check_incarnation, check_order
from biphase.kvtransfer.signature import SUM_DIGEST, KvSignatureValue, mismatch
from biphase.kvtransfer.wire import FrameSink, PullOrder
from biphase.protos.ids import TicketId

_log = logging.getLogger(__name__)

_Answer = TypeVar("_Answer")

OPENED_WITHIN_S = 1.0
"""A reader may come to one rank before that has heard of its ticket from rank 0: it waits so long."""


class KvService:
    """Answers for one rank. Wires call ``handshake``, ``release`` and, in a task of the pull's own, ``serve``.

    ``memory``: of this rank; a plain KvMemory is the whole of an instance. ``on_readers`` hears after a ticket has gained
    or lost a reader: the ticket, how many it has, and the newest epoch among them. ``wrap_sink`` is put around the sink of
    every pull, for drills. ``leads``: False on a rank that is told of tickets by rank 0. Without ``overlap`` nothing leaves
    before all of a prompt is computed, for measuring.
    """

    def __init__(
        self,
        *,
        exports: ExportTable,
        memory: KvMemory | RankMemory,
        signature: KvSignatureValue,
        on_ended: Callable[[ExportEnded], None],
        on_readers: Callable[[TicketId, int, int], None] = lambda ticket, num_open, epoch: None,
        leads: bool = True,
        overlap: bool = True,
        wrap_sink: Callable[[FrameSink], FrameSink] = lambda sink: sink,
    ) -> None:
        if SUM_DIGEST in signature.digests and memory.content_digest != "sum64":
            raise ValueError(f"{signature.instance} offers digest {SUM_DIGEST}, its memory packs without a sum")
        self.signature = signature
        self._exports = exports
        self._memory = RankMemory.whole(memory)
        self._on_ended = on_ended
        self._on_readers = on_readers
        self._leads = leads
        self._overlap = overlap
        self._opened = asyncio.Event()
        self._wrap_sink = wrap_sink
        self._payload_bytes = signature.max_message_bytes - frames.HEADER_BYTES
        self._loop: asyncio.AbstractEventLoop | None = None
        self._readers: dict[TicketId, set[Reader]] = {}
        self._settling = False
        self._lease_timer: asyncio.TimerHandle | None = None
        self._counters = {"pulls": 0, "pulls_refused": 0, "pieces_sent": 0, "bytes_sent": 0, "handshakes_refused": 0}

    def start(self) -> None:
        """Watch the table, in the running loop. Before the first wire listens."""
        keep_freed_memory()
        self._loop = asyncio.get_running_loop()
        self._exports.watch(self.wake)

    async def stop(self) -> None:
        """End every pull; returns when the last has ended. After the last wire has stopped listening."""
        readers = [reader for readers in self._readers.values() for reader in readers]
        for reader in readers:
            reader.task.cancel()
        if readers:
            await asyncio.wait([reader.task for reader in readers])
        self._loop = None
        if self._lease_timer is not None:
            self._lease_timer.cancel()
            self._lease_timer = None

    def wake(self, ticket: TicketId) -> None:
        """Something about this ticket has changed: its open pulls look again, ended tickets are reported."""
        self._opened.set()
        for reader in self._readers.get(ticket, ()):
            reader.look_again()
            if not self._allowed(reader.pull):
                reader.evict()
        if not self._settling and self._loop is not None:
            self._settling = True
            self._loop.call_soon(self._settle)

    def counters(self) -> dict[str, int]:
        """Totals, with those of pulls that are open."""
        found = {**self._counters, **self._exports.counters()}
        for readers in self._readers.values():
            for reader in readers:
                found["pieces_sent"] += reader.num_pieces
                found["bytes_sent"] += reader.num_bytes
        return found

    # What a wire calls.

    def handshake(self, theirs: KvSignatureValue) -> KvSignatureValue:
        """Our signature, for a reader with that one. Raises KvRefused."""
        reason = mismatch(theirs, self.signature)
        if reason is not None:
            self._counters["handshakes_refused"] += 1
            _log.warning("handshake refused: %s", reason)
            raise KvRefused("stale", reason)
        return self.signature

    def release(self, ticket: TicketId, epoch: int, incarnation: int, num_bytes: int = 0) -> None:
        """The reader holds everything, which came in ``num_bytes`` of payload; 0: it does not say. Raises KvRefused."""
        check_incarnation(self.signature, incarnation)
        if not self._leads:
            raise KvRefused("invalid", f"a release goes to rank 0 of {self.signature.instance}, this is another")
        try:
            self._exports.release(ticket, epoch, time.monotonic(), num_bytes)
        except ExportRefused as error:
            raise KvRefused.of(error) from None

    async def admit(self, order: PullOrder) -> None:
        """Returns where a reader holds a ticket of ours: before anything is kept ready for it. Raises KvRefused."""
        check_incarnation(self.signature, order.incarnation)
        await self._once_opened(order, self._exports.check_pull)

    async def serve(self, order: PullOrder, sink: FrameSink) -> None:
        """Serve one pull to its end, in the current task, and close the sink.

        Raises KvRefused, with what the reader is to be told, and whatever the sink raised. Where the pull must end, the
        task is cancelled in whatever the sink is doing and then raises KvRefused.
        """
        sink = self._wrap_sink(sink)
        try:
            check_incarnation(self.signature, order.incarnation)
            await self._serve_open(await self._once_opened(order, self._exports.begin_pull), order, sink)
        finally:
            sink.close()

    # Serving one pull.

    async def _once_opened(self, order: PullOrder, ask: Callable[[TicketId, int, float], _Answer]) -> _Answer:
        """What the table answers; where it may not have heard of the ticket yet, once it has."""
        until_s = time.monotonic() + OPENED_WITHIN_S
        while True:
            try:
                return ask(order.ticket, order.epoch, time.monotonic())
            except ExportRefused as error:
                remaining_s = until_s - time.monotonic()
                if self._leads or error.refusal is not Refusal.UNKNOWN or remaining_s <= 0.0:
                    self._counters["pulls_refused"] += 1
                    _log.info("pull refused: %s", error)
                    raise KvRefused.of(error) from None
            self._opened.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(remaining_s):
                    await self._opened.wait()

    async def _serve_open(self, pull: Pull, order: PullOrder, sink: FrameSink) -> None:
        reader = Reader(pull, order, self._exports, self._memory, sink)
        self._readers.setdefault(order.ticket, set()).add(reader)
        self._tell_readers(order.ticket)
        self._counters["pulls"] += 1
        try:
            check_order(order, self.signature, self._memory, pull.num_tokens)
            await reader.run(self._payload_bytes, overlap=self._overlap)
        except ExportRefused as error:
            if reader.evicted:  # the cancellation is on its way still: it must not hit the wire's answer
                with suppress(asyncio.CancelledError):
                    await asyncio.sleep(0)
                reader.task.uncancel()
            raise self._turned_away(error) from None
        except asyncio.CancelledError:
            if not reader.evicted:
                raise
            reader.task.uncancel()
            try:
                self._exports.readable_tokens(pull)
            except ExportRefused as error:
                raise self._turned_away(error) from None
        finally:
            readers = self._readers[order.ticket]
            readers.discard(reader)
            if not readers:
                del self._readers[order.ticket]
            self._counters["pieces_sent"] += reader.num_pieces
            self._counters["bytes_sent"] += reader.num_bytes
            self._exports.end_pull(pull, time.monotonic())
            self._tell_readers(order.ticket)

    def _tell_readers(self, ticket: TicketId) -> None:
        readers = self._readers.get(ticket, ())
        self._on_readers(ticket, len(readers), max((reader.pull.epoch for reader in readers), default=0))

    def _allowed(self, pull: Pull) -> bool:
        try:
            self._exports.readable_tokens(pull)
        except ExportRefused:
            return False
        return True

    def _turned_away(self, error: ExportRefused) -> KvRefused:
        _log.info("pull ended: %s", error)
        return KvRefused.of(error)

    # After changes.

    def _settle(self) -> None:
        """Report what has ended and set the timer for the next lease."""
        self._settling = False
        for ended in self._exports.take_ended():
            self._on_ended(ended)
        if self._lease_timer is not None:
            self._lease_timer.cancel()
            self._lease_timer = None
        next_s = self._exports.next_expiry_s()
        if next_s is not None and self._loop is not None:
            self._lease_timer = self._loop.call_later(max(0.0, next_s - time.monotonic()), self._expire)

    def _expire(self) -> None:
        self._lease_timer = None
        for ticket in self._exports.expire(time.monotonic()):
            _log.warning("the lease of ticket %s is over; nobody pulled it", short(ticket))
        if self._lease_timer is None and not self._settling:
            self._settle()
