"""A model on several ranks: the greedy tokens of one rank, and of its KV the slice that is each rank's."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.random_models import random_model
from support.ranks import on_ranks
from support.two_prompts import TwoPrompts
from transformers import LlamaConfig, MistralConfig, MixtralConfig, PretrainedConfig, Qwen2Config, Qwen3Config
from transformers import Qwen3MoeConfig as Qwen3Experts

from biphase.engine.config import EngineConfig
from biphase.engine.engine import Engine
from biphase.engine.gpu.engine import GpuEngine
from biphase.engine.parallel.group import RankGroups
from biphase.engine.step import StepPlan
from biphase.protos.errors import SetupError
from biphase.protos.parallel_plan import ParallelPlan

SIZES: dict[str, Any] = {
    "vocab_size": 163,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 64,
    "rope_theta": 10000.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = SIZES | {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "norm_topk_prob": True}
FAMILIES: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: LlamaConfig(**SIZES),
    "llama-tied": lambda: LlamaConfig(**SIZES, tie_word_embeddings=True),
    "llama-3-kv-heads": lambda: LlamaConfig(**(SIZES | {"num_attention_heads": 6, "num_key_value_heads": 3})),
    "mistral-window": lambda: MistralConfig(**SIZES, sliding_window=13),
    "qwen2": lambda: Qwen2Config(**(SIZES | {"hidden_size": 512})),
    "qwen3": lambda: Qwen3Config(**SIZES),
    "mixtral": lambda: MixtralConfig(**SIZES, num_local_experts=4),
    "qwen3-moe": lambda: Qwen3Experts(**EXPERTS),
}
CASES = [
    *(("llama", tp, pp) for tp, pp in [(2, 1), (4, 1), (8, 1), (1, 2), (1, 3), (4, 2)]),
    *((family, 2, 2) for family in FAMILIES if family != "llama-3-kv-heads"),
    ("llama-3-kv-heads", 3, 2),
    ("llama-3-kv-heads", 6, 1),
    ("qwen3-moe", 4, 1),
]
SEEDS = {"llama": 12, "qwen3-moe": 12}
GAIN = 8
BLOCK_SIZE = 16
# the step of a GPU, its kernels' references and its sums over gloo
PAGED_CASES = [
    *(("llama", tp, pp) for tp, pp in [(8, 1), (1, 3)]),
    *((family, 2, 2) for family in FAMILIES if family not in ("llama", "llama-3-kv-heads")),
    ("llama-3-kv-heads", 3, 2),
    ("qwen3-moe", 4, 1),
]
SEQUENCES = TwoPrompts(
    prompts=([3, 17, 60, 9, 44, 21, 5, 80, 33, 12, 71, 8, 15, 90, 2, 41, 7, 29, 55, 10, 66], [90, 4, 66, 151]),
    blocks=([3, 4, 6, 8], [2, 7, 1, 5]),  # not block 0, which warming up writes to
    num_decoded=6,
)


@dataclass(frozen=True)
class Outcome:
    tokens: list[list[int]]
    kv: np.ndarray
    layers_told: list[tuple[int, int]]


class Models:
    """Each family's directory and what one rank makes of it, both once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.single = cache(self._single)

    def config(self, family: str) -> EngineConfig:
        """With room for the steps below and no more: a GPU's step is warmed up up to its limits."""
        folder = self._folder / family
        if not folder.exists():
            random_model(FAMILIES[family](), seed=SEEDS.get(family, 11), gain=GAIN).save_pretrained(folder)
        return EngineConfig(
            model=str(folder),
            block_size=BLOCK_SIZE,
            num_kv_blocks=9,
            threads=1,
            weights_cache=str(folder / "cache"),
            device="cpu",
            max_step_tokens=16,
            max_step_seqs=2,
        ).resolved(has_cuda=False)

    def _single(self, family: str) -> tuple[Engine, Outcome]:
        engine = Engine.load(self.config(family), lambda detail, done: None)
        return engine, outcome_of(engine, None)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("models"))


def outcome_of(engine: Engine, known: list[list[int]] | None) -> Outcome:
    """``known``: the sequences as they will be, for ranks that do not see what is drawn."""
    told: list[tuple[int, int]] = []
    engine.on_layers = lambda plan, num_layers: told.append((plan.num_tokens, num_layers))
    tokens = SEQUENCES.tokens_of(engine, known)
    engine.on_layers = None
    pool = engine.kv_memory._pool  # type: ignore[attr-defined]
    return Outcome(tokens, np.asarray(pool)[:, [3, 4, 2]].copy(), told)


