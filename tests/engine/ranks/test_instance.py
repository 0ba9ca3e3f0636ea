"""Real ranks of a real small model: in this process for what they compute, as processes for how they end."""

import asyncio
import contextlib
import json
import signal
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from support.deployment import Deployment, Running
from support.link_client import LinkClient
from support.tiny_models import tiny_config

from biphase.decode_worker.serve import serve
from biphase.engine.config import EngineConfig
from biphase.engine.ranks.leading import check_alike
from biphase.engine.worker_config import WorkerConfig
from biphase.protos.errors import SetupError
from biphase.protos.parallel_plan import ParallelPlan
from biphase.protos.process import Announcement, Announcer
from biphase.protos.values import Sampling

KEY = "00112233445566778899aabbccddeeff"
PROMPTS = [[(7 * seed + 3 * position) % 250 + 3 for position in range(3 + 11 * seed % 40)] for seed in range(7)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny.json"
    # of a random model the logits are near zero: a sampled token, not a greedy one, tells one model from another
    path.write_text(json.dumps(tiny_config(num_hidden_layers=3)))
    return path


def config_of(model: Path, plan: ParallelPlan, rank: int) -> WorkerConfig:
    return WorkerConfig(
        name="decode-0",
        role="decode",
        incarnation=3,
        engine=EngineConfig(
            model=str(model), load_format="dummy", device="cpu", threads=1, num_kv_blocks=30 + rank, max_model_len=256
        ),
        local_prefill_tokens=8,
        max_num_batched_tokens=32,
        plan=plan,
        rank=rank,
        rank_key=KEY,
        join_timeout_s=20.0,
    )


@dataclass
class Rank:
    """One rank served in this process."""

    announcements: list[Announcement]
    stop: asyncio.Event
    task: "asyncio.Task[None]"
    changed: asyncio.Condition

    async def until(self, state: str) -> Announcement:
        async with asyncio.timeout(60), self.changed:
            await self.changed.wait_for(lambda: self.task.done() or self.announcements[-1].state == state)
        if self.task.done():
            self.task.result()
        return self.announcements[-1]


def start(configs: list[WorkerConfig]) -> list[Rank]:
    """All ranks, the first one's address told to the others as a backend tells it."""
    loop = asyncio.get_running_loop()
    address: asyncio.Future[str] = loop.create_future()
    ranks = []
    for config in configs:
        seen: list[Announcement] = []
        changed = asyncio.Condition()

        async def wake(changed: asyncio.Condition = changed) -> None:
            async with changed:
                changed.notify_all()

        def publish(announcement: Announcement, seen: list[Announcement] = seen, wake: object = wake) -> None:
            seen.append(announcement)
            if announcement.rank_address and not address.done():
                address.set_result(announcement.rank_address)
            asyncio.run_coroutine_threadsafe(wake(), loop)  # type: ignore[operator]

        async def find() -> str:
            return await asyncio.shield(address)

        first = Announcement(name=config.name, kind="decode", incarnation=3, pid=1, rank=config.rank)
        stop = asyncio.Event()
        task = asyncio.create_task(serve(config, Announcer(first, publish), stop, find))
        task.add_done_callback(lambda _, wake=wake: asyncio.ensure_future(wake()))  # type: ignore[misc]
        ranks.append(Rank(seen, stop, task, changed))
    return ranks


@contextlib.asynccontextmanager
async def serving(configs: list[WorkerConfig]) -> AsyncIterator[list[Rank]]:
    ranks = start(configs)
    try:
        for rank in ranks:
            await rank.until("ready")
        yield ranks
    finally:
        ranks[-1].stop.set()  # any of them may be asked
        async with asyncio.timeout(30):
            await asyncio.gather(*(rank.task for rank in ranks))
        assert [rank.announcements[-1].state for rank in ranks] == ["stopped"] * len(ranks)


async def outputs(address: str) -> list[list[int]]:
    async with LinkClient(address) as link:
        legs = [
            await link.open_decode(prompt, Sampling(temperature=1.0, seed=seed, max_tokens=12, ignore_eos=True))
            for seed, prompt in enumerate(PROMPTS)
        ]
        assert [await leg.end() for leg in legs] == ["done"] * len(legs)
        return [leg.text for leg in legs]


async def test_several_ranks_say_what_one_says_and_stop_as_one(model: Path) -> None:
    async with serving([config_of(model, ParallelPlan(), 0)]) as (alone,):
        expected = await outputs(alone.announcements[-1].address)
    assert len({tuple(text) for text in expected}) == len(PROMPTS)
    for plan in (ParallelPlan(tp=2), ParallelPlan(pp=2), ParallelPlan(tp=2, pp=3)):
        async with serving([config_of(model, plan, rank) for rank in range(plan.num_ranks)]) as ranks:
            leader = ranks[0].announcements[-1]
            assert await outputs(leader.address) == expected
            assert leader.threads == plan.num_ranks
            words = [announcement.detail for announcement in ranks[0].announcements]
            assert f"1 of {plan.num_ranks} ranks are there" in words
    assert not [thread.name for thread in threading.enumerate() if thread.name in ("engine", "rank beats")]


async def test_told_to_stop_before_all_have_joined(model: Path) -> None:
    ranks = start([config_of(model, ParallelPlan(tp=3), rank) for rank in (0, 1)])
    async with asyncio.timeout(30):
        while not any("waiting for" in announcement.detail for announcement in ranks[1].announcements):
            await asyncio.sleep(0.01)
        ranks[0].stop.set()
        await asyncio.gather(*(rank.task for rank in ranks))
    assert [rank.announcements[-1].state for rank in ranks] == ["stopped", "stopped"]


def facts(**changes: Any) -> dict[str, Any]:
    return {"model_hash": b"\1\2", "block_size": 32, "dtype": "float32", "kv_dtype": "float32"} | changes


def test_ranks_of_two_models_are_no_instance() -> None:
    check_alike(facts(), {1: facts(), 2: facts()})
    with pytest.raises(SetupError, match="rank 2 has model_hash 0103, rank 0 has 0102"):
        check_alike(facts(), {1: facts(), 2: facts(model_hash=b"\1\3")})
    with pytest.raises(SetupError, match="rank 1 has block_size 16, rank 0 has 32"):
        check_alike(facts(), {1: facts(block_size=16)})


def hanging(method: str) -> str:
    """A decode worker of which one class's method never returns, ``module:Class.method``."""
    module, _, path = method.partition(":")
    owner, _, name = path.partition(".")
    return (
        f"import threading; from {module} import {owner}; from biphase.decode_worker.__main__ import main; "
        f"setattr({owner}, {name!r}, lambda *a, **k: threading.Event().wait()); main()"
    )


class Processes(Deployment):
    """The ranks of one decode instance, as processes."""

    def start(
        self,
        model: Path,
        *,
        tp: int,
        pp: int,
        last_rank: Sequence[str] = (),
        every: Sequence[str] = (),
        broken: str = "",
    ) -> list[Running]:
        """``broken``: the program of the last rank."""
        command = ["--model", str(model), "--load-format", "dummy", *every]
        command += ["--threads", "1", "--num-kv-blocks", "30", "--max-model-len", "512", "--join-timeout-s", "60"]
        command += ["--tp", str(tp), "--pp", str(pp), "--rank-key", KEY, "--leader", str(self.directory / "rank0.json")]
        for rank in range(tp * pp):
            last = rank == tp * pp - 1
            program = ["-c", broken] if broken and last else ["-m", "biphase.decode_worker"]
            own = [sys.executable, *program, *command, "--rank", str(rank), *(last_rank if last else ())]
            self.decode.append(self.spawn(f"rank{rank}", own, instance="decode-0"))
        return self.decode


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    processes = Processes(tmp_path)
    yield processes
    processes.stop()


def codes(ranks: list[Running], within_s: float) -> list[int]:
    until_s = time.monotonic() + within_s
    return [rank.process.wait(max(0.0, until_s - time.monotonic())) for rank in ranks]


async def test_a_stopped_rank_ends_all_others_in_the_middle_of_steps(processes: Processes, model: Path) -> None:
    ranks = processes.start(model, tp=2, pp=2)
    await asyncio.to_thread(ranks[0].wait_ready)
    async with LinkClient(ranks[0].address) as link:
        leg = await link.open_decode(PROMPTS[6], Sampling(max_tokens=400, ignore_eos=True))
        await leg.until(lambda leg: len(leg.tokens) > 5)
        ranks[2].signal(signal.SIGSTOP)
        others = [ranks[0], ranks[1], ranks[3]]
        assert await asyncio.to_thread(codes, others, 3.0) == [1, 1, 1]
    assert ranks[2].process.poll() is None  # whoever started it kills it
    found = ranks[0].announcement()
    assert found is not None and (found.state, found.detail) == ("lost", "rank 2 has been silent for 1.5 s")


async def test_a_killed_rank_ends_an_idle_instance_at_once(processes: Processes, model: Path) -> None:
    ranks = processes.start(model, tp=1, pp=2)
    await asyncio.to_thread(ranks[0].wait_ready)
    ranks[1].signal(signal.SIGKILL)
    assert await asyncio.to_thread(codes, [ranks[0]], 1.0) == [1]
    found = ranks[0].announcement()
    assert found is not None and found.state == "lost" and found.detail.startswith("rank 1 ")


async def test_what_one_rank_cannot_load_is_told_by_rank_0(processes: Processes, model: Path) -> None:
    ranks = processes.start(model, tp=2, pp=1, last_rank=["--num-kv-blocks", "1"])
    assert await asyncio.to_thread(codes, ranks, 60.0) == [2, 2]
    told = "the KV pool holds 1 blocks of"
    assert (processes.directory / "rank0.out").read_text().startswith(f"biphase: rank 1: {told}")
    assert (processes.directory / "rank1.out").read_text().startswith(f"biphase: {told}")
    found = ranks[0].announcement()
    assert found is not None and found.state == "failed" and told in found.detail


@pytest.mark.parametrize(
    "hang", ["biphase.engine.cpu_engine:CpuEngine.load", "biphase.engine.ranks.following:FollowerChannel.send"]
)
async def test_a_rank_that_beats_but_never_has_loaded_is_named(processes: Processes, model: Path, hang: str) -> None:
    ranks = processes.start(model, tp=1, pp=2, every=["--load-timeout-s", "2"], broken=hanging(hang))
    assert await asyncio.to_thread(codes, ranks, 60.0) == [2, 1]
    found = ranks[0].announcement()
    line = "not all of 2 ranks have loaded within 2 s: missing is rank 1"
    assert found is not None and (found.state, found.detail) == ("failed", line)
    assert (processes.directory / "rank0.out").read_text() == f"biphase: {line}\n"


async def test_what_one_rank_cannot_serve_with_is_told_by_rank_0(processes: Processes, model: Path) -> None:
    broken = """
import biphase.decode_worker.serve as serve
from biphase.decode_worker.__main__ import main
from biphase.protos.errors import SetupError
def phase(*arguments):
    raise SetupError("no port is free")
serve.follower_phase = phase
main()
"""
    ranks = processes.start(model, tp=1, pp=2, broken=broken)
    assert await asyncio.to_thread(codes, ranks, 60.0) == [2, 2]
    assert (processes.directory / "rank0.out").read_text() == "biphase: rank 1: no port is free\n"
