"""The prefill side's KV endpoint: a gRPC server of its own that serves what the export table allows.

Lives in the worker's loop, like the table. A piece is packed and digested in the loop, in some 0.3 ms per MiB with the
GIL released: handing it to a thread and back costs more than that. gRPC sends it from a copy of its own, so blocks are
read only while a piece is packed.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import grpc
import grpc.aio
from google.protobuf.message_factory import GetMessageClass

from biphase.kernels.kv_layout import KvBox
from biphase.kernels.kv_pack import KvMemory
from biphase.kvtransfer import frames
from biphase.kvtransfer.allocator import keep_freed_memory
from biphase.kvtransfer.exports import ExportEnded, ExportRefused, ExportTable, Pull, Refusal, short
from biphase.kvtransfer.frames import FrameKind, NewFrame, Trailer
from biphase.kvtransfer.grpc_transport import SERVICE
from biphase.kvtransfer.pieces import split
from biphase.kvtransfer.signature import SUM_DIGEST, KvSignatureValue, mismatch
from biphase.protos import kv_pb2
from biphase.protos.grpc_setup import Undecodable, bind, refuse_undecodable, server_options, service_handler, tolerant
from biphase.protos.ids import TicketId

_log = logging.getLogger(__name__)

BEAT_S = 0.5
"""A waiting reader hears from us at least this often; see puller.SILENCE_S."""

_STATUS = {refusal: grpc.StatusCode.NOT_FOUND for refusal in Refusal}
_STATUS[Refusal.STALE_EPOCH] = grpc.StatusCode.FAILED_PRECONDITION


@dataclass(eq=False, slots=True)
class _Reader:
    """One open Pull call. ``evicted`` is set when its task was cancelled because the pull must end."""

    pull: Pull
    task: "asyncio.Task[object]"
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    evicted: bool = False
    num_pieces: int = 0
    num_bytes: int = 0


class KvServer:
    """Handshake, Pull and Release for one prefill instance."""

    def __init__(
        self,
        *,
        exports: ExportTable,
        memory: KvMemory,
        signature: KvSignatureValue,
        on_ended: Callable[[ExportEnded], None],
    ) -> None:
        if SUM_DIGEST in signature.digests and memory.content_digest != "sum64":
            raise ValueError(f"{signature.instance} offers digest {SUM_DIGEST}, its memory packs without a sum")
        self._exports = exports
        self._memory = memory
        self._signature = signature
        self._on_ended = on_ended
        self._payload_bytes = signature.max_message_bytes - frames.HEADER_BYTES
        self._server: grpc.aio.Server | None = None
        self._readers: dict[TicketId, set[_Reader]] = {}
        self._settling = False
        self._lease_timer: asyncio.TimerHandle | None = None
        self._counters = {"pulls": 0, "pulls_refused": 0, "pieces_sent": 0, "bytes_sent": 0, "handshakes_refused": 0}

    async def start(self, host: str, port: int) -> int:
        """Listen, and return the bound port. Raises SetupError when it is taken."""
        keep_freed_memory()
        self._loop = asyncio.get_running_loop()
        server = grpc.aio.server(options=server_options())
        pull = grpc.unary_stream_rpc_method_handler(
            self._pull, request_deserializer=tolerant(kv_pb2.PullRequest), response_serializer=None
        )
        server.add_generic_rpc_handlers(
            (
                grpc.method_handlers_generic_handler(SERVICE, {"Pull": pull}),
                service_handler(kv_pb2.DESCRIPTOR, "KvEndpoint", self, GetMessageClass),
            )
        )
        bound = bind(server, host, port)
        await server.start()
        self._server = server
        self._exports.watch(self.wake)
        return bound

    def wake(self, ticket: TicketId) -> None:
        """Something about this ticket has changed: its open pulls look again, ended tickets are reported."""
        for reader in self._readers.get(ticket, ()):
            reader.changed.set()
            if not reader.evicted and not self._allowed(reader.pull):
                reader.evicted = True
                reader.task.cancel()
        if not self._settling:
            self._settling = True
            self._loop.call_soon(self._settle)

    async def stop(self) -> None:
        """End every pull and stop listening; returns when the last has ended."""
        if self._server is not None:
            await self._server.stop(grace=None)
            tasks = [reader.task for readers in self._readers.values() for reader in readers]
            if tasks:
                await asyncio.wait(tasks)
            self._server = None
        if self._lease_timer is not None:
            self._lease_timer.cancel()
            self._lease_timer = None

    def counters(self) -> dict[str, int]:
        return {**self._counters, **self._exports.counters()}

    # The methods of the service.

    async def Handshake(self, request: kv_pb2.KvSignature, context: grpc.aio.ServicerContext) -> kv_pb2.KvSignature:
        reason = mismatch(KvSignatureValue.from_proto(request), self._signature)
        if reason is not None:
            self._counters["handshakes_refused"] += 1
            _log.warning("handshake refused: %s", reason)
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, reason)
        return self._signature.to_proto()

    async def Release(self, request: kv_pb2.ReleaseRequest, context: grpc.aio.ServicerContext) -> kv_pb2.ReleaseReply:
        await self._check_incarnation(request.incarnation, context)
        try:
            self._exports.release(TicketId(request.ticket), request.epoch, time.monotonic())
        except ExportRefused as error:
            await context.abort(_STATUS[error.refusal], str(error))
        return kv_pb2.ReleaseReply()

    async def _pull(self, request: kv_pb2.PullRequest | Undecodable, context: grpc.aio.ServicerContext) -> None:
        await refuse_undecodable(request, context)
        assert isinstance(request, kv_pb2.PullRequest)
        await self._check_incarnation(request.incarnation, context)
        ticket = TicketId(request.ticket)
        try:
            pull = self._exports.begin_pull(ticket, request.epoch, time.monotonic())
        except ExportRefused as error:
            self._counters["pulls_refused"] += 1
            _log.info("pull refused: %s", error)
            await context.abort(_STATUS[error.refusal], str(error))
            raise  # not reached: abort raises
        task = asyncio.current_task()
        assert task is not None
        reader = _Reader(pull=pull, task=task)
        self._readers.setdefault(ticket, set()).add(reader)
        self._counters["pulls"] += 1
        try:
            reason = self._misfit(request, pull)
            if reason is not None:
                await context.abort(grpc.StatusCode.INVALID_ARGUMENT, reason)
            await self._serve(reader, request, context)
        except ExportRefused as error:
            await self._turn_away(error, context)
        except asyncio.CancelledError:
            if not reader.evicted:
                raise
            task.uncancel()
            try:
                self._exports.readable_tokens(pull)
            except ExportRefused as error:
                await self._turn_away(error, context)
        finally:
            readers = self._readers[ticket]
            readers.discard(reader)
            if not readers:
                del self._readers[ticket]
            self._exports.end_pull(pull, time.monotonic())

    # Serving one pull.

    async def _serve(self, reader: _Reader, request: kv_pb2.PullRequest, context: grpc.aio.ServicerContext) -> None:
        exports, pull = self._exports, reader.pull
        wanted = _box(request)
        await context.write(frames.beat(pull.ticket, pull.epoch, exports.readable_tokens(pull)))
        token = wanted.token_start
        while token < wanted.token_end:
            readable = min(exports.readable_tokens(pull), wanted.token_end)
            if readable > token:
                box = replace(wanted, token_start=token, token_end=readable)
                await self._send(reader, box, request.digest == SUM_DIGEST, context)
                token = readable
            else:
                await self._wait(reader, context)
        if request.pieces_only:
            return
        while (first := exports.first_token(pull)) is None:
            await self._wait(reader, context)
        first_token, sampled_s = first
        trailer = Trailer(
            first_token=first_token,
            total_bytes=reader.num_bytes,
            num_pieces=reader.num_pieces,
            age_ms=(time.monotonic() - sampled_s) * 1000.0,
        )
        await context.write(frames.trailer(pull.ticket, pull.epoch, trailer, pull.num_tokens))

    async def _send(self, reader: _Reader, box: KvBox, over_sum: bool, context: grpc.aio.ServicerContext) -> None:
        """Send a box that may be read now, in pieces, with digests over bytes or sums. Blocks are read only while a
        piece is packed."""
        exports, pull = self._exports, reader.pull
        for piece in split(self._memory.layout, box, self._payload_bytes):
            num_bytes = piece.num_bytes(self._memory.layout)
            computed = exports.readable_tokens(pull)  # a pull that must end ends here, within one piece
            frame = NewFrame(
                FrameKind.PIECE, epoch=pull.epoch, box=piece, payload_bytes=num_bytes, computed_tokens=computed
            )
            exports.begin_send(pull)
            try:
                content_sum = self._memory.pack(pull.blocks, piece, frame.payload)
            finally:
                exports.end_send(pull, num_bytes)
            await context.write(frame.seal(pull.ticket, content_sum if over_sum else None))
            reader.num_pieces += 1
            reader.num_bytes += num_bytes
            self._counters["pieces_sent"] += 1
            self._counters["bytes_sent"] += num_bytes

    async def _wait(self, reader: _Reader, context: grpc.aio.ServicerContext) -> None:
        """Until something has changed, or it is time for a beat."""
        try:
            async with asyncio.timeout(BEAT_S):
                await reader.changed.wait()
            reader.changed.clear()
        except TimeoutError:
            pull = reader.pull
            await context.write(frames.beat(pull.ticket, pull.epoch, self._exports.readable_tokens(pull)))

    # Checks.

    def _allowed(self, pull: Pull) -> bool:
        try:
            self._exports.readable_tokens(pull)
        except ExportRefused:
            return False
        return True

    async def _turn_away(self, error: ExportRefused, context: grpc.aio.ServicerContext) -> None:
        _log.info("pull ended: %s", error)
        await context.abort(_STATUS[error.refusal], str(error))

    async def _check_incarnation(self, meant: int, context: grpc.aio.ServicerContext) -> None:
        ours = self._signature
        if meant != ours.incarnation:
            text = f"{ours.instance} is incarnation {ours.incarnation}, the call is meant for incarnation {meant}"
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, text)

    def _misfit(self, request: kv_pb2.PullRequest, pull: Pull) -> str | None:
        """Why this request's box, codec or digest cannot be served, None where it can."""
        if request.codec not in self._signature.codecs:
            return f"codec {request.codec!r} is none of {', '.join(self._signature.codecs)}"
        if request.digest and request.digest not in self._signature.digests:
            return f"digest {request.digest!r} is none of {', '.join(self._signature.digests)}"
        layout = self._memory.layout
        box = _box(request)
        if (
            box.layer_start < box.layer_end <= layout.num_layers
            and box.head_start < box.head_end <= layout.num_kv_heads
            and box.token_start <= box.token_end <= pull.num_tokens
        ):
            return None
        return (
            f"a pull of {frames.where(box)} from ticket {short(pull.ticket)} over {layout.num_layers} layers, "
            f"{layout.num_kv_heads} heads and {pull.num_tokens} tokens"
        )

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
        if next_s is not None and self._server is not None:
            self._lease_timer = self._loop.call_later(max(0.0, next_s - time.monotonic()), self._expire)

    def _expire(self) -> None:
        self._lease_timer = None
        for ticket in self._exports.expire(time.monotonic()):
            _log.warning("the lease of ticket %s is over; nobody pulled it", short(ticket))
        if self._lease_timer is None and not self._settling:
            self._settle()


def _box(request: kv_pb2.PullRequest) -> KvBox:
    return KvBox(
        layer_start=request.layer_start,
        layer_end=request.layer_end,
        head_start=request.head_start,
        head_end=request.head_end,
        token_start=request.token_start,
        token_end=request.token_end,
    )
