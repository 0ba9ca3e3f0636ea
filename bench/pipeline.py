"""What several steps in flight are worth on a pipeline of stages: prompts of 512 through the same ranks, with and without.

    python bench/pipeline.py [--stages 2] [--prompts 8] [--rounds 5] [--model CONFIG] [--json FILE] [--check]

Rank 0 is this process, the other stages are processes of their own, each with one thread; activations go over gloo. All
arms run on the same instance, in turns: steps in flight as many as the engine takes, one step at a time, and all prompts
in one step. The goal is against the faster one of the latter two. The first round warms up and is not counted.
"""

import argparse
import asyncio
import json
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import report

from biphase.engine.block_pool import BlockPool
from biphase.engine.config import EngineConfig
from biphase.engine.engine import Engine
from biphase.engine.engine_thread import EngineThread
from biphase.engine.ranks.leading import leading
from biphase.engine.step import StepPlan, StepResult
from biphase.engine.worker_config import WorkerConfig
from biphase.prefill_worker.scheduler import PrefillRequest, PrefillScheduler
from biphase.protos.errors import SetupError, one_line
from biphase.protos.ids import SeqId
from biphase.protos.parallel_plan import ParallelPlan
from biphase.protos.process import Announcement, Announcer, announce_to_file
from biphase.protos.values import Sampling

PROMPT = 512
MODEL = {
    "model_type": "llama",
    "vocab_size": 4096,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
    "eos_token_id": 2,
    "bos_token_id": 1,
    "hidden_act": "silu",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """``tokens`` of a step; at most ``in_flight`` of them, None: as many as the engine takes."""

    name: str
    tokens: int
    in_flight: int | None


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5, help="counted ones, at least 5")
    parser.add_argument("--model", metavar="CONFIG", help="a config.json; its weights are random")
    report.add_arguments(parser)
    arguments = parser.parse_args()
    for name, least in (("stages", 2), ("prompts", 1), ("rounds", 5)):
        if getattr(arguments, name) < least:
            parser.error(f"--{name} is {getattr(arguments, name)}, must be at least {least}")
    return arguments


@asynccontextmanager
async def instance(folder: Path, model: Path, stages: int, prompts: int) -> AsyncIterator[tuple[Engine, EngineThread]]:
    """An instance of ``stages`` ranks, rank 0 in this process."""
    key, announced = secrets.token_hex(16), folder / "rank0.json"
    config = WorkerConfig(
        name="pipeline",
        role="prefill",
        incarnation=1,
        engine=EngineConfig(
            model=str(model),
            load_format="dummy",
            device="cpu",
            threads=1,
            max_model_len=PROMPT + 8,
            num_kv_blocks=2 * prompts * PROMPT // 32,
        ),
        max_num_batched_tokens=prompts * PROMPT,
        plan=ParallelPlan(pp=stages),
        rank_key=key,
    )
    others = [start(config, rank, announced) for rank in range(1, stages)]
    first = Announcement(name="pipeline", kind="prefill", incarnation=1, pid=1)
    try:
        async with leading(config, Announcer(first, announce_to_file(announced)), asyncio.Event()) as leader:
            assert leader is not None
            yield await leader.thread.load(lambda detail, share: None), leader.thread
    finally:
        for process in others:
            try:
                await asyncio.to_thread(process.wait, 20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def start(config: WorkerConfig, rank: int, announced: Path) -> "subprocess.Popen[bytes]":
    """Another rank of it, as a process."""
    engine = config.engine
    command = [sys.executable, "-m", "biphase.prefill_worker", "--name", config.name, "--pp", str(config.plan.pp)]
    command += ["--model", engine.model, "--load-format", "dummy", "--device", "cpu", "--threads", "1"]
    command += ["--max-model-len", str(engine.max_model_len), "--num-kv-blocks", str(engine.num_kv_blocks)]
    command += ["--max-num-batched-tokens", str(config.max_num_batched_tokens), "--rank", str(rank)]
    command += ["--rank-key", config.rank_key, "--leader", str(announced), "--log-level", "ERROR"]
    # in a session of its own, as in a deployment: Linux shares the processor between sessions first
    return subprocess.Popen(command, start_new_session=True)


async def seconds(engine: Engine, thread: EngineThread, arm: Arm, prompts: int) -> float:
    """Until every prompt has its first token."""
    block_size = engine.layout.block_size
    scheduler = PrefillScheduler(
        BlockPool(engine.num_blocks, block_size),
        engine.limits,
        max_num_batched_tokens=arm.tokens,
        max_num_seqs=prompts,
        max_queued_tokens=prompts * PROMPT,
    )
    for number in range(prompts):
        token_ids = [
            (number * 97 + position * 31) % (engine.model_info.vocab_size - 3) + 3 for position in range(PROMPT)
        ]
        request = PrefillRequest(
            seq_id=SeqId(number), token_ids=token_ids, num_prompt_tokens=PROMPT, sampling=Sampling(max_tokens=1)
        )
        refusal = scheduler.offer(request, 0.0)
        assert refusal is None, refusal
    depth = arm.in_flight or engine.pipeline_depth
    in_flight: deque[tuple[StepPlan, asyncio.Future[StepResult]]] = deque()
    start_s = time.perf_counter()
    while len(scheduler):
        plan = scheduler.schedule(0.0)[0] if len(in_flight) < depth else None
        if plan is not None:
            in_flight.append((plan, thread.launch(plan)))
            continue
        plan, step = in_flight.popleft()
        scheduler.complete(plan, await step, 0.0)
    return time.perf_counter() - start_s


async def measure(arguments: argparse.Namespace, folder: Path, out: report.Report) -> None:
    model = Path(arguments.model) if arguments.model else folder / "config.json"
    if not arguments.model:
        model.write_text(json.dumps(MODEL))
    prompts: int = arguments.prompts
    arms = (
        Arm(name="micro-batches in flight", tokens=PROMPT, in_flight=None),
        Arm(name="one step at a time", tokens=PROMPT, in_flight=1),
        Arm(name="all prompts in one step", tokens=prompts * PROMPT, in_flight=1),
    )
    rates: dict[str, list[float]] = {arm.name: [] for arm in arms}
    async with instance(folder, model, arguments.stages, prompts) as (engine, thread):
        for number in range(arguments.rounds + 1):
            for arm in arms:
                rate = prompts * PROMPT / await seconds(engine, thread, arm, prompts)
                print(f"round {number}/{arguments.rounds}  {arm.name}: {rate:.4g} tok/s", flush=True)
                if number:
                    rates[arm.name].append(rate)
    for name, values in rates.items():
        out.row(name, statistics.median(values), min(values), max(values))
    piped, *plain = (rates[arm.name] for arm in arms)
    gains = [mine / max(others) for mine, *others in zip(piped, *plain, strict=True)]
    out.row("micro-batches / the faster of the others", statistics.median(gains), min(gains), max(gains))
    out.goal(f"pipeline_{arguments.stages}_stages", statistics.median(gains), 1.5, at_least=True)


def main() -> int:
    arguments = parse()
    out = report.Report(bench="pipeline", columns=("input tok/s", "median", "least", "most"))
    try:
        with tempfile.TemporaryDirectory() as folder:
            asyncio.run(measure(arguments, Path(folder), out))
    except SetupError as error:
        print(f"bench/pipeline.py: {one_line(error)}", file=sys.stderr)
        return 2
    return out.finish(arguments)


if __name__ == "__main__":
    report.run(main)
