"""Several routers: calls go round, and what has no token yet goes elsewhere when one is away."""

import threading
from collections.abc import Callable, Iterator

import grpc
import pytest
from support.scripted_router import Reply, ScriptedRouter, accepted, delta

from biphase.client import AsyncClient, Client, DeadlinePassed, Overloaded, RequestNotFound, Unavailable
from biphase.client.routers import AVOIDED_FOR_S, Attempts, Routers
from biphase.protos import router_pb2
from biphase.protos.errors import BiphaseError
from biphase.protos.router_pb2_grpc import RouterServicer

NOBODY = "127.0.0.1:1"
Serve = Callable[[RouterServicer], str]


class Leaving(ScriptedRouter):
    """Ends every request UNAVAILABLE after ``num_tokens`` of its tokens."""

    def __init__(self, num_tokens: int) -> None:
        super().__init__()
        self.num_tokens = num_tokens

    def Generate(self, request: router_pb2.GenerateRequest, context: grpc.ServicerContext) -> Iterator[Reply]:
        self.requests.append(request)
        yield accepted(request)
        for index in range(self.num_tokens):
            yield delta("x", [9], index)
        context.abort(grpc.StatusCode.UNAVAILABLE, "the router is shutting down")


def test_calls_go_round_and_one_that_failed_comes_last_for_a_while() -> None:
    routers = Routers(("a:1", "b:2", "c:3"))
    assert [routers.order(0.0) for _ in range(4)] == [[0, 1, 2], [1, 2, 0], [2, 0, 1], [0, 1, 2]]
    routers.failed(1, 10.0)
    assert routers.order(10.0 + AVOIDED_FOR_S / 2) == [2, 0, 1]
    assert routers.order(10.0 + AVOIDED_FOR_S) == [2, 0, 1]
    routers.failed(2, 20.0)
    routers.worked(2)
    assert routers.order(20.0) == [0, 1, 2]
    assert repr(routers) == "<Routers a:1, b:2, c:3>"


def test_each_is_tried_once_within_the_time_that_is_left() -> None:
    calls: list[tuple[int, float | None]] = []

    def start(index: int, left_s: float | None) -> None:
        calls.append((index, left_s))

    attempts = Attempts(Routers(("a:1", "b:2")), start, sent_at_s=100.0, timeout_s=5.0)
    gone: BiphaseError = Unavailable("gone")
    assert not attempts.go_on(Overloaded("full"), 101.0, has_tokens=False)
    assert not attempts.go_on(gone, 101.0, has_tokens=True)
    assert attempts.go_on(gone, 101.0, has_tokens=False)
    assert attempts.address == "b:2"
    assert not attempts.go_on(gone, 102.0, has_tokens=False)
    assert calls == [(0, 5.0), (1, 4.0)]
    late = Attempts(Routers(("a:1", "b:2")), start, sent_at_s=100.0, timeout_s=5.0)
    assert not late.go_on(gone, 105.0, has_tokens=False)


def test_a_refused_connection_goes_to_the_next(address: str) -> None:
    with Client(f"{NOBODY},{address}") as client:
        assert client.address == f"{NOBODY},{address}"
        assert [client.generate("hello").text() for _ in range(3)] == ["Hello, world"] * 3
        assert client.server_info().name == "router-0"


def test_what_has_no_token_yet_goes_elsewhere(address: str, router: ScriptedRouter, serve: Serve) -> None:
    leaving = Leaving(num_tokens=0)
    with Client([serve(leaving), address]) as client:
        generation = client.generate("hello", request_id="mine")
        assert generation.text() == "Hello, world"
        assert [one.request_id for one in (*leaving.requests, *router.requests)] == ["mine", "mine"]


def test_what_has_a_token_does_not(address: str, router: ScriptedRouter, serve: Serve) -> None:
    with Client([serve(Leaving(num_tokens=1)), address]) as client:
        with pytest.raises(Unavailable, match="shutting down"):
            client.generate("hello").text()
        assert router.requests == []


def test_where_all_are_away_the_last_ones_word_is_raised(serve: Serve) -> None:
    with Client([NOBODY, serve(Leaving(num_tokens=0))]) as client:
        with pytest.raises(Unavailable, match="shutting down"):
            client.generate("hello").text()


def test_a_deadline_is_the_last_word_where_somebody_is_there(address: str) -> None:
    with Client(address) as client, pytest.raises(DeadlinePassed):
        client.generate("hang", timeout_s=0.2).text()


def test_an_abort_finds_the_router_that_has_the_request(address: str, router: ScriptedRouter, serve: Serve) -> None:
    with Client([serve(ScriptedRouter()), address, NOBODY]) as client:
        client.abort("live")
        with pytest.raises(RequestNotFound):
            client.abort("gone")


def test_closing_while_it_goes_elsewhere_ends_it(address: str, serve: Serve) -> None:
    with Client([serve(Leaving(num_tokens=0)), address]) as client:
        generation = client.generate("hang")
        closing = threading.Timer(0.0, generation.close)
        closing.start()
        with pytest.raises(BiphaseError):
            generation.text()
        closing.join()


async def test_the_async_client_does_the_same(address: str, router: ScriptedRouter, serve: Serve) -> None:
    leaving = Leaving(num_tokens=0)
    async with AsyncClient(f"{NOBODY},{serve(leaving)},{address}") as client:
        assert await client.generate("hello").text() == "Hello, world"
        assert (len(leaving.requests), len(router.requests)) == (1, 1)
        assert (await client.server_info()).name == "router-0"
        await client.abort("live")
    async with AsyncClient([serve(Leaving(num_tokens=2)), address]) as client:
        with pytest.raises(Unavailable, match="shutting down"):
            await client.generate("hello").text()
        assert len(router.requests) == 1
