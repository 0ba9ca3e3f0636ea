"""Instances as real processes that turn into the other role and back: their tokens, their books, and what is refused."""

import asyncio
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio
from support.deployment import Deployment, Running
from support.link_client import LinkClient, hand_over
from support.tiny_models import VOCAB, tiny_config, tiny_weights, write_directory

from biphase.protos import common_pb2, worker_pb2
from biphase.protos.values import Role, Sampling

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]

BLOCKS = 24
LONG = Sampling(max_tokens=400, ignore_eos=True)
TURNS_WITHIN_S = 20.0
BOOKS = ("legs", "sequences", "queued", "running", "blocks_used", "queued_tokens")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_directory(tmp_path_factory.mktemp("model"), tiny_config(), tiny_weights())


def flags(model: Path) -> list[str]:
    sizes = ["--num-kv-blocks", str(BLOCKS), "--max-model-len", "512", "--max-num-batched-tokens", "32"]
    return ["--model", str(model), "--device", "cpu", "--threads", "1", "--weights-cache", str(model / "cache"), *sizes]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Iterator[list[Running]]:
    """A prefill and a decode instance; tests may leave either in either role."""
    deployment = Deployment(tmp_path_factory.mktemp("flip"))
    try:
        for role in ("prefill", "decode"):
            command = [sys.executable, "-m", f"biphase.{role}_worker", *flags(model), "--incarnation", "10"]
            deployment.decode.append(deployment.spawn(role, command, instance=f"{role}-0"))
        for running in deployment.decode:
            running.wait_ready()
        yield deployment.decode
    finally:
        deployment.stop()


@pytest_asyncio.fixture(loop_scope="module")
async def controllers(pair: list[Running]) -> AsyncIterator[None]:
    """Afterwards each is again what it was."""
    yield
    for running, role in zip(pair, ROLES, strict=True):
        if running.announcement().kind != role:  # type: ignore[union-attr]
            await turned(running, role)


ROLES: tuple[Role, Role] = ("prefill", "decode")
TO_PROTO = {"prefill": common_pb2.ROLE_PREFILL, "decode": common_pb2.ROLE_DECODE}


def prompt(tokens: int, seed: int = 0) -> list[int]:
    return [3 + (seed * 7919 + position * 31) % (VOCAB - 3) for position in range(tokens)]


async def welcomed(running: Running, incarnation: int) -> None:
    """Wait until the instance welcomes links to that life."""
    async with asyncio.timeout(TURNS_WITHIN_S):
        while True:
            async with LinkClient(running.address, incarnation=incarnation, name="waiting") as link:
                if link.welcome.name:
                    return
            await asyncio.sleep(0.01)


async def turned(running: Running, role: Role, *, grace_s: float = 5.0) -> int:
    """Have it turn into ``role``; returns its new incarnation."""
    async with LinkClient(running.address, kind="controller", epoch=1) as controller:
        incarnation = controller.incarnation + 1
        await controller.send(flip=worker_pb2.Flip(role=TO_PROTO[role], incarnation=incarnation, grace_s=grace_s))
        assert f"turns into a {role} instance" in await controller.until_broken()
        assert controller.code is not None and controller.code.name == "UNAVAILABLE"
    await welcomed(running, incarnation)
    found = running.announcement()
    assert found is not None and (found.kind, found.incarnation, found.state) == (role, incarnation, "ready")
    return incarnation


async def clean(link: LinkClient) -> None:
    async with asyncio.timeout(5.0):
        while True:
            stats = await link.stats()
            if not any(stats.get(name) for name in (*BOOKS, "tickets", "open_pulls", "running_sends")):
                return


async def test_both_turn_and_turn_back_and_give_the_same_tokens(pair: list[Running], controllers: None) -> None:
    prompts = [prompt(tokens, tokens) for tokens in (1, 32, 33, 100)]

    async def disaggregated(prefill: Running, decode: Running) -> list[list[int]]:
        found = []
        async with LinkClient(prefill.address) as first, LinkClient(decode.address) as second:
            for token_ids in prompts:
                prefilled, decoded = await hand_over(first, second, token_ids)
                assert decoded is not None and decoded.handed_off is not None
                found.append(prefilled.text + decoded.text)
            await clean(first)
            await clean(second)
        return found

    before = await disaggregated(*pair)
    for _ in range(2):
        await turned(pair[0], "decode")
        async with LinkClient(pair[0].address) as link:  # the old prefill instance, alone
            alone = [await link.open_decode(token_ids) for token_ids in prompts]
            assert [await leg.end() for leg in alone] == ["done"] * len(prompts)
            assert [leg.text for leg in alone] == before
        await turned(pair[1], "prefill")
        assert await disaggregated(pair[1], pair[0]) == before
        await turned(pair[1], "decode")
        await turned(pair[0], "prefill")
        assert await disaggregated(*pair) == before
