"""The wires of one rank: what serves its KV, what it reads by, and the endpoint that says so to others.

``auto`` makes what may pay on such a device; a transport that is asked for by name is made beside tcp and grpc, which
take over where it fails. What cannot be made here is left out with a line that says why.
"""

import logging
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager

from biphase.kvtransfer.grpc_server import GrpcKvServer
from biphase.kvtransfer.grpc_transport import GrpcTransport
from biphase.kvtransfer.nixl.library import rdma_ports
from biphase.kvtransfer.service import KvService
from biphase.kvtransfer.shm.host import host_id
from biphase.kvtransfer.shm.plane import ShmPlane
from biphase.kvtransfer.signature import RankEndpoint
from biphase.kvtransfer.tcp.server import TcpKvServer
from biphase.kvtransfer.tcp.source import TcpTransport
from biphase.kvtransfer.wire import DataPlane, Transport
from biphase.protos.errors import one_line

_log = logging.getLogger(__name__)


@asynccontextmanager
async def serving(
    service: KvService,
    *,
    host: str,
    port: int,
    address: Callable[[int], str],
    own_host: str,
    device: str,
    wanted: str = "auto",
) -> AsyncIterator[RankEndpoint]:
    """The service started and listening on ``host``; ``port``: of the gRPC wire. ``address``: what others reach one of our
    ports by; ``own_host``: an address of this machine. Raises SetupError when the port is taken."""
    async with AsyncExitStack() as closing:
        service.start()
        closing.push_async_callback(service.stop)
        server = GrpcKvServer(service)
        closing.push_async_callback(server.stop)
        grpc, tcp, planes = address(await server.start(host, port)), "", list[DataPlane]()
        if wanted != "grpc":
            planes = await closing.enter_async_context(_planes(own_host, device, wanted))
            raw = TcpKvServer(service, planes)
            closing.push_async_callback(raw.stop)
            tcp = address(await raw.start(host, 0))
        yield RankEndpoint(
            grpc=grpc,
            tcp=tcp,
            host_id=host_id(),
            device=device,
            transports=_names(planes, wanted),
            rdma=bool(rdma_ports()),
        )


@asynccontextmanager
async def reading(
    *, own_host: str, device: str, wanted: str = "auto"
) -> AsyncIterator[tuple[list[Transport], RankEndpoint]]:
    """What a rank that only reads has, and its endpoint, which has no addresses."""
    async with AsyncExitStack() as closing:
        transports: list[Transport] = [GrpcTransport()]
        planes: list[DataPlane] = []
        if wanted != "grpc":
            planes = await closing.enter_async_context(_planes(own_host, device, wanted))
            transports += [TcpTransport(), *(TcpTransport(plane) for plane in planes)]
        yield (
            transports,
            RankEndpoint(host_id=host_id(), device=device, transports=_names(planes, wanted), rdma=bool(rdma_ports())),
        )


def _names(planes: list[DataPlane], wanted: str) -> tuple[str, ...]:
    return ("grpc",) if wanted == "grpc" else (*(plane.name for plane in planes), "tcp", "grpc")


@asynccontextmanager
async def _planes(host: str, device: str, wanted: str) -> AsyncIterator[list[DataPlane]]:
    """The data planes of this process, closed when left."""
    made: list[DataPlane] = []
    try:
        for name in _worth(device) if wanted == "auto" else (wanted,):
            make = _MAKERS.get(name)
            if make is None:
                continue
            try:
                plane = make(host, device)
            except (ConnectionError, OSError, ImportError, RuntimeError) as error:
                _log.warning("no %s here: %s", name, one_line(error))
                continue
            made.append(plane)
        yield made
    finally:
        for plane in made:
            await plane.close()


def _worth(device: str) -> tuple[str, ...]:
    """Those that auto may choose from: on a CPU nothing beats shared memory on a host and sockets between hosts."""
    return ("shm",) if device == "cpu" else ("cuda_ipc", "shm", "nixl", "dist")


def _shm(host: str, device: str) -> DataPlane:
    return ShmPlane()


def _nixl(host: str, device: str) -> DataPlane:
    from biphase.kvtransfer.nixl.plane import NixlPlane

    return NixlPlane(host)


def _dist(host: str, device: str) -> DataPlane:
    from biphase.kvtransfer.pair_groups.plane import DistPlane

    return DistPlane(host, device=device)


def _cuda_ipc(host: str, device: str) -> DataPlane:
    from biphase.kvtransfer.cuda_ipc.plane import CudaIpcPlane

    return CudaIpcPlane(device)


_MAKERS: dict[str, Callable[[str, str], DataPlane]] = {"cuda_ipc": _cuda_ipc, "shm": _shm, "nixl": _nixl, "dist": _dist}
"""Some import what not every installation has, or what takes long: only when they are made."""
