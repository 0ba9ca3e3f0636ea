"""Servers and channels as every process makes them, on real loopback sockets."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
import pytest
from google.protobuf.message_factory import GetMessageClass

from biphase.protos import router_pb2
from biphase.protos.errors import SetupError
from biphase.protos.grpc_setup import (
    MAX_CONTROL_MESSAGE_BYTES,
    bind,
    channel_options,
    server_options,
    service_handler,
)

NOT_UTF8 = b"\x0a\x02\xff\xfe"  # field 1, a string of two bytes that are no UTF-8
CUT_SHORT = b"\x0a\x7f"  # field 1 announces 127 bytes and brings none


class Echo:
    """A Router that answers with what it understood."""

    def __init__(self) -> None:
        self.calls = 0

    async def Generate(
        self, request: router_pb2.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[router_pb2.GenerateReply]:
        self.calls += 1
        yield router_pb2.GenerateReply(delta=router_pb2.Delta(text=request.text))

    async def Abort(self, request: router_pb2.AbortRequest, context: grpc.aio.ServicerContext) -> router_pb2.AbortReply:
        self.calls += 1
        return router_pb2.AbortReply()

    async def GetModelInfo(
        self, request: router_pb2.GetModelInfoRequest, context: grpc.aio.ServicerContext
    ) -> router_pb2.ModelInfoReply:
        return router_pb2.ModelInfoReply()

    async def GetServerInfo(
        self, request: router_pb2.GetServerInfoRequest, context: grpc.aio.ServicerContext
    ) -> router_pb2.ServerInfoReply:
        return router_pb2.ServerInfoReply()


@pytest.fixture
def echo() -> Echo:
    return Echo()


@pytest.fixture
async def channel(echo: Echo) -> AsyncIterator[grpc.aio.Channel]:
    server = grpc.aio.server(options=server_options())
    handler = service_handler(router_pb2.DESCRIPTOR, "Router", echo, GetMessageClass)
    server.add_generic_rpc_handlers((handler,))
    port = bind(server, "127.0.0.1", 0)
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=channel_options()) as channel:
        yield channel
    await server.stop(grace=None)


@pytest.mark.parametrize("data", [NOT_UTF8, CUT_SHORT], ids=["not utf-8", "cut short"])
async def test_undecodable_bytes_are_the_callers_mistake(channel: grpc.aio.Channel, echo: Echo, data: bytes) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await channel.unary_unary("/biphase.v1.Router/Abort")(data)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert caught.value.details() == (
        f"the {len(data)} bytes received are no AbortRequest (malformed, or text that is not UTF-8)"
    )
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in channel.unary_stream("/biphase.v1.Router/Generate")(data):
            raise AssertionError("a reply to bytes that are no request")
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert echo.calls == 0


async def test_the_server_goes_on_after_undecodable_bytes(channel: grpc.aio.Channel) -> None:
    with pytest.raises(grpc.aio.AioRpcError):
        await channel.unary_unary("/biphase.v1.Router/Abort")(CUT_SHORT)
    call = channel.unary_stream(
        "/biphase.v1.Router/Generate",
        request_serializer=router_pb2.GenerateRequest.SerializeToString,
        response_deserializer=router_pb2.GenerateReply.FromString,
    )
    assert [reply.delta.text async for reply in call(router_pb2.GenerateRequest(text="hi"))] == ["hi"]


async def test_a_message_above_the_limit_is_refused_with_both_numbers(channel: grpc.aio.Channel, echo: Echo) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await channel.unary_unary("/biphase.v1.Router/Abort")(b"\0" * (MAX_CONTROL_MESSAGE_BYTES + 1))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert str(MAX_CONTROL_MESSAGE_BYTES) in caught.value.details()
    assert str(MAX_CONTROL_MESSAGE_BYTES + 1) in caught.value.details()
    assert echo.calls == 0


async def test_a_taken_port_is_an_error_that_names_it() -> None:
    first, second = grpc.aio.server(options=server_options()), grpc.aio.server(options=server_options())
    port = bind(first, "127.0.0.1", 0)
    await first.start()
    with pytest.raises(SetupError, match=f"cannot listen on 127.0.0.1:{port}: the port is in use"):
        bind(second, "127.0.0.1", port)
    await first.stop(grace=None)
    await second.stop(grace=None)


async def test_an_address_of_another_host_is_an_error() -> None:
    server = grpc.aio.server(options=server_options())
    with pytest.raises(SetupError, match="cannot listen on 192.0.2.1:0"):
        bind(server, "192.0.2.1", 0)
    await server.stop(grace=None)


async def test_a_client_may_be_slow_to_answer_a_ping_and_a_process_of_ours_may_not() -> None:
    async with silent_peer(server_options()) as ours, silent_peer(server_options(of_clients=True)) as client:
        began_s = time.monotonic()
        async with asyncio.timeout(10):
            while await ours.read(4096):
                pass
        assert 1.0 < time.monotonic() - began_s < 5.0
        with pytest.raises(TimeoutError):  # what it was sent until now, and no end
            async with asyncio.timeout(1.0):
                while await client.read(4096):
                    pass
                raise AssertionError("the client's connection was ended as well")


@contextlib.asynccontextmanager
async def silent_peer(options: list[tuple[str, Any]]) -> AsyncIterator[asyncio.StreamReader]:
    """What comes from a server to a peer that has opened its connection and answers nothing any more."""
    server = grpc.aio.server(options=options)
    port = bind(server, "127.0.0.1", 0)
    await server.start()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    empty_settings, acknowledged = b"\0\0\0\4\0\0\0\0\0", b"\0\0\0\4\1\0\0\0\0"
    writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + empty_settings + acknowledged)
    try:
        yield reader
    finally:
        writer.close()
        await server.stop(grace=None)


@pytest.mark.parametrize("bulk", [False, True])
async def test_a_peer_that_speaks_is_not_given_up_for_a_late_answer_to_a_ping(bulk: bool) -> None:
    options = channel_options(bulk=bulk)
    async with talking_peer() as port, grpc.aio.insecure_channel(f"127.0.0.1:{port}", options) as channel:
        began_s, num_messages = time.monotonic(), 0
        async for _ in channel.unary_stream("/biphase.v1.Router/Generate")(b""):
            num_messages += 1
            if time.monotonic() - began_s > 3.0:
                break
        assert num_messages > 1


@contextlib.asynccontextmanager
async def talking_peer() -> AsyncIterator[int]:
    """The port of a server that sends empty messages without end, ten a second, and answers no ping."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        settings, acknowledged = b"\0\0\0\4\0\0\0\0\0", b"\0\0\0\4\1\0\0\0\0"
        status_200, content_type = b"\x88", b"\x0f\x10\x10application/grpc"
        headers = b"\0\0\x14\1\4\0\0\0\1" + status_200 + content_type
        empty_message = b"\0\0\5\0\0\0\0\0\1" + bytes(5)
        writer.write(settings + acknowledged)
        with contextlib.suppress(ConnectionError, asyncio.CancelledError):  # cancelled: the test is over
            await reader.readuntil(b"Generate")  # the request's stream is open
            writer.write(headers)
            while not writer.is_closing() and not reader.at_eof():
                writer.write(empty_message)
                await asyncio.sleep(0.1)
        writer.close()

    server = await asyncio.start_server(talk, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


def test_how_soon_a_lost_peer_is_noticed_on_each_side() -> None:
    names = ("grpc.keepalive_timeout_ms", "grpc.http2.ping_timeout_ms")
    for options, answer_ms in (
        (channel_options(), 1000),
        (channel_options(of_client=True), 1500),  # asked after a second of silence: a dead router is told within 3 s
        (channel_options(bulk=True), 1000),
        (server_options(), 1000),
        (server_options(of_clients=True), 10_000),
    ):
        assert [dict(options)[name] for name in names] == [answer_ms, answer_ms]


def test_bulk_channels_have_a_connection_of_their_own() -> None:
    assert ("grpc.use_local_subchannel_pool", 1) in channel_options(bulk=True)
    assert ("grpc.use_local_subchannel_pool", 1) not in channel_options()
