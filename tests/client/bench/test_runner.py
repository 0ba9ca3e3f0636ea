"""The open loop against a router that answers as it is told to."""

import asyncio
import math
from collections.abc import AsyncIterator

import grpc
import grpc.aio
import pytest
from support.scripted_router import accepted, delta, finished

from biphase.client import AsyncClient
from biphase.client.bench.arrivals import Arrival
from biphase.client.bench.measured import NOT_SENT
from biphase.client.bench.prompts import Prompt
from biphase.client.bench.runner import Runner
from biphase.protos import router_pb2, router_pb2_grpc
from biphase.protos.grpc_setup import server_options

Reply = router_pb2.GenerateReply


class HeldRouter(router_pb2_grpc.RouterServicer):
    """Counts what has come in, and answers when ``go`` is set: three tokens 1, 2, 3; a prompt that begins with 9 fails."""

    def __init__(self) -> None:
        self.came = 0
        self.all_came = asyncio.Event()
        self.go = asyncio.Event()

    async def Generate(
        self, request: router_pb2.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[Reply]:
        self.came += 1
        if self.came == 3:
            self.all_came.set()
        yield accepted(request)
        yield delta("a", [1], 0)
        await self.go.wait()
        if request.token_ids.ids[0] == 9:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "decode-0 was lost")
        yield delta("b", [2, 3], 1)
        yield finished()


class Scripted:
    """A prompt per index."""

    def __init__(self, *prompts: Prompt) -> None:
        self.prompts = prompts

    def of(self, arrival: Arrival) -> Prompt:
        return self.prompts[arrival.index % len(self.prompts)]


def due(*times_s: float) -> list[Arrival]:
    return [Arrival(index=i, at_s=at, phase=0, input_tokens=1, output_tokens=3) for i, at in enumerate(times_s)]


@pytest.fixture
async def router() -> AsyncIterator[tuple[HeldRouter, AsyncClient]]:
    router = HeldRouter()
    server = grpc.aio.server(options=server_options())
    router_pb2_grpc.add_RouterServicer_to_server(router, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with AsyncClient(f"127.0.0.1:{port}") as client:
        yield router, client
    await server.stop(None)


PLAIN = Prompt(token_ids=[5], max_tokens=3)


async def test_arrivals_do_not_wait_for_replies(router: tuple[HeldRouter, AsyncClient]) -> None:
    held, client = router
    runner = Runner([client], Scripted(PLAIN))
    running = asyncio.create_task(runner.run(due(0.0, 0.01, 0.02)))
    await asyncio.wait_for(held.all_came.wait(), 10)  # none has been answered
    assert len(runner.live) == 3 and not runner.measured
    held.go.set()
    found = await running
    assert [(one.kind, one.output_tokens, one.decode_instance) for one in found] == [
        ("DONE", 3, "decode-0#1 (pid 12)")
    ] * 3
    assert all(one.itl_ms[1] == 0.0 and one.sent_s >= one.due_s for one in found)


async def test_what_is_beyond_the_bound_is_not_sent_and_counted(router: tuple[HeldRouter, AsyncClient]) -> None:
    held, client = router
    runner = Runner([client], Scripted(PLAIN), max_in_flight=1)
    running = asyncio.create_task(runner.run(due(0.0, 0.0)))
    held.go.set()
    kinds = sorted(one.kind for one in await running)
    assert kinds == ["DONE", NOT_SENT]


async def test_answers_are_compared_whole_and_broken_ones_as_far_as_they_came(
    router: tuple[HeldRouter, AsyncClient],
) -> None:
    held, client = router
    held.go.set()
    prompts = [
        Prompt(token_ids=[5], max_tokens=3, answer=[1, 2, 3, 4]),
        Prompt(token_ids=[5], max_tokens=3, answer=[1, 2, 4]),
        Prompt(token_ids=[9], max_tokens=3, answer=[1, 2, 3]),
        Prompt(token_ids=[9], max_tokens=3, answer=[7, 2, 3]),
        PLAIN,
    ]
    runner = Runner([client], Scripted(*prompts))
    found = sorted(await runner.run(due(*[0.0] * 5)), key=lambda one: one.index)
    assert [one.wrong for one in found] == [False, True, False, True, False]
    assert [one.checked for one in found] == [True] * 4 + [False]
    assert found[2].kind == "UNAVAILABLE" and found[2].detail == "decode-0 was lost"


async def test_a_stop_sends_no_more_and_reads_what_runs(router: tuple[HeldRouter, AsyncClient]) -> None:
    held, client = router
    runner = Runner([client], Scripted(PLAIN))
    running = asyncio.create_task(runner.run(due(0.0, 0.0, 0.0, math.inf)))
    await asyncio.wait_for(held.all_came.wait(), 10)
    runner.stop()
    held.go.set()
    assert [one.kind for one in await running] == ["DONE"] * 3
