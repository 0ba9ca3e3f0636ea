"""The engine's edges: bad plans, bad settings, sampling inside a step, and a thread that outlives errors."""

import asyncio
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from biphase.engine.config import EngineConfig
from biphase.engine.engine import Engine
from biphase.engine.engine_thread import EngineThread
from biphase.engine.step import SeqStep, StepPlan
from biphase.protos.errors import Internal, InvalidRequest, SetupError
from biphase.protos.ids import BlockId, SeqId
from biphase.protos.values import Sampling


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def config_for(model_dir: Path, **settings: Any) -> EngineConfig:
    defaults: dict[str, Any] = {"block_size": 4, "num_kv_blocks": 12, "threads": 1}
    return EngineConfig(model=str(model_dir), weights_cache=str(model_dir / "cache"), **(defaults | settings))


@pytest.fixture(scope="module")
def engine(model_dir: Path) -> Engine:
    return Engine.load(config_for(model_dir), lambda detail, done: None)


def step(
    tokens: Sequence[int],
    *,
    start: int = 0,
    blocks: Sequence[int] = (0, 1, 2),
    sampling: Sampling | None = None,
    index: int = 0,
    forbid: tuple[int, ...] = (),
) -> SeqStep:
    return SeqStep(
        seq_id=SeqId(7),
        token_ids=tokens,
        start=start,
        blocks=[BlockId(block) for block in blocks],
        sampling=sampling,
        output_index=index,
        forbid_ids=forbid,
    )


@pytest.mark.parametrize(
    ("seqs", "message"),
    [
        ((), "the step plan is empty, at least 1 sequence"),
        ((step([]),), "sequence 7 has 0 tokens in the step, at least 1"),
        ((step([1], start=-1),), "sequence 7 starts at -1, the first position is 0"),
        ((step([1], start=32, blocks=range(9)),), "sequence 7 reaches 33 tokens, the context holds 32"),
        ((step([1, 2], start=11),), "sequence 7 has 3 blocks, 13 tokens need 4"),
        ((step([1], blocks=[12]),), r"sequence 7 has block 12, the pool holds 0 \.\. 11"),
        ((step([1], blocks=[-1]),), r"sequence 7 has block -1, the pool holds 0 \.\. 11"),
        ((step([64]),), "token id 64 is outside the vocabulary of 64"),
        ((step([3, -1]),), "token id -1 is outside the vocabulary of 64"),
        ((step([1], sampling=Sampling(), forbid=(64,)),), "forbidden token id 64 is outside the vocabulary of 64"),
        ((step([1], sampling=Sampling(temperature=float("nan"))),), "temperature is nan, must be at least 0"),
    ],
)
def test_a_malformed_plan_is_refused_with_value_and_limit(
    engine: Engine, seqs: tuple[SeqStep, ...], message: str
) -> None:
    with pytest.raises(InvalidRequest, match=message):
        engine.execute(StepPlan(seqs=seqs))


def test_a_draw_does_not_depend_on_what_shares_the_step(engine: Engine) -> None:
    sampling = Sampling(temperature=1.5, seed=99, branch=2)
    asked = step([5, 6, 7], blocks=[4], sampling=sampling, index=3)
    (alone,) = engine.execute(StepPlan(seqs=(asked,))).tokens
    others = [step([9 + i], blocks=[5 + i], sampling=Sampling(temperature=1.0, seed=i)) for i in range(5)]
    shared = engine.execute(StepPlan(seqs=(*others, step([1, 2], blocks=[10]), asked))).tokens
    assert shared[-1] == alone
    assert shared[-2] is None
    drawn = {
        engine.execute(StepPlan(seqs=(step([5], blocks=[4], sampling=sampling, index=i),))).tokens for i in range(12)
    }
    assert len(drawn) > 3


def test_forbidden_ids_are_not_drawn(engine: Engine) -> None:
    greedy = Sampling()
    (best,) = engine.execute(StepPlan(seqs=(step([5, 6], sampling=greedy),))).tokens
    assert best is not None
    (second,) = engine.execute(StepPlan(seqs=(step([5, 6], sampling=greedy, forbid=(best,)),))).tokens
    assert second != best


