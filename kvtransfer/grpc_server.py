"""The serving end of the gRPC wire: a server of its own in front of a rank's KvService.

A frame is one message, made where it is packed: gRPC sends it from a copy of its own, so nothing of ours is read once
the write returns.
"""

import ctypes
from collections.abc import Sequence
from contextlib import suppress

import grpc
import grpc.aio
from google.protobuf.message_factory import GetMessageClass

from biphase.kernels.kv_layout import KvBox
from biphase.kvtransfer.frames import HEADER_BYTES
from biphase.kvtransfer.grpc_transport import SERVICE
from biphase.kvtransfer.refusals import KvRefused, RefusedBecause
from biphase.kvtransfer.service import KvService
from biphase.kvtransfer.signature import BYTES_DIGEST, KvSignatureValue
from biphase.kvtransfer.wire import PullOrder, Room
from biphase.protos import kv_pb2
from biphase.protos.grpc_setup import Undecodable, bind, refuse_undecodable, server_options, service_handler, tolerant
from biphase.protos.ids import TicketId

_STATUS: dict[RefusedBecause, grpc.StatusCode] = {
    "gone": grpc.StatusCode.NOT_FOUND,
    "stale": grpc.StatusCode.FAILED_PRECONDITION,
    "invalid": grpc.StatusCode.INVALID_ARGUMENT,
}
_PYBUF_WRITE = 0x200

# Bytes objects are filled before anyone else sees them: the one way to let numpy gather straight into what gRPC sends.
_new_bytes = ctypes.pythonapi.PyBytes_FromStringAndSize
_new_bytes.restype, _new_bytes.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_ssize_t]
_bytes_address = ctypes.pythonapi.PyBytes_AsString
_bytes_address.restype, _bytes_address.argtypes = ctypes.c_void_p, [ctypes.py_object]
_view_of_memory = ctypes.pythonapi.PyMemoryView_FromMemory
_view_of_memory.restype = ctypes.py_object
_view_of_memory.argtypes = [ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int]


class GrpcKvServer:
    """Handshake, Pull and Release of one service over gRPC."""

    def __init__(self, service: KvService) -> None:
        self._service = service
        self._server: grpc.aio.Server | None = None

    async def start(self, host: str, port: int) -> int:
        """Listen, and return the bound port. Raises SetupError when it is taken."""
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
        return bound

    async def stop(self) -> None:
        """Stop listening, and have every call of ours cancelled."""
        if self._server is not None:
            await self._server.stop(grace=None)
            self._server = None

    async def Handshake(self, request: kv_pb2.KvSignature, context: grpc.aio.ServicerContext) -> kv_pb2.KvSignature:
        try:
            theirs = KvSignatureValue.from_proto(request)
        except ValueError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        try:
            return self._service.handshake(theirs).to_proto()
        except KvRefused as refused:
            await _abort(context, refused)
            return kv_pb2.KvSignature()  # to nobody

    async def Release(self, request: kv_pb2.ReleaseRequest, context: grpc.aio.ServicerContext) -> kv_pb2.ReleaseReply:
        try:
            self._service.release(TicketId(request.ticket), request.epoch, request.incarnation, request.bytes)
        except KvRefused as refused:
            await _abort(context, refused)
        return kv_pb2.ReleaseReply()

    async def _pull(self, request: kv_pb2.PullRequest | Undecodable, context: grpc.aio.ServicerContext) -> None:
        await refuse_undecodable(request, context)
        assert isinstance(request, kv_pb2.PullRequest)
        try:
            await self._service.serve(_order(request), GrpcSink(context))
        except KvRefused as refused:
            await _abort(context, refused)
        except ConnectionError as error:  # for the reader, the wire is broken, and not that we refused
            await _end(context, grpc.StatusCode.UNAVAILABLE, str(error))


class GrpcSink:
    """The replies of one Pull call."""

    gathers = False

    def piece_bytes(self, message_bytes: int) -> int:
        return message_bytes

    def __init__(self, context: grpc.aio.ServicerContext) -> None:
        self._context = context

    async def room(self, num_bytes: int) -> "GrpcRoom":
        return GrpcRoom(num_bytes)

    async def send(self, header: bytes, payload: Room | Sequence[memoryview] | bytes) -> None:
        if isinstance(payload, GrpcRoom):
            message = payload.message(header)
        else:
            message = b"".join((header, *([payload] if isinstance(payload, bytes) else _parts(payload))))
        await self._context.write(message)

    async def abort(self, header: bytes, payload: Room | Sequence[memoryview] | bytes, share: float) -> None:
        """Between messages, which come whole or not at all, and by the call's status: its connection is gRPC's own, and a
        call that its handler leaves without one never ends."""
        raise ConnectionError("broken on purpose")

    def close(self) -> None:
        pass


class GrpcRoom:
    """A message being filled: header, then payload. Not to be touched once it is sent."""

    def __init__(self, num_bytes: int) -> None:
        size = HEADER_BYTES + num_bytes
        self._data: bytes = _new_bytes(None, size)
        self._view: memoryview = _view_of_memory(_bytes_address(self._data), size, _PYBUF_WRITE)
        self.payload: memoryview = self._view[HEADER_BYTES:]

    def message(self, header: bytes) -> bytes:
        self._view[:HEADER_BYTES] = header
        self.payload.release()
        self._view.release()
        return self._data


def _parts(payload: Room | Sequence[memoryview]) -> Sequence[memoryview]:
    return payload if isinstance(payload, Sequence) else [payload.payload]


async def _abort(context: grpc.aio.ServicerContext, refused: KvRefused) -> None:
    await _end(context, _STATUS[refused.because], str(refused))


async def _end(context: grpc.aio.ServicerContext, code: grpc.StatusCode, text: str) -> None:
    """Abort, where there is somebody to be told: gRPC logs a stack trace for a status to a call that was cancelled."""
    if not context.cancelled():
        with suppress(grpc.aio.InternalError):  # it was cancelled in this moment
            await context.abort(code, text)


def _order(request: kv_pb2.PullRequest) -> PullOrder:
    return PullOrder(
        ticket=TicketId(request.ticket),
        epoch=request.epoch,
        incarnation=request.incarnation,
        box=KvBox(
            layer_start=request.layer_start,
            layer_end=request.layer_end,
            head_start=request.head_start,
            head_end=request.head_end,
            token_start=request.token_start,
            token_end=request.token_end,
        ),
        codec=request.codec,
        digest=request.digest or BYTES_DIGEST,
        pieces_only=request.pieces_only,
    )
