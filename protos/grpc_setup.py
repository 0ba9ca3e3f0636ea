"""gRPC servers and channels as every process of biphase makes them.

Settings and their reasons (measured with grpcio 1.85):
- ``grpc.so_reuseport=0``: a taken port is an error, not a second listener.
- keepalive every second *and* ``grpc.http2.ping_timeout_ms``: keepalive alone never notices a stopped peer.
- ``grpc.http2.bdp_probe=0`` but where clients upload to: probes of the bandwidth are pings, sent while data comes.
  With the ping timeout a peer that speaks all the time is given up when one answer is late; without probes only one silent for
  a second is asked. Probes let a window grow from 64 KiB; ``grpc.http2.lookahead_bytes`` begins with a large one (1 MiB at a
  round trip of 40 ms: 87 ms without both, 46 ms with probes, 49 ms with the large window; pulls of KV over loopback are as fast).
- a server ends the connections of clients later than those of our own processes: a client's machine may be busy or far away,
  and nothing waits for the news. How soon a client notices that its router is gone is the client's own channel's.
- bulk channels use a subchannel pool of their own, so that KV never queues before control messages.
- request bytes are decoded inside the handler: an undecodable message is INVALID_ARGUMENT, where gRPC would say INTERNAL.
"""

import socket
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from biphase.protos.errors import SetupError

MAX_CONTROL_MESSAGE_BYTES = 4 * 1024 * 1024
MAX_BULK_MESSAGE_BYTES = 8 * 1024 * 1024

CONNECT_MS = 1000
"""What gRPC's name for it hides: so long an attempt to connect may take, until the far end has sent its SETTINGS. At 100 ms
an instance hard at work was called unreachable."""

PING_MS = 1000
ANSWER_MS, SERVER_ANSWER_MS, CLIENT_ANSWER_MS = 1000, 1500, 10_000
"""How long the other end may take to answer a ping before the connection is ended: a process of ours; one of ours that people's
programs ask (a client's streams cannot go on elsewhere, and it is to hear of its router's end within 3 s); such a program."""


WINDOW_BYTES, BULK_WINDOW_BYTES = 4 * 1024 * 1024, 16 * 1024 * 1024
"""Of a stream, where no probes let it grow."""


def _fixed_window(num_bytes: int) -> list[tuple[str, Any]]:
    return [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", num_bytes)]


def _keepalive(answer_ms: int) -> list[tuple[str, Any]]:
    return [
        ("grpc.keepalive_time_ms", PING_MS),
        ("grpc.keepalive_timeout_ms", answer_ms),
        ("grpc.http2.ping_timeout_ms", answer_ms),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
    ]


def server_options(
    max_message_bytes: int = MAX_CONTROL_MESSAGE_BYTES, *, of_clients: bool = False
) -> list[tuple[str, Any]]:
    """Options of every server; ``max_message_bytes`` bounds what it receives. ``of_clients``: people's programs and commands
    connect to it, not processes of ours alone."""
    return [
        ("grpc.so_reuseport", 0),
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", -1),
        ("grpc.max_metadata_size", 16 * 1024),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 500),
        ("grpc.http2.max_ping_strikes", 0),
        *_keepalive(CLIENT_ANSWER_MS if of_clients else ANSWER_MS),
        *([] if of_clients else _fixed_window(WINDOW_BYTES)),
    ]


def channel_options(
    *, bulk: bool = False, of_client: bool = False, max_message_bytes: int = MAX_CONTROL_MESSAGE_BYTES
) -> list[tuple[str, Any]]:
    """Options of every channel. ``bulk`` gives it a connection of its own; ``of_client``: a client's or a command's."""
    options: list[tuple[str, Any]] = [
        ("grpc.max_receive_message_length", MAX_BULK_MESSAGE_BYTES if bulk else max_message_bytes),
        ("grpc.max_send_message_length", -1),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", CONNECT_MS),
        ("grpc.max_reconnect_backoff_ms", 1000),
        ("grpc.enable_http_proxy", 0),
        *_keepalive(SERVER_ANSWER_MS if of_client else ANSWER_MS),
        *_fixed_window(BULK_WINDOW_BYTES if bulk else WINDOW_BYTES),
    ]
    if bulk:
        options.append(("grpc.use_local_subchannel_pool", 1))
    return options


