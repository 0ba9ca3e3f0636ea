"""A ModelConfig from a GGUF file's metadata."""

import struct
from typing import Any

from biphase.engine.model_config import FrequencyFactors, LinearScaling, ModelConfig, RopeConfig, RopeScaling
from biphase.protos.errors import SetupError
from biphase.protos.gguf_file import GgufFile
from biphase.protos.model_source import gguf_special_ids

ARCHITECTURES = ("llama", "qwen2", "qwen3")
"""GGUF's names; Mistral's files call themselves llama."""
_F32 = 0


def config_of(file: GgufFile) -> ModelConfig:
    """Raises SetupError, one line, for what the engine cannot run."""
    architecture = file.require("general.architecture")
    if num_experts := file.get(f"{architecture}.expert_count", 0):
        raise SetupError(
            f"{file.path}: {num_experts} experts; mixture-of-experts models are read from safetensors only, not from GGUF"
        )
    if architecture not in ARCHITECTURES:
        raise SetupError(
            f"{file.path}: architecture {architecture!r} is not supported (supported: {', '.join(ARCHITECTURES)})"
        )

    def get(key: str, default: Any = None) -> Any:
        return file.get(f"{architecture}.{key}", default)

    def require(key: str) -> Any:
        return file.require(f"{architecture}.{key}")

    embed = file.tensors.get("token_embd.weight")
    if embed is None or len(embed.shape) != 2:
        raise SetupError(f"{file.path}: the GGUF file has no token_embd.weight matrix")
    hidden, num_heads = require("embedding_length"), require("attention.head_count")
    num_kv_heads = get("attention.head_count_kv", num_heads)
    if not isinstance(num_heads, int) or not isinstance(num_kv_heads, int):
        raise SetupError(f"{file.path}: head counts that differ by layer are not supported")
    head_dim = get("attention.key_length") or hidden // max(num_heads, 1)
    if get("attention.value_length", head_dim) != head_dim:
        raise SetupError(
            f"{file.path}: keys of {head_dim} and values of {get('attention.value_length')} elements are not supported"
        )
    rotary_dim = get("rope.dimension_count", head_dim)
    if rotary_dim != head_dim:
        raise SetupError(f"{file.path}: rotation of {rotary_dim} of {head_dim} elements is not supported in GGUF files")
    eos_token_ids, bos_token_id = gguf_special_ids(file)
    try:
        return ModelConfig(
            architecture=architecture,
            vocab_size=embed.shape[0],
            hidden_size=hidden,
            intermediate_size=require("feed_forward_length"),
            num_layers=require("block_count"),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            rms_norm_eps=require("attention.layer_norm_rms_epsilon"),
            rope=RopeConfig(
                theta=get("rope.freq_base", 10000.0), scaling=_scaling(file, architecture), rotary_dim=rotary_dim
            ),
            max_position_embeddings=require("context_length"),
            tie_word_embeddings="output.weight" not in file.tensors,
            attention_bias=architecture == "qwen2",
            qk_norm=architecture == "qwen3",
            sliding_window=(get("attention.sliding_window") or None) if architecture == "llama" else None,
            eos_token_ids=eos_token_ids,
            bos_token_id=bos_token_id,
        )
    except (ValueError, TypeError) as error:
        raise SetupError(f"{file.path}: {error}") from error


def _scaling(file: GgufFile, architecture: str) -> RopeScaling | None:
    factors = file.tensors.get("rope_freqs.weight")
    if factors is not None:
        if factors.type_id != _F32 or len(factors.shape) != 1:
            raise SetupError(f"{file.path}: rope_freqs.weight is not a list of 32-bit floats")
        try:
            return FrequencyFactors(factors=struct.unpack_from(f"<{factors.shape[0]}f", file.data, factors.offset))
        except struct.error:
            raise SetupError(f"{file.path}: truncated GGUF file: it ends inside rope_freqs.weight") from None
    kind = file.get(f"{architecture}.rope.scaling.type", "none")
    if kind == "none":
        return None
    if kind == "linear":
        return LinearScaling(factor=file.require(f"{architecture}.rope.scaling.factor"))
    raise SetupError(f"{file.path}: rope scaling {kind!r} is not supported (supported: none, linear, rope_freqs)")
