"""ModelConfig: limits by name, JSON round trip, rotary frequencies against transformers' own."""

import dataclasses
from typing import Any

import pytest

from biphase.engine.model_config import FrequencyFactors, LinearScaling, Llama3Scaling, ModelConfig, RopeConfig


def make_config(**changes: Any) -> ModelConfig:
    fields: dict[str, Any] = {
        "architecture": "llama",
        "vocab_size": 100,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
        "rms_norm_eps": 1e-5,
        "rope": RopeConfig(theta=10000.0, scaling=None, rotary_dim=8),
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "eos_token_ids": (2, 3),
        "bos_token_id": 1,
    }
    return ModelConfig(**(fields | changes))


SCALINGS = [
    None,
    LinearScaling(factor=4.0),
    Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192),
    FrequencyFactors(factors=(1.0, 1.5, 2.0, 8.0)),
]


@pytest.mark.parametrize("scaling", SCALINGS, ids=["none", "linear", "llama3", "factors"])
def test_json_round_trip(scaling: Any) -> None:
    config = make_config(rope=RopeConfig(theta=5e5, scaling=scaling, rotary_dim=8), sliding_window=128)
    assert ModelConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"architecture": "gpt5"},
            "architecture 'gpt5' is not one of llama, mistral, mixtral, qwen2, qwen3, qwen3_moe",
        ),
        ({"num_layers": 0}, "num_layers is 0, must be at least 1"),
        ({"num_kv_heads": 3}, "num_heads 4 is not a multiple of num_kv_heads 3"),
        (
            {"rope": RopeConfig(theta=1e4, scaling=None, rotary_dim=10)},
            "rotary_dim 10 must be even and in 2 .. head_dim 8",
        ),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan, must be above 0"),
        ({"eos_token_ids": (100,)}, "special token id 100 is outside the vocabulary of 100"),
        ({"sliding_window": 0}, "sliding_window is 0, must be at least 1"),
        ({"num_experts": -1}, "num_experts is -1, must be at least 0"),
        ({"num_experts": 4}, "moe_intermediate_size is 0, must be at least 1"),
        (
            {"num_experts": 4, "moe_intermediate_size": 8, "num_experts_per_tok": 5},
            "num_experts_per_tok is 5, must be in 1 .. num_experts 4",
        ),
    ],
)
def test_limits_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        make_config(**changes)
    assert str(caught.value) == message


def test_values_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        make_config().vocab_size = 5  # type: ignore[misc]


@pytest.mark.parametrize("scaling", SCALINGS[:3], ids=["none", "linear", "llama3"])
def test_frequencies_equal_transformers(scaling: Any) -> None:
    transformers = pytest.importorskip("transformers", reason="the independent reference")
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    parameters: dict[str, Any] = {"rope_theta": 500000.0, "rope_type": "default"}
    if scaling is not None:
        kind = "linear" if isinstance(scaling, LinearScaling) else "llama3"
        parameters |= {"rope_type": kind} | dataclasses.asdict(scaling)
    theirs = LlamaRotaryEmbedding(
        transformers.LlamaConfig(
            hidden_size=128, num_attention_heads=2, max_position_embeddings=131072, rope_parameters=parameters
        )
    )
    ours = RopeConfig(theta=500000.0, scaling=scaling, rotary_dim=64).inverse_frequencies()
    assert theirs.inv_freq.tolist() == pytest.approx(ours, rel=2e-6)
