"""The reading end of the gRPC transport. Payload bytes pass no protobuf: the pull is a generic stream of raw frames."""

import asyncio
from collections.abc import AsyncIterator, Sequence

import grpc
import grpc.aio

from biphase.kvtransfer.frames import HEADER_BYTES
from biphase.kvtransfer.signature import KvSignatureValue
from biphase.kvtransfer.wire import PullOrder, SourceRefused, SourceUnreachable
from biphase.protos import kv_pb2
from biphase.protos.grpc_setup import channel_options
from biphase.protos.ids import TicketId

SERVICE = "biphase.v1.KvEndpoint"

_UNREACHABLE = frozenset({grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED})


class GrpcTransport:
    """Sources reached by gRPC, each with a connection for control and one for bulk."""

    name = "grpc"

    def open(self, address: str) -> "GrpcSource":
        return GrpcSource(address)

    async def close(self) -> None:
        pass


class GrpcSource:
    """One rank's KV endpoint."""

    def __init__(self, address: str) -> None:
        self._control = grpc.aio.insecure_channel(address, options=channel_options(bulk=True))
        self._bulk = grpc.aio.insecure_channel(address, options=channel_options(bulk=True))
        self._handshake = self._control.unary_unary(
            f"/{SERVICE}/Handshake",
            request_serializer=kv_pb2.KvSignature.SerializeToString,
            response_deserializer=kv_pb2.KvSignature.FromString,
        )
        self._release = self._control.unary_unary(
            f"/{SERVICE}/Release",
            request_serializer=kv_pb2.ReleaseRequest.SerializeToString,
            response_deserializer=kv_pb2.ReleaseReply.FromString,
        )
        self._pull = self._bulk.unary_stream(f"/{SERVICE}/Pull")

    async def handshake(self, signature: KvSignatureValue, timeout_s: float) -> KvSignatureValue:
        try:
            return KvSignatureValue.from_proto(await self._handshake(signature.to_proto(), timeout=timeout_s))
        except grpc.aio.AioRpcError as error:
            raise _told(error) from None

    def pull(self, order: PullOrder) -> "GrpcFrameStream":
        box = order.box
        request = kv_pb2.PullRequest(
            ticket=order.ticket,
            epoch=order.epoch,
            incarnation=order.incarnation,
            layer_start=box.layer_start,
            layer_end=box.layer_end,
            head_start=box.head_start,
            head_end=box.head_end,
            token_start=box.token_start,
            token_end=box.token_end,
            codec=order.codec,
            pieces_only=order.pieces_only,
            digest=order.digest,
        )
        return GrpcFrameStream(self._pull(request.SerializeToString()))

    async def release(
        self, ticket: TicketId, epoch: int, incarnation: int, timeout_s: float, num_bytes: int = 0
    ) -> None:
        request = kv_pb2.ReleaseRequest(ticket=ticket, epoch=epoch, incarnation=incarnation, bytes=num_bytes)
        try:
            await self._release(request, timeout=timeout_s)
        except grpc.aio.AioRpcError as error:
            raise _told(error) from None

    async def close(self) -> None:
        await self._control.close()
        await self._bulk.close()


class GrpcFrameStream:
    """The replies of one Pull call."""

    def __init__(self, call: "grpc.aio.UnaryStreamCall[bytes, bytes]") -> None:
        self._call = call
        self._broken_off: str | None = None

    def __aiter__(self) -> AsyncIterator["GrpcArrival"]:
        return self

    async def __anext__(self) -> "GrpcArrival":
        try:
            frame = await self._call.read()
        except grpc.aio.AioRpcError as error:
            raise SourceUnreachable(self._broken_off) if self._broken_off is not None else _told(error) from None
        except asyncio.CancelledError:
            # Our own break_off looks like a cancellation of the reader; a real one is passed on.
            if self._broken_off is None:
                raise
            raise SourceUnreachable(self._broken_off) from None
        if frame is not grpc.aio.EOF:
            return GrpcArrival(frame)
        if self._broken_off is not None:
            raise SourceUnreachable(self._broken_off)
        raise StopAsyncIteration

    def break_off(self, reason: str) -> None:
        if self._broken_off is None:
            self._broken_off = reason
            self._call.cancel()


class GrpcArrival:
    """One message: it is all there when it comes."""

    scatters = False

    def __init__(self, message: bytes) -> None:
        self.header = message[:HEADER_BYTES]
        self.num_bytes = max(0, len(message) - HEADER_BYTES)
        self._payload = memoryview(message)[HEADER_BYTES:]

    async def payload(self) -> memoryview:
        return self._payload

    async def read_into(self, parts: Sequence[memoryview]) -> None:
        at = 0
        for part in parts:
            part[:] = self._payload[at : at + len(part)]
            at += len(part)

    def intact(self) -> bool:
        return True


def _told(error: grpc.aio.AioRpcError) -> SourceUnreachable | SourceRefused:
    text = " ".join((error.details() or error.code().name).split())
    if error.code() in _UNREACHABLE:
        return SourceUnreachable(text)
    return SourceRefused(text)
