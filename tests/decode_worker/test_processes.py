"""Two real worker processes, SmolLM2 in both, driven over real links: handoffs, cancels, broken links, bad input."""

import asyncio
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass

import pytest
import pytest_asyncio
from support.deployment import Deployment, Running
from support.link_client import GREEDY, ClientLeg, LinkClient, hand_over

from biphase.protos import worker_pb2
from biphase.protos.values import Sampling

pytestmark = [pytest.mark.model, pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]

BLOCKS = 16
FLAGS = ["--model", "smollm2", "--threads", "1", "--num-kv-blocks", str(BLOCKS), "--max-model-len", "512"]
BACK_WITHIN_S = 10.0
CLEAN = {"legs": 0, "sequences": 0, "queued": 0, "running": 0, "blocks_used": 0, "queued_tokens": 0}


@dataclass
class Pair:
    prefill: Running
    decode: Running


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    deployment = Deployment(tmp_path_factory.mktemp("workers"))
    try:
        for role, more in (("prefill", ["--max-num-batched-tokens", "64"]), ("decode", ["--max-num-seqs", "16"])):
            command = [sys.executable, "-m", f"biphase.{role}_worker", *FLAGS, *more]
            getattr(deployment, role).append(deployment.spawn(f"{role}-0", command))
        (prefill,), (decode,) = deployment.prefill, deployment.decode
        prefill.wait_ready()
        decode.wait_ready()
        yield Pair(prefill, decode)
    finally:
        deployment.stop()


@dataclass
class Links:
    prefill: LinkClient
    decode: LinkClient

    async def clean(self) -> None:
        """Everything of every leg is back. How soon, e2e/test_leaks.py tells: here one answer may take a second."""
        for link in (self.prefill, self.decode):
            async with asyncio.timeout(BACK_WITHIN_S):
                while True:
                    stats = await link.stats()
                    left = {name: stats[name] for name in CLEAN if stats[name] != CLEAN[name]}
                    left |= {
                        name: stats[name] for name in ("tickets", "open_pulls", "running_sends") if stats.get(name)
                    }
                    if not left:
                        break
                    await asyncio.sleep(0.01)


@pytest_asyncio.fixture(loop_scope="module")
async def links(pair: Pair) -> AsyncIterator[Links]:
    async with LinkClient(pair.prefill.address) as prefill, LinkClient(pair.decode.address) as decode:
        links = Links(prefill, decode)
        yield links
        await links.clean()


def prompt(tokens: int, seed: int = 0) -> list[int]:
    return [1000 + (seed * 7919 + position * 104729) % 40000 for position in range(tokens)]


async def local(links: Links, token_ids: list[int], sampling: Sampling = GREEDY) -> list[int]:
    leg = await links.decode.open_decode(token_ids, sampling)
    assert await leg.end() == "done"
    return leg.text


@pytest.mark.parametrize("tokens", [1, 31, 32, 33, 64, 200])
async def test_a_handoff_gives_the_tokens_of_a_local_prefill(links: Links, tokens: int) -> None:
    first, second = await hand_over(links.prefill, links.decode, prompt(tokens))
    assert second is not None and second.ended is not None and second.handed_off is not None
    assert sorted(first.tokens) == [0] and sorted(second.tokens) == list(range(1, 8))
    assert first.text + second.text == await local(links, prompt(tokens))
    assert second.handed_off.first_token == first.tokens[0]
    assert second.handed_off.bytes == tokens * 30 * 2 * 3 * 64 * 4
    assert second.ended.stats.transfer_bytes == second.handed_off.bytes
    assert second.finishes[-1] == 2 and not any(second.finishes[:-1])


async def test_forced_tokens_go_on_where_the_output_stood(links: Links) -> None:
    whole = await local(links, prompt(40))
    first, second = await hand_over(links.prefill, links.decode, [*prompt(40), *whole[:3]], forced=3)
    assert second is not None
    assert sorted(first.tokens | second.tokens) == [3, 4, 5, 6, 7]
    assert first.text + second.text == whole[3:]


async def test_a_seeded_draw_is_the_same_on_both_ways(links: Links) -> None:
    sampling = Sampling(temperature=0.9, top_p=0.95, seed=123, max_tokens=12, ignore_eos=True)
    first, second = await hand_over(links.prefill, links.decode, prompt(50), sampling)
    assert second is not None
    assert first.text + second.text == await local(links, prompt(50), sampling)


async def test_one_token_needs_no_ticket(links: Links) -> None:
    first, second = await hand_over(links.prefill, links.decode, prompt(20), Sampling(max_tokens=1))
    assert second is None and first.ended is not None and first.ended.outcome == worker_pb2.LEG_DONE
    assert first.finishes == [2]


