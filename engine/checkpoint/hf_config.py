"""A ModelConfig from a Hugging Face directory's config.json and generation_config.json."""

from pathlib import Path
from typing import Any

from biphase.engine.model_config import (
    SUPPORTED_ARCHITECTURES,
    LinearScaling,
    Llama3Scaling,
    ModelConfig,
    RopeConfig,
    RopeScaling,
)
from biphase.protos.errors import SetupError
from biphase.protos.model_source import directory_special_ids, read_json, read_json_if_there

_MISTRAL_WINDOW = 4096
"""What a mistral config.json without the key means (transformers' default)."""


def config_of(folder: Path) -> ModelConfig:
    """Raises SetupError, one line, for what the engine cannot run."""
    path = folder / "config.json"
    fields = read_json(path)
    architecture = fields.get("model_type")
    if architecture not in SUPPORTED_ARCHITECTURES:
        raise SetupError(
            f"{path}: architecture {architecture!r} is not supported (supported: {', '.join(SUPPORTED_ARCHITECTURES)})"
        )
    _refuse_unknown_parts(path, fields)
    eos_token_ids, bos_token_id = directory_special_ids(fields, read_json_if_there(folder / "generation_config.json"))
    try:
        hidden, num_heads = fields["hidden_size"], fields["num_attention_heads"]
        head_dim = fields.get("head_dim") or hidden // num_heads
        return ModelConfig(
            architecture=architecture,
            vocab_size=fields["vocab_size"],
            hidden_size=hidden,
            intermediate_size=fields["intermediate_size"],
            num_layers=fields["num_hidden_layers"],
            num_heads=num_heads,
            num_kv_heads=fields.get("num_key_value_heads") or num_heads,
            head_dim=head_dim,
            rms_norm_eps=fields["rms_norm_eps"],
            rope=_rope(path, fields, head_dim),
            max_position_embeddings=fields["max_position_embeddings"],
            tie_word_embeddings=fields.get("tie_word_embeddings", False),
            attention_bias=architecture == "qwen2",
            qk_norm=architecture == "qwen3",
            sliding_window=_window(path, fields, architecture),
            eos_token_ids=eos_token_ids,
            bos_token_id=bos_token_id,
        )
    except KeyError as error:
        raise SetupError(f"{path}: no {error.args[0]}") from error
    except (ValueError, TypeError, ZeroDivisionError) as error:
        raise SetupError(f"{path}: {error}") from error


def _refuse_unknown_parts(path: Path, fields: dict[str, Any]) -> None:
    """What would change the computation and is not built."""
    if fields.get("hidden_act", "silu") not in ("silu", "swish"):
        raise SetupError(f"{path}: hidden_act {fields['hidden_act']!r} is not supported (supported: silu)")
    for key in ("attention_bias", "mlp_bias"):
        if fields.get(key):
            raise SetupError(f"{path}: {key} true is not supported")
    if fields.get("quantization_config"):
        method = fields["quantization_config"].get("quant_method", "unknown")
        raise SetupError(f"{path}: weights quantized by {method!r} are not supported (supported: F32, F16, BF16, GGUF)")


def _rope(path: Path, fields: dict[str, Any], head_dim: int) -> RopeConfig:
    # transformers 5 writes rope_parameters, earlier ones rope_theta beside rope_scaling
    rope = fields.get("rope_parameters") or {}
    scaling = rope or fields.get("rope_scaling") or {}
    if not isinstance(scaling, dict):
        raise SetupError(f"{path}: rope scaling is {scaling!r}, expected an object")
    theta = rope.get("rope_theta", fields.get("rope_theta", 10000.0))
    partial = rope.get("partial_rotary_factor", fields.get("partial_rotary_factor", 1.0))
    return RopeConfig(theta=theta, scaling=_scaling(path, scaling), rotary_dim=int(head_dim * partial))


def _scaling(path: Path, fields: dict[str, Any]) -> RopeScaling | None:
    kind = fields.get("rope_type", fields.get("type", "default"))
    if kind == "default":
        return None
    if kind == "linear":
        return LinearScaling(factor=fields["factor"])
    if kind == "llama3":
        return Llama3Scaling(
            factor=fields["factor"],
            low_freq_factor=fields["low_freq_factor"],
            high_freq_factor=fields["high_freq_factor"],
            original_max_position_embeddings=fields["original_max_position_embeddings"],
        )
    raise SetupError(f"{path}: rope scaling {kind!r} is not supported (supported: default, linear, llama3)")


def _window(path: Path, fields: dict[str, Any], architecture: str) -> int | None:
    """The sliding window of all layers; None for full attention. Layers that differ are refused."""
    if architecture == "llama":
        return None
    if architecture == "mistral":
        window = fields.get("sliding_window", _MISTRAL_WINDOW)
        return window if window is None else int(window)
    if not fields.get("use_sliding_window", False) or fields.get("sliding_window") is None:
        return None
    layers = fields["num_hidden_layers"]
    first = fields.get("max_window_layers", layers)
    types = fields.get("layer_types") or [
        "sliding_attention" if i >= first else "full_attention" for i in range(layers)
    ]
    if set(types) == {"full_attention"}:
        return None
    if set(types) == {"sliding_attention"}:
        return int(fields["sliding_window"])
    raise SetupError(f"{path}: layers with and without a sliding window in one model are not supported")
