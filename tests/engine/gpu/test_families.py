"""Every supported family on the GPU's step: the tokens of the CPU engine, which equal transformers' (test_model_families).

Heads are of 64 features, the least that the kernels take.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.random_models import LLAMA3_ROPE, random_model
from support.two_prompts import TwoPrompts
from transformers import (
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from biphase.engine.config import EngineConfig
from biphase.engine.cpu_engine import CpuEngine
from biphase.engine.gpu.engine import GpuEngine

SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 64,
    "rope_theta": 10000.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = SIZES | {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 64}
FAMILIES: dict[str, Callable[[], PretrainedConfig]] = {
    "llama3-rope": lambda: LlamaConfig(**SIZES, rope_scaling=LLAMA3_ROPE | {"original_max_position_embeddings": 16}),
    "llama-tied": lambda: LlamaConfig(**SIZES, tie_word_embeddings=True),
    "mistral-window": lambda: MistralConfig(**SIZES, sliding_window=13),
    "qwen2": lambda: Qwen2Config(**(SIZES | {"hidden_size": 256})),
    "qwen3": lambda: Qwen3Config(**SIZES),
    "mixtral": lambda: MixtralConfig(**SIZES, num_local_experts=4),
    "qwen3-moe": lambda: Qwen3MoeConfig(**EXPERTS, norm_topk_prob=True),
    "qwen3-moe-not-renormalized": lambda: Qwen3MoeConfig(**EXPERTS),
}
SEQUENCES = TwoPrompts(
    prompts=([3, 17, 60, 9, 44, 21, 5, 80, 33, 12, 71, 8, 15, 90, 2, 41, 7, 29, 55, 10], [90, 4, 66]),
    blocks=([3, 0, 6], [2, 7, 1]),
    num_decoded=5,
)


@pytest.fixture(scope="module", params=FAMILIES)
def model_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp(request.param)
    model = random_model(FAMILIES[request.param](), seed=11, gain=12)
    model.save_pretrained(folder)
    return folder


def config_for(folder: Path, *, has_cuda: bool) -> EngineConfig:
    return EngineConfig(
        model=str(folder),
        weights_cache=str(folder / "cache"),
        block_size=16,
        num_kv_blocks=8,
        max_step_tokens=20,
        max_step_seqs=2,
        threads=1,
        dtype="float32",
    ).resolved(has_cuda=has_cuda)


def check(folder: Path, kernels: str) -> None:
    quiet: Callable[[str, float | None], None] = lambda detail, done: None
    cpu = CpuEngine.load(config_for(folder, has_cuda=False), quiet)
    expected = SEQUENCES.tokens_of(cpu)
    drawn = {token for sequence in expected for token in sequence[-SEQUENCES.num_decoded :]}
    assert len(drawn) >= 3, "a model that says one thing proves nothing"
    engine = GpuEngine.load(config_for(folder, has_cuda=torch.cuda.is_available()), quiet, kernels)
    assert SEQUENCES.tokens_of(engine) == expected


def test_references_give_the_tokens_of_the_cpu(model_dir: Path) -> None:
    check(model_dir, "torch")


@pytest.mark.parametrize(
    "model_dir",
    [pytest.param(name, marks=() if name == "qwen3-moe" else pytest.mark.long) for name in FAMILIES],
    indirect=True,
)
def test_kernels_give_the_tokens_of_the_cpu(model_dir: Path) -> None:
    check(model_dir, "triton")