async def test_a_first_token_that_ends_the_request_revokes_the_ticket(links: Links) -> None:
    (token, *_) = await local(links, prompt(20))
    sampling = Sampling(max_tokens=8, stop_token_ids=(token,))
    first = await links.prefill.open_prefill(prompt(20), sampling)
    await first.until(lambda leg: leg.started)
    assert first.started is not None and first.started.HasField("ticket")
    assert await first.end() == "done" and first.finishes == [1]
    second = await links.decode.open_decode(prompt(20), sampling, ticket=first.started.ticket)
    assert await second.end() == "handoff_failed" and "REVOKED" in second.detail


async def test_many_at_once_under_block_pressure_give_the_tokens_of_one_at_a_time(links: Links) -> None:
    # 8 prompts of two blocks each in a pool of 16: each wants a third block after 3 to 5 tokens
    sampling = Sampling(max_tokens=10, ignore_eos=True)
    alone = [await local(links, prompt(60 + n % 3, n), sampling) for n in range(8)]
    before = await links.decode.stats()

    async def one(n: int) -> list[int]:
        if n % 2:
            return await local(links, prompt(60 + n % 3, n), sampling)
        first, second = await hand_over(links.prefill, links.decode, prompt(60 + n % 3, n), sampling)
        assert second is not None
        return first.text + second.text

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(one(n)) for n in range(8)]
    assert [task.result() for task in tasks] == alone
    after = await links.decode.stats()
    assert after["preemptions"] > before["preemptions"]


async def open_pair(links: Links, tokens: int, sampling: Sampling) -> tuple[ClientLeg, ClientLeg]:
    first = await links.prefill.open_prefill(prompt(tokens), sampling)
    await first.until(lambda leg: leg.started)
    assert first.started is not None
    second = await links.decode.open_decode(prompt(tokens), sampling, ticket=first.started.ticket)
    return first, second


LONG = Sampling(max_tokens=60, ignore_eos=True)


async def test_a_cancel_in_prefill_ends_both_legs(links: Links) -> None:
    first, second = await open_pair(links, 300, LONG)
    await first.cancel()
    await first.cancel()
    assert await first.end() == "cancelled"
    assert await second.end() == "handoff_failed"


async def test_a_cancel_mid_pull_ends_both_legs(links: Links) -> None:
    first, second = await open_pair(links, 300, LONG)
    await second.cancel()
    assert await second.end() == "cancelled"
    assert first.ended is None
    await first.cancel()
    assert await first.end() == "cancelled"


async def test_a_ticket_may_be_pulled_again_after_a_cancelled_pull(links: Links) -> None:
    sampling = Sampling(max_tokens=8, ignore_eos=True)
    first, second = await open_pair(links, 300, sampling)
    await second.cancel()
    assert await second.end() == "cancelled"
    assert first.started is not None
    again = await links.decode.open_decode(prompt(300), sampling, ticket=first.started.ticket, epoch=2)
    assert await again.end() == "done" and await first.end() == "done"
    assert first.text + again.text == await local(links, prompt(300), sampling)


async def test_a_cancel_in_decode_ends_within_a_step(links: Links) -> None:
    first, second = await open_pair(links, 40, LONG)
    await second.until(lambda leg: len(leg.tokens) >= 3)
    await second.cancel()
    assert await second.end() == "cancelled" and await first.end() == "done"
    assert len(second.tokens) < 20


async def test_a_lost_prefill_instance_does_not_end_what_is_handed_off(links: Links) -> None:
    first, second = await open_pair(links, 40, GREEDY)
    await second.until(lambda leg: leg.handed_off)
    await second.cancel(unless_handed_off=True)
    assert await second.end() == "done" and await first.end() == "done"
    local_leg = await links.decode.open_decode(prompt(40))
    await local_leg.cancel(unless_handed_off=True)
    assert await local_leg.end() == "done"


async def test_an_unreachable_source_is_named(links: Links) -> None:
    ticket = worker_pb2.KvTicket(
        id=b"x" * 16, kv_address="127.0.0.1:1", instance="prefill-9", incarnation=1, num_tokens=40
    )
    leg = await links.decode.open_decode(prompt(40), ticket=ticket)
    assert await leg.end() == "handoff_failed"
    assert "prefill-9" in leg.detail and "127.0.0.1:1" in leg.detail


