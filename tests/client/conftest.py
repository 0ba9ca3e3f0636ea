"""A scripted router, served on loopback."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from support.scripted_router import ScriptedRouter

from biphase.protos.grpc_setup import server_options
from biphase.protos.router_pb2_grpc import RouterServicer, add_RouterServicer_to_server


@pytest.fixture
def router() -> ScriptedRouter:
    return ScriptedRouter()


@pytest.fixture
def serve() -> Iterator[Callable[[RouterServicer], str]]:
    """Serves a servicer and returns its address; stopped at the end of the test."""
    servers: list[grpc.Server] = []

    def start(servicer: RouterServicer) -> str:
        server = grpc.server(ThreadPoolExecutor(max_workers=4), options=server_options())
        add_RouterServicer_to_server(servicer, server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        servers.append(server)
        return f"127.0.0.1:{port}"

    yield start
    for server in servers:
        server.stop(grace=None).wait()


@pytest.fixture
def address(router: ScriptedRouter, serve: Callable[[RouterServicer], str]) -> str:
    return serve(router)