def test_the_pool_is_shared_with_transfers(engine: Engine) -> None:
    assert engine.kv_memory.layout == engine.layout
    assert engine.kv_memory.num_blocks == engine.num_blocks == 12
    assert engine.device == "cpu float32"
    assert engine.kv_bytes == 12 * engine.layout.block_bytes
    assert engine.model_info.max_model_len == 32
    assert engine.model_info.architecture == "llama"
    assert "theta" in engine.rope_signature


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_kv_blocks": 7}, "the KV pool holds 7 blocks of 512 bytes, max_model_len 32 needs 8"),
        ({"num_kv_blocks": None, "kv_memory_bytes": 1600}, "the KV pool holds 3 blocks of 512 bytes"),
        ({"max_model_len": 33}, "max_model_len is 33, the model's limit is 32"),
    ],
)
def test_settings_that_cannot_work_are_refused(model_dir: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SetupError, match=message):
        Engine.load(config_for(model_dir, **settings), lambda detail, done: None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"device": "tpu"}, "device 'tpu' is not supported; there are: auto, cpu, cuda, cuda:N"),
        ({"device": "cpu", "dtype": "bfloat16"}, "dtype 'bfloat16' is not supported on cpu; there is: float32"),
        ({"dtype": "int8"}, "dtype 'int8' is not supported; there are: float32, bfloat16, float16"),
        ({"device": "cuda", "block_size": 48}, "block_size is 48, on a GPU it is one of 16, 32, 64, 128"),
        ({"block_size": 0}, "block_size is 0, must be at least 1"),
        ({"threads": 0}, "threads is 0, must be at least 1"),
    ],
)
def test_config_checks_itself(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EngineConfig(model="m", **settings)


def test_what_is_left_open_is_resolved_by_device() -> None:
    on_cpu = EngineConfig(model="m").resolved(has_cuda=False)
    assert (on_cpu.device, on_cpu.dtype, on_cpu.kv_dtype, on_cpu.block_size) == ("cpu", "float32", "float32", 32)
    on_gpu = EngineConfig(model="m", kv_dtype="float8_e4m3fn").resolved(has_cuda=True)
    assert (on_gpu.device, on_gpu.dtype, on_gpu.kv_dtype, on_gpu.block_size) == (
        "cuda",
        "bfloat16",
        "float8_e4m3fn",
        64,
    )
    with pytest.raises(ValueError, match="dtype 'bfloat16' is not supported on cpu"):
        EngineConfig(model="m", dtype="bfloat16").resolved(has_cuda=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA GPU")
def test_a_missing_gpu_is_told_in_one_line(model_dir: Path) -> None:
    with pytest.raises(SetupError, match="device 'cuda' was asked for, and torch .* finds no CUDA GPU"):
        Engine.load(config_for(model_dir, device="cuda", block_size=16), lambda detail, done: None)


async def test_the_thread_loads_runs_and_outlives_errors(model_dir: Path) -> None:
    thread = EngineThread(config_for(model_dir))
    plan = StepPlan(seqs=(step([1, 2, 3], sampling=Sampling()),))
    with pytest.raises(Internal, match="before the engine was loaded"):
        await thread.run(plan)
    seen: list[tuple[str, float, str]] = []
    engine = await thread.load(lambda detail, done: seen.append((detail, done, threading.current_thread().name)))
    with pytest.raises(InvalidRequest, match="the step plan is empty"):
        await thread.run(StepPlan(seqs=()))
    waiting = asyncio.create_task(thread.run(plan))
    await asyncio.sleep(0)
    waiting.cancel()
    results = await asyncio.gather(*(thread.run(plan) for _ in range(3)))
    assert len({result.tokens for result in results}) == 1
    assert results[0].step_ms > 0
    assert engine.threads == 1
    await thread.close()
    with pytest.raises(Internal, match="the engine thread has ended"):
        await thread.run(plan)
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)
    assert seen[-1][:2] == ("loaded", 1.0)
    assert {name for _, _, name in seen} == {threading.current_thread().name}


async def test_a_model_that_is_not_there_is_a_setup_error_and_the_thread_still_closes(tmp_path: Path) -> None:
    thread = EngineThread(EngineConfig(model=str(tmp_path / "none.gguf")))
    with pytest.raises(SetupError, match=r"none\.gguf"):
        await thread.load(lambda detail, done: None)
    await thread.close()
