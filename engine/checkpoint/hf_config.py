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
_THETA, _MIXTRAL_THETA = 1e4, 1e6
"""Likewise, of the rotary base."""


def config_of(found: Path) -> ModelConfig:
    """Of a directory, or of a file as good as its config.json. Raises SetupError, one line, for what cannot run."""
    path = found / "config.json" if found.is_dir() else found
    fields = read_json(path)
    architecture = fields.get("model_type")
    if architecture not in SUPPORTED_ARCHITECTURES:
        raise SetupError(
            f"{path}: architecture {architecture!r} is not supported (supported: {', '.join(SUPPORTED_ARCHITECTURES)})"
        )
    _refuse_unknown_parts(path, fields)
    eos_token_ids, bos_token_id = directory_special_ids(
        fields, read_json_if_there(path.parent / "generation_config.json")
    )
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
            qk_norm=architecture in ("qwen3", "qwen3_moe"),
            **_experts(path, fields, architecture),
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


def _experts(path: Path, fields: dict[str, Any], architecture: str) -> dict[str, Any]:
    """ModelConfig's fields on experts; none for a model without."""
    if architecture == "mixtral":
        return {
            "num_experts": fields["num_local_experts"],
            "num_experts_per_tok": fields["num_experts_per_tok"],
            "moe_intermediate_size": fields["intermediate_size"],
            "norm_topk_prob": True,
        }
    if architecture != "qwen3_moe":
        return {}
    for key, plain in (("decoder_sparse_step", 1), ("mlp_only_layers", [])):
        if (value := fields.get(key, plain)) not in (plain, None):
            raise SetupError(f"{path}: {key} {value} is not supported: experts in every layer or in none")
    return {
        # transformers 5 writes the second name
        "num_experts": fields["num_experts"] if "num_experts" in fields else fields["num_local_experts"],
        "num_experts_per_tok": fields["num_experts_per_tok"],
        "moe_intermediate_size": fields["moe_intermediate_size"],
        "norm_topk_prob": bool(fields.get("norm_topk_prob", False)),
    }


def _rope(path: Path, fields: dict[str, Any], head_dim: int) -> RopeConfig:
    # transformers 5 writes rope_parameters, earlier ones rope_theta beside rope_scaling
    rope = fields.get("rope_parameters") or {}
    scaling = rope or fields.get("rope_scaling") or {}
    if not isinstance(scaling, dict):
        raise SetupError(f"{path}: rope scaling is {scaling!r}, expected an object")
    theta = rope.get(
        "rope_theta", fields.get("rope_theta", _MIXTRAL_THETA if fields["model_type"] == "mixtral" else _THETA)
    )
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
    if architecture == "mixtral":
        window = fields.get("sliding_window")
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