def bind(server: grpc.aio.Server, host: str, port: int) -> int:
    """Listen on host:port (0: any free one) and return the port. Raises SetupError naming the address when taken."""
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    refusal = f"cannot listen on {address}: the port is in use or the address is not this host's"
    try:
        _probe(host, port)
        bound: int = server.add_insecure_port(address)
    except (OSError, RuntimeError) as error:
        raise SetupError(refusal) from error
    if bound == 0:
        raise SetupError(refusal)
    return bound


def _probe(host: str, port: int) -> None:
    """Bind once with a plain socket: where that fails, gRPC would log the failure to stderr in lines of its own."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(address)


class Undecodable:
    """Stands in for a request whose bytes are no such message."""

    def __init__(self, message_name: str, num_bytes: int) -> None:
        self.message_name = message_name
        self.num_bytes = num_bytes

    def __str__(self) -> str:
        return f"the {self.num_bytes} bytes received are no {self.message_name} (malformed, or text that is not UTF-8)"


def tolerant(message_type: Any) -> Callable[[bytes], Any]:
    """A request deserializer for ``message_type`` that returns Undecodable instead of raising."""

    def parse(data: bytes) -> Any:
        try:
            return message_type.FromString(data)
        except (DecodeError, ValueError):  # upb sometimes raises UnicodeDecodeError
            return Undecodable(message_type.DESCRIPTOR.name, len(data))

    return parse


Handler = Callable[[Any, grpc.aio.ServicerContext], Awaitable[Any]]


async def refuse_undecodable(request: Any, context: grpc.aio.ServicerContext) -> None:
    """First line of a handler registered with ``tolerant``: INVALID_ARGUMENT for bytes that are no message."""
    if isinstance(request, Undecodable):
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(request))


def _guard_unary_unary(handler: Handler) -> Handler:
    async def guarded(request: Any, context: grpc.aio.ServicerContext) -> Any:
        await refuse_undecodable(request, context)
        return await handler(request, context)

    return guarded


def _guard_unary_stream(
    handler: Callable[[Any, grpc.aio.ServicerContext], Any],
) -> Callable[[Any, grpc.aio.ServicerContext], Any]:
    async def guarded(request: Any, context: grpc.aio.ServicerContext) -> Any:
        await refuse_undecodable(request, context)
        async for reply in handler(request, context):
            yield reply

    return guarded


def service_handler(file_descriptor: Any, service: str, servicer: Any, messages: Any) -> grpc.GenericRpcHandler:
    """A generic handler for ``service`` whose requests are decoded tolerantly.

    ``file_descriptor`` is ``x_pb2.DESCRIPTOR``, ``messages`` the callable that gives a message class for a message
    descriptor (``google.protobuf.message_factory.GetMessageClass``). ``servicer`` has one async method (or async
    generator, where the reply streams) per RPC, named like it. Bidirectional methods get Undecodable items in their
    request stream and must look for them. A method that ``servicer`` does not have is UNIMPLEMENTED.
    """
    methods = {}
    descriptor = file_descriptor.services_by_name[service]
    for method in descriptor.methods:
        implementation = getattr(servicer, method.name, None)
        if implementation is None:
            continue
        reply = messages(method.output_type)
        options = {
            "request_deserializer": tolerant(messages(method.input_type)),
            "response_serializer": reply.SerializeToString,
        }
        if method.client_streaming and method.server_streaming:
            methods[method.name] = grpc.stream_stream_rpc_method_handler(implementation, **options)
        elif method.server_streaming:
            methods[method.name] = grpc.unary_stream_rpc_method_handler(_guard_unary_stream(implementation), **options)
        else:
            methods[method.name] = grpc.unary_unary_rpc_method_handler(_guard_unary_unary(implementation), **options)
    return grpc.method_handlers_generic_handler(descriptor.full_name, methods)