async def test_a_broken_link_ends_its_legs_and_no_others(pair: Pair, links: Links) -> None:
    mine = await links.decode.open_decode(prompt(40), LONG)
    async with LinkClient(pair.prefill.address) as prefill, LinkClient(pair.decode.address) as decode:
        other = Links(prefill, decode)
        _first, second = await open_pair(other, 40, LONG)
        await second.until(lambda leg: leg.tokens)
        parked = await prefill.open_prefill(prompt(60), LONG)  # computed, never pulled
        await parked.until(lambda leg: leg.tokens)
        assert (await links.prefill.stats())["tickets"] == 1
    assert await mine.end() == "done" and len(mine.tokens) == 60


async def test_load_is_announced(links: Links) -> None:
    leg = await links.prefill.open_prefill(prompt(100), LONG)
    await leg.until(lambda leg: leg.tokens)
    assert links.prefill.load.free_blocks == BLOCKS - 4
    await leg.cancel()
    await leg.end()
    await local(links, prompt(3))
    assert (links.prefill.load.free_blocks, links.prefill.load.room_blocks) == (BLOCKS, BLOCKS)


async def test_what_makes_no_sense_is_refused_and_the_link_lives(links: Links) -> None:
    async def refusal(leg: ClientLeg) -> str:
        await leg.until(lambda leg: leg.refused)
        return leg.detail

    prefill, decode = links.prefill, links.decode
    assert "vocabulary of 49152" in await refusal(await prefill.open_prefill([49152]))
    assert "0 tokens" in await refusal(await prefill.open_prefill([]))
    assert "context holds 512" in await refusal(await prefill.open_prefill(prompt(506)))
    assert "temperature is nan" in await refusal(await decode.open_decode([1], Sampling(temperature=float("nan"))))
    wrong = worker_pb2.KvTicket(id=b"x" * 16, num_tokens=9)
    assert "ticket is for 9 tokens" in await refusal(await decode.open_decode([1], ticket=wrong))
    assert "pull_epoch is 0" in await refusal(await decode.open_decode([1], ticket=wrong, epoch=0))
    assert "opens no decode legs" in await refusal(await prefill.open_decode([1]))
    twice = await decode.open_decode(prompt(40), LONG)
    await decode.send(open_decode=worker_pb2.OpenDecode(leg_id=twice.leg_id, token_ids=b"\1\0\0\0"))
    assert "open already" in await refusal(twice)
    twice.refused = None
    odd = decode.new_leg()
    await decode.send(open_decode=worker_pb2.OpenDecode(leg_id=odd.leg_id, token_ids=b"\1\0\0"))
    await decode.send(cancel=worker_pb2.CancelLeg(leg_id=987654321))
    assert "multiple of 4" in await refusal(odd)
    await twice.cancel()
    assert await twice.end() == "cancelled"


async def test_messages_for_another_life_end_the_link(pair: Pair, links: Links) -> None:
    async with LinkClient(pair.decode.address, incarnation=7) as link:
        text = await link.until_broken()
        assert link.code is not None and link.code.name == "FAILED_PRECONDITION"
        assert f"incarnation {links.decode.incarnation}" in text and "incarnation 7" in text
    async with LinkClient(pair.decode.address) as link:
        await link.open_decode(prompt(40), LONG)
        await link.send(incarnation=7, cancel=worker_pb2.CancelLeg(leg_id=1))
        assert "meant for incarnation 7" in await link.until_broken()


async def test_a_controller_of_an_older_epoch_is_turned_away(pair: Pair, links: Links) -> None:
    async with LinkClient(pair.decode.address, kind="controller", epoch=5) as link:
        assert link.welcome.name == "decode-0"
    async with LinkClient(pair.decode.address, kind="controller", epoch=4) as link:
        assert "epoch 4 has given way to epoch 5" in await link.until_broken()


async def test_bytes_that_are_no_message_end_only_that_link(pair: Pair, links: Links) -> None:
    import grpc
    import grpc.aio

    async with grpc.aio.insecure_channel(pair.decode.address) as channel:
        call = channel.stream_stream("/biphase.v1.Worker/Link")()
        await call.write(b"\xff\xff\xff")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            while await call.read() is not grpc.aio.EOF:
                pass
            raise grpc.aio.AioRpcError(await call.code(), call.trailing_metadata(), call.initial_metadata())
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert await local(links, prompt(5))


async def test_health_and_reflection_answer(pair: Pair) -> None:
    import grpc.aio
    from grpc_health.v1 import health_pb2, health_pb2_grpc
    from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

    async with grpc.aio.insecure_channel(pair.prefill.address) as channel:
        health = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5)
        assert health.status == health_pb2.HealthCheckResponse.SERVING
        asked = [reflection_pb2.ServerReflectionRequest(list_services="")]
        async for reply in reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter(asked)):
            names = [service.name for service in reply.list_services_response.service]
        assert "biphase.v1.Worker" in names and "grpc.health.v1.Health" in names
