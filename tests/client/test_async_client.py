"""The asynchronous client against a scripted router on loopback."""

import asyncio
from collections.abc import AsyncIterator

import pytest
from support.scripted_router import ScriptedRouter

from biphase.client import AsyncClient, Cancelled, DeadlinePassed, Internal, Overloaded, RequestNotFound, Unavailable

ENDED_WITHIN_S = 5.0


@pytest.fixture
async def client(address: str) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(address) as client:
        yield client


async def ended(router: ScriptedRouter) -> bool:
    return await asyncio.to_thread(router.call_ended.wait, ENDED_WITHIN_S)


async def test_answer_streams_and_leaves_a_result(client: AsyncClient) -> None:
    generation = client.generate(messages=[{"role": "user", "content": "hello"}], temperature=0.0)
    assert [piece.text async for piece in generation] == ["Hello", ", wor", "ld"]
    assert generation.result.text == "Hello, world"
    assert generation.result.instances == ("prefill-0#1 (pid 11)", "decode-0#1 (pid 12)")


async def test_requests_run_at_the_same_time(client: AsyncClient) -> None:
    answers = await asyncio.gather(*(client.generate("hello").text() for _ in range(8)))
    assert answers == ["Hello, world"] * 8


async def test_break_cancels_on_the_server(client: AsyncClient, router: ScriptedRouter) -> None:
    async for piece in client.generate("hang"):
        assert piece.text == "first"
        break
    assert await ended(router)


async def test_leaving_the_with_block_cancels_on_the_server(client: AsyncClient, router: ScriptedRouter) -> None:
    async with client.generate("hang") as generation:
        pieces = aiter(generation)
        assert (await anext(pieces)).text == "first"
    assert await ended(router)
    with pytest.raises(Cancelled, match="cancelled by this client"):
        await anext(pieces)


async def test_cancelling_the_task_cancels_on_the_server(client: AsyncClient, router: ScriptedRouter) -> None:
    begun = asyncio.Event()

    async def read() -> None:
        async for _ in client.generate("hang"):
            begun.set()

    task = asyncio.create_task(read())
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await ended(router)


async def test_close_by_another_task_ends_the_iteration(client: AsyncClient, router: ScriptedRouter) -> None:
    generation = client.generate("hang")
    pieces = aiter(generation)
    await anext(pieces)
    asyncio.get_running_loop().call_soon(generation.close)
    with pytest.raises(Cancelled):
        await anext(pieces)
    assert await ended(router)


async def test_deadline(client: AsyncClient, router: ScriptedRouter) -> None:
    with pytest.raises(DeadlinePassed, match="no end within the deadline of 1.5 s"):
        await client.generate("hang", timeout_s=1.5).text()
    assert await ended(router)


async def test_errors_carry_the_servers_line(client: AsyncClient) -> None:
    with pytest.raises(Overloaded) as caught:
        await client.generate("refuse RESOURCE_EXHAUSTED 65 requests wait, the limit is 64").text()
    assert str(caught.value) == "65 requests wait, the limit is 64"
    assert caught.value.retryable
    with pytest.raises(Internal, match="ended the stream before the end"):
        await client.generate("cut").text()
    with pytest.raises(Cancelled, match="ended by Abort"):
        await client.generate("refuse CANCELLED ended by Abort").text()


async def test_an_unreachable_router_is_named() -> None:
    async with AsyncClient("127.0.0.1:1") as client:
        with pytest.raises(Unavailable, match="nothing listens at 127.0.0.1:1"):
            await client.generate("hello").text()


async def test_the_other_calls(client: AsyncClient, router: ScriptedRouter) -> None:
    await client.abort("live")
    assert router.aborted == ["live"]
    with pytest.raises(RequestNotFound):
        await client.abort("gone")
    assert (await client.model_info()).model.name == "m"
    (instance,) = (await client.server_info()).instances
    assert (instance.name, instance.state, instance.since_unix_s) == ("prefill-0", "ready", 5.5)
