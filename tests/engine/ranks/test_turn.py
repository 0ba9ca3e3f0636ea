"""Instances of several ranks that turn into the other role: all ranks at one step, or the instance ends."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.link_client import LinkClient, hand_over
from support.rank_processes import RankProcesses
from support.tiny_models import VOCAB, tiny_config, tiny_weights, write_directory

from biphase.engine.ranks.following import _Steps
from biphase.protos import common_pb2, worker_pb2
from biphase.protos.errors import Internal
from biphase.protos.parallel_plan import ParallelPlan
from biphase.protos.values import Role

BLOCKS = 24
TURNS_WITHIN_S = 30.0
ROLE_TO_PROTO = {"prefill": common_pb2.ROLE_PREFILL, "decode": common_pb2.ROLE_DECODE}


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[list[RankProcesses]]:
    """A prefill instance of two tensor ranks, a decode instance of two stages."""
    model = write_directory(tmp_path / "model", tiny_config(), tiny_weights())
    flags = ["--model", str(model), "--device", "cpu", "--num-kv-blocks", str(BLOCKS), "--max-model-len", "512"]
    flags += ["--max-num-batched-tokens", "32", "--weights-cache", str(tmp_path / "cache")]
    instances = [
        RankProcesses.spawn(tmp_path, "prefill", ParallelPlan(tp=2), flags),
        RankProcesses.spawn(tmp_path, "decode", ParallelPlan(pp=2), flags),
    ]
    try:
        yield instances
    finally:
        for instance in instances:
            instance.stop()


def prompt(tokens: int) -> list[int]:
    return [3 + (position * 31) % (VOCAB - 3) for position in range(tokens)]


async def turned(instance: RankProcesses, role: Role) -> None:
    """Have all its ranks turn, and wait until it serves again."""
    address = instance.ranks[0].address
    async with LinkClient(address, kind="controller", epoch=1) as controller:
        incarnation = controller.incarnation + 1
        await controller.send(flip=worker_pb2.Flip(role=ROLE_TO_PROTO[role], incarnation=incarnation, grace_s=5.0))
        assert f"turns into a {role} instance" in await controller.until_broken()
    async with asyncio.timeout(TURNS_WITHIN_S):
        while True:
            async with LinkClient(address, incarnation=incarnation) as link:
                if link.welcome.name:
                    assert link.welcome.role == ROLE_TO_PROTO[role]
                    break
            await asyncio.sleep(0.01)
        for rank in instance.ranks:  # each says so of itself
            while (found := rank.announcement()) is None or (found.kind, found.incarnation) != (role, incarnation):
                await asyncio.sleep(0.01)


async def outputs(prefill: RankProcesses, decode: RankProcesses) -> list[list[int]]:
    found = []
    async with LinkClient(prefill.ranks[0].address) as first, LinkClient(decode.ranks[0].address) as second:
        for tokens in (1, 33, 100):
            prefilled, decoded = await hand_over(first, second, prompt(tokens))
            assert decoded is not None and decoded.handed_off is not None
            found.append(prefilled.text + decoded.text)
        for link in (first, second):
            stats = await link.stats()
            assert (stats["blocks_free"], stats["legs"], stats.get("tickets", 0)) == (BLOCKS, 0, 0)
    return found


@pytest.mark.slow
async def test_all_ranks_turn_and_turn_back_and_give_the_same_tokens(pair: list[RankProcesses]) -> None:
    for instance in pair:
        await asyncio.to_thread(instance.wait_ready)
    before = await outputs(*pair)
    for roles in (("decode", "prefill"), ("prefill", "decode"), ("decode", "prefill")):
        await asyncio.gather(*(turned(instance, role) for instance, role in zip(pair, roles, strict=True)))  # type: ignore[arg-type]
        prefill, decode = pair if roles[0] == "prefill" else pair[::-1]
        assert await outputs(prefill, decode) == before


class NoThread:
    def begin(self, plan: Any) -> Any:
        raise AssertionError("no step is asked for here")


def test_a_rank_that_is_at_another_step_does_not_turn() -> None:
    steps = _Steps(NoThread(), None, samples=False)  # type: ignore[arg-type]
    steps.check_turn({"number": 0})
    with pytest.raises(Internal, match="told to turn at step 3, the next one here is 0"):
        steps.check_turn({"number": 3})
