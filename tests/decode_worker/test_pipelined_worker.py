"""The real worker and a real model with two steps at a time: the tokens of one at a time, and every block back."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.link_client import ClientLeg, LinkClient, hand_over
from support.pipelined_engine import PipelinedEngine
from support.tiny_models import VOCAB, tiny_config, tiny_weights, write_directory
from support.worker_server import serving

from biphase.decode_worker.serve import decode_phase
from biphase.decode_worker.worker import DecodeWorker
from biphase.engine.config import EngineConfig
from biphase.engine.engine import Engine, Progress
from biphase.engine.engine_thread import EngineThread
from biphase.engine.worker import Worker
from biphase.engine.worker_config import WorkerConfig
from biphase.prefill_worker.serve import prefill_phase
from biphase.protos.values import Role, Sampling

NUM_BLOCKS, BLOCK_SIZE = 24, 4
Load = Callable[[EngineConfig, Progress], Engine]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_directory(tmp_path_factory.mktemp("tiny"), tiny_config(eos_token_id=VOCAB - 1), tiny_weights())


@dataclass
class Instance:
    engine: Engine
    worker: Worker  # type: ignore[type-arg]
    link: LinkClient

    @property
    def pipelined(self) -> PipelinedEngine:
        assert isinstance(self.engine, PipelinedEngine)
        return self.engine

    async def all_back(self) -> None:
        """Nothing is left of any leg."""
        async with asyncio.timeout(10):
            while self.worker.legs or len(self.worker.scheduler):
                await asyncio.sleep(0)
        pool = self.worker.scheduler.pool
        assert (pool.num_free, len(self.worker.scheduler)) == (NUM_BLOCKS, 0)
        pool.check()


@contextlib.asynccontextmanager
async def instance(role: Role, model_dir: Path, load: Load, **settings: int) -> AsyncIterator[Instance]:
    config = WorkerConfig(
        name=f"{role}-0",
        role=role,
        incarnation=3,
        engine=EngineConfig(
            model=str(model_dir),
            device="cpu",
            block_size=BLOCK_SIZE,
            num_kv_blocks=NUM_BLOCKS,
            max_model_len=NUM_BLOCKS * BLOCK_SIZE,
            threads=1,
            weights_cache=str(model_dir / "cache"),
        ),
        max_num_batched_tokens=16,
        local_prefill_tokens=8,
        **settings,
    )
    async with contextlib.AsyncExitStack() as closing:
        thread = EngineThread(config.engine, load)
        closing.push_async_callback(thread.close)
        engine = await thread.load(lambda detail, done: None)
        if isinstance(engine, PipelinedEngine):
            closing.callback(engine.close)
        limits = engine.limits
        phase = prefill_phase if role == "prefill" else decode_phase
        worker, _ = await closing.enter_async_context(phase(config, engine, limits, thread))
        address, _ = await closing.enter_async_context(serving(worker, role))
        link = await closing.enter_async_context(LinkClient(address))
        yield Instance(engine, worker, link)


def prompt(seed: int) -> list[int]:
    return [(seed * 7919 + position * 31 + position**2) % (VOCAB - 1) for position in range(1 + seed * 5 % 23)]


def sampling(seed: int) -> Sampling:
    """A third each: greedy, drawn by seed, and drawn with stop ids that most outputs meet."""
    stops = tuple(range(0, VOCAB - 1, 12)) if seed % 3 == 2 else ()
    return Sampling(
        temperature=0.0 if seed % 3 == 0 else 1.5,
        seed=seed,
        max_tokens=6 + seed % 40,
        min_tokens=2 if seed % 2 else 0,
        stop_token_ids=stops,
    )


async def outputs(decode: Instance, num: int, cancelled_after: dict[int, int]) -> list[list[int]]:
    """What that many requests at once give; ``cancelled_after``: request to number of tokens."""

    async def one(seed: int) -> list[int]:
        leg = await opened(decode.link, prompt(seed), sampling(seed))
        if seed in cancelled_after:
            await leg.until(lambda leg: len(leg.tokens) >= cancelled_after[seed] or leg.ended)
            await leg.cancel()
        await leg.end()
        return leg.text

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(one(seed)) for seed in range(num)]
    return [task.result() for task in tasks]


async def opened(link: LinkClient, token_ids: list[int], settings: Sampling) -> ClientLeg:
    """A leg that is not refused: offered again while the queue is full."""
    while True:
        leg = await link.open_decode(token_ids, settings)
        await leg.until(lambda leg: leg.tokens or leg.ended or leg.refused)
        if leg.refused is None:
            return leg


async def test_two_steps_at_a_time_give_the_tokens_of_one_and_every_block_is_back(model_dir: Path) -> None:
    num = 24
    async with instance("decode", model_dir, Engine.load, max_num_seqs=num) as plain:
        expected = await outputs(plain, num, {})
        assert (await plain.link.stats())["superfluous_tokens"] == 0
        await plain.all_back()
    assert len({len(output) for output in expected}) > 8, "the outputs should end here and there"
    async with instance("decode", model_dir, PipelinedEngine.load, max_num_seqs=num) as ahead:
        assert await outputs(ahead, num, {}) == expected
        await ahead.all_back()
        stats = await ahead.link.stats()
        # the pool of 24 blocks holds a few requests: those that wait take the blocks of each that ends
        assert stats["superfluous_tokens"] > 0 and stats["preemptions"] > 0 and stats["failed_steps"] == 0
        assert ahead.pipelined.num_ahead > stats["steps"] // 3
        cancelled = {seed: 1 + seed % 4 for seed in range(0, num, 2)}
        for _ in range(3):
            for seed, output in enumerate(await outputs(ahead, num, cancelled)):
                assert output == (expected[seed][: len(output)] if seed in cancelled else expected[seed])
            await ahead.all_back()


async def test_a_prompt_handed_over_between_pipelined_instances_goes_on_as_if_computed_in_one(model_dir: Path) -> None:
    async with (
        instance("prefill", model_dir, PipelinedEngine.load) as prefill,
        instance("decode", model_dir, PipelinedEngine.load) as decode,
    ):
        long = [prompt(seed) * 3 for seed in (2, 4, 9)]
        expected = [await opened(decode.link, token_ids, sampling(1)) for token_ids in long]
        assert [await leg.end() for leg in expected] == ["done"] * len(long)

        async def one(token_ids: list[int]) -> list[int]:
            first, second = await hand_over(prefill.link, decode.link, token_ids, sampling(1))
            assert second is not None
            return first.text + second.text

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(token_ids)) for token_ids in long]
        assert [task.result() for task in tasks] == [leg.text for leg in expected]
        assert prefill.pipelined.num_ahead > 0
        await prefill.all_back()
        await decode.all_back()


async def test_an_engine_error_costs_its_step_and_what_ran_ahead_on_it(model_dir: Path) -> None:
    async with instance("decode", model_dir, PipelinedEngine.load) as decode:
        ahead, settings = decode.pipelined, Sampling(max_tokens=20, ignore_eos=True)
        whole = await opened(decode.link, prompt(4), settings)
        await whole.end()
        ahead.hold()
        ahead.error = RuntimeError("no such kernel")
        struck = await decode.link.open_decode(prompt(3), settings)
        while len(decode.worker.legs) < 1:
            await asyncio.sleep(0)
        spared = await decode.link.open_decode(prompt(4), settings)
        while len(decode.worker.legs) < 2:
            await asyncio.sleep(0)
        ahead.let_go()
        assert await struck.end() == "failed" and struck.detail == "the engine failed: no such kernel"
        assert await spared.end() == "done" and spared.text == whole.text
        await decode.all_back()
        assert (await decode.link.stats())["failed_steps"] == 1


async def test_a_new_request_is_scheduled_while_a_step_runs_that_has_no_successor(model_dir: Path) -> None:
    async with instance("decode", model_dir, PipelinedEngine.load) as decode:
        decode.pipelined.hold()
        first = await decode.link.open_decode(prompt(4), Sampling(max_tokens=1))
        while len(decode.worker.legs) < 1:
            await asyncio.sleep(0)
        second = await decode.link.open_decode(prompt(3), Sampling(max_tokens=1))
        async with asyncio.timeout(10):
            while decode.pipelined.num_ahead < 1:
                await asyncio.sleep(0)
        decode.pipelined.let_go()
        assert (await first.end(), await second.end()) == ("done", "done")
        await decode.all_back()


async def test_a_stop_books_the_steps_in_flight(model_dir: Path) -> None:
    async with instance("decode", model_dir, PipelinedEngine.load) as decode:
        assert isinstance(decode.worker, DecodeWorker)
        leg = await opened(decode.link, prompt(4), Sampling(max_tokens=60, ignore_eos=True))
        decode.pipelined.hold()
        decode.worker.stop()
        decode.pipelined.let_go()
        assert await leg.end() == "drained" and leg.detail == "the instance stops"
        await decode.all_back()