def check(results: list[tuple[Engine, Outcome, bool]], whole: Outcome, plan: ParallelPlan, single: Engine) -> None:
    for rank, (engine, found, samples) in enumerate(results):
        full = engine.full_layout
        assert full == single.layout and engine.plan == plan and engine.rank == rank
        assert engine.model_info == single.model_info
        assert samples == (rank == plan.tp * (plan.pp - 1))
        layers, heads = plan.layers_of(rank, full.num_layers), plan.kv_heads_of(rank, full.num_kv_heads)
        assert engine.layout == replace(full, num_layers=len(layers), num_kv_heads=len(heads))
        expected = whole.kv[layers.start : layers.stop, :, :, heads.start : heads.stop]
        np.testing.assert_allclose(found.kv, expected, rtol=2e-4, atol=2e-4)
        # two steps have chunks, of 15 and 10 tokens; these models have too few layers to tell of several at once
        assert found.layers_told == [(count, n + 1) for count in (15, 10) for n in range(len(layers))]
        ahead = isinstance(engine, GpuEngine)
        assert engine.may_continue == (ahead and plan.pp == 1)
        assert engine.pipeline_depth == (1 + ahead if plan.pp == 1 else plan.pp + 1)
    for rank, (_, found, _) in enumerate(results):
        for other in range(rank):
            if plan.stage_of(rank) == plan.stage_of(other) and plan.kv_heads_of(
                rank, single.layout.num_kv_heads
            ) == plan.kv_heads_of(other, single.layout.num_kv_heads):
                assert np.array_equal(found.kv, results[other][1].kv), f"ranks {other} and {rank} hold the same heads"


@pytest.mark.parametrize(("family", "tp", "pp"), CASES)
def test_ranks_draw_the_tokens_and_hold_the_kv_of_one_rank(models: Models, family: str, tp: int, pp: int) -> None:
    check_family(models, family, ParallelPlan(tp=tp, pp=pp), Engine.load)


@pytest.mark.parametrize(("family", "tp", "pp"), PAGED_CASES)
def test_so_does_the_step_of_a_gpu(models: Models, family: str, tp: int, pp: int) -> None:
    check_family(models, family, ParallelPlan(tp=tp, pp=pp), partial(GpuEngine.load, kernels="torch"))


def check_family(models: Models, family: str, plan: ParallelPlan, load: Callable[..., Engine]) -> None:
    config = models.config(family)
    single, whole = models.single(family)
    drawn = {token for sequence in whole.tokens for token in sequence[-SEQUENCES.num_decoded :]}
    assert len(drawn) >= 4, "too dull a model"

    def work(groups: RankGroups) -> tuple[Engine, Outcome, bool]:
        engine = load(config, lambda detail, done: None, groups=groups)
        # every rank checks what it is told; only one draws
        return engine, outcome_of(engine, whole.tokens), groups.samples

    check(on_ranks(plan, work), whole, plan, single)


@pytest.mark.parametrize(
    ("tp", "pp", "message"),
    [
        (3, 1, "tensor_parallel_size 3 does not divide the model's 8 attention heads"),
        (1, 4, "pipeline_parallel_size 4 is more than the model's 3 layers"),
    ],
)
def test_a_plan_that_the_model_does_not_fit_is_refused(models: Models, tp: int, pp: int, message: str) -> None:
    def work(groups: RankGroups) -> None:
        with pytest.raises(SetupError, match=message):
            Engine.load(models.config("llama"), lambda detail, done: None, groups=groups)

    on_ranks(ParallelPlan(tp=tp, pp=pp), work)


def test_steps_follow_each_other_through_the_stages(models: Models) -> None:
    """The first stage runs ahead: all it does for later steps needs no answer of the second."""
    config, (_, whole) = models.config("llama"), models.single("llama")
    plans = [
        StepPlan(seqs=(SEQUENCES.first_chunk(),)),
        StepPlan(seqs=(SEQUENCES.second(),)),
        StepPlan(seqs=(SEQUENCES.rest_of_first(),)),
    ]

    def work(groups: RankGroups) -> list[tuple[int | None, ...]]:
        engine = Engine.load(config, lambda detail, done: None, groups=groups)
        if groups.next is not None:
            results = [engine.execute(plan).tokens for plan in plans]
            groups.meet("first stage is through")
            return results
        groups.meet("first stage is through")
        return [engine.execute(plan).tokens for plan in plans]

    first, second = on_ranks(ParallelPlan(pp=2), work)
    assert first == [(None,), (None,), (None,)]
    prompt, other = (len(prompt) for prompt in SEQUENCES.prompts)
    assert second == [(None,), (whole.tokens[1][other],), (whole.tokens[0][prompt],)]
    assert torch.get_num_threads() >= 1
