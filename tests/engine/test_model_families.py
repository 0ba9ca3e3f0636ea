"""Logits and greedy tokens of every supported family equal Hugging Face transformers', chunked, mixed and decoded."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.random_models import LLAMA3_ROPE, random_model
from transformers import (
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from biphase.engine.config import EngineConfig
from biphase.engine.engine import Engine
from biphase.engine.step import SeqStep, StepPlan
from biphase.protos.ids import BlockId, SeqId
from biphase.protos.values import Sampling

SIZES = {
    "vocab_size": 160,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rope_theta": 10000.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attn_implementation": "eager",
}
QWEN3_EXPERTS = SIZES | {"head_dim": 16, "num_experts": 16, "num_experts_per_tok": 5, "moe_intermediate_size": 24}
FAMILIES: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: LlamaConfig(**SIZES),
    "llama-tied": lambda: LlamaConfig(**SIZES, tie_word_embeddings=True),
    "llama3-rope": lambda: LlamaConfig(**SIZES, rope_scaling=LLAMA3_ROPE),
    "linear-rope": lambda: LlamaConfig(
        **SIZES, rope_scaling={"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
    ),
    "qwen2": lambda: Qwen2Config(**SIZES),
    "qwen3": lambda: Qwen3Config(**SIZES, head_dim=16),
    "mistral": lambda: MistralConfig(**SIZES, sliding_window=None),
    "mistral-window": lambda: MistralConfig(**SIZES, sliding_window=13),
    "mixtral": lambda: MixtralConfig(**SIZES, num_local_experts=4),
    "mixtral-window": lambda: MixtralConfig(**SIZES, num_local_experts=8, sliding_window=13),
    "qwen3-moe": lambda: Qwen3MoeConfig(**QWEN3_EXPERTS, norm_topk_prob=True),
    "qwen3-moe-not-renormalized": lambda: Qwen3MoeConfig(**QWEN3_EXPERTS),
}
BLOCK_SIZE = 8
TABLES = ([3, 0, 9, 14, 1, 12, 8], [2, 11, 5, 7, 4, 16, 6], [10, 15, 17, 13, 18, 19, 20])
GREEDY = Sampling()


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, Engine]:
    """A small random model as transformers runs it, and the same one as we do."""
    folder: Path = tmp_path_factory.mktemp(request.param)
    model = random_model(FAMILIES[request.param](), seed=7, gain=4)
    model.save_pretrained(folder)
    engine = Engine.load(
        EngineConfig(
            model=str(folder), block_size=BLOCK_SIZE, num_kv_blocks=24, threads=1, weights_cache=str(folder / "cache")
        ),
        lambda detail, done: None,
    )
    return model, engine


def part(seq: int, tokens: list[int], start: int, end: int, *, sampling: Sampling | None = GREEDY) -> SeqStep:
    return SeqStep(
        seq_id=SeqId(seq),
        token_ids=tokens[start:end],
        start=start,
        blocks=[BlockId(block) for block in TABLES[seq]],
        sampling=sampling,
    )


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, 160, (length,), generator=generator).tolist() for length in (29, 17, 1)]


def logits_of(engine: Engine, plan: StepPlan) -> torch.Tensor:
    """Logits in the plan's order, beside what execute would draw from them."""
    with torch.inference_mode():
        batch = engine._builder.build(plan)
        logits = engine._model.forward(batch)
        assert logits is not None
        ordered = torch.empty_like(logits)
        ordered[list(batch.sampled_seqs)] = logits
        return ordered


def test_chunks_and_decode_rows_in_one_step_give_the_logits_of_transformers(
    pair: tuple[PreTrainedModel, Engine],
) -> None:
    model, engine = pair
    a, b, c = prompts()
    c = c + [5, 77, 31]
    engine.execute(StepPlan(seqs=(part(0, a, 0, 11, sampling=None), part(2, c, 0, 1, sampling=None))))
    engine.execute(StepPlan(seqs=(part(2, c, 1, 2, sampling=None), part(0, a, 11, 20, sampling=None))))
    engine.execute(StepPlan(seqs=(part(0, a, 20, 28, sampling=None), part(2, c, 2, 3, sampling=None))))
    # a decode row, a whole prompt, a decode row
    logits = logits_of(engine, StepPlan(seqs=(part(0, a, 28, 29), part(1, b, 0, 17), part(2, c, 3, 4))))
    for row, tokens in zip(logits, (a, b, c), strict=True):
        with torch.no_grad():
            expected = model(torch.tensor([tokens])).logits[0, -1]
        torch.testing.assert_close(row, expected, rtol=1e-4, atol=2e-4)


def test_greedy_tokens_equal_those_of_transformers(pair: tuple[PreTrainedModel, Engine]) -> None:
    model, engine = pair
    sequences = prompts()
    drawn = engine.execute(StepPlan(seqs=tuple(part(i, s, 0, len(s)) for i, s in enumerate(sequences)))).tokens
    for _ in range(20):
        for sequence, token in zip(sequences, drawn, strict=True):
            assert token is not None
            with torch.no_grad():
                best = model(torch.tensor([sequence])).logits[0, -1].topk(2)
            if best.values[0] - best.values[1] > 1e-3:
                assert token == int(best.indices[0])
            sequence.append(token)
        steps = [part(i, s, len(s) - 1, len(s)) for i, s in enumerate(sequences)]
        drawn = engine.execute(StepPlan(seqs=tuple(reversed(steps)))).tokens[::-1]
