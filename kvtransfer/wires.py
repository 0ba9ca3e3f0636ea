"""The wires of one rank: what serves its KV, what it reads by, and the endpoint that says so to others."""

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager

from biphase.kvtransfer.grpc_server import GrpcKvServer
from biphase.kvtransfer.grpc_transport import GrpcTransport
from biphase.kvtransfer.service import KvService
from biphase.kvtransfer.signature import RankEndpoint
from biphase.kvtransfer.wire import Transport


@asynccontextmanager
async def serving(
    service: KvService, *, host: str, port: int, address: Callable[[int], str], device: str, wanted: str = "auto"
) -> AsyncIterator[RankEndpoint]:
    """The service started and listening on ``host``; ``port``: of the gRPC wire. ``address``: what others reach one of our
    ports by. Raises SetupError when the port is taken."""
    async with AsyncExitStack() as closing:
        service.start()
        closing.push_async_callback(service.stop)
        server = GrpcKvServer(service)
        closing.push_async_callback(server.stop)
        grpc = address(await server.start(host, port))
        yield RankEndpoint(grpc=grpc, device=device)


def reading(*, device: str, wanted: str = "auto") -> tuple[list[Transport], RankEndpoint]:
    """What a rank that only reads has, and its endpoint, which has no addresses."""
    return [GrpcTransport()], RankEndpoint(device=device)
