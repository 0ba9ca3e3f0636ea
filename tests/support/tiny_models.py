"""Models of a few kilobytes with random weights, as a Hugging Face directory or a GGUF file of the same numbers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from support.gguf_files import byte_level_fields, write_gguf

VOCAB, HIDDEN, INTER, LAYERS, HEADS, KV_HEADS, DIM = 260, 32, 64, 2, 4, 2, 16

EXPERTS, EXPERT_INTER = 5, 24
_EXPERT_KEYS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": EXPERTS, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": EXPERTS, "num_experts_per_tok": 3, "moe_intermediate_size": EXPERT_INTER},
}

_GGUF_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def tiny_config(architecture: str = "llama", *, tied: bool = True, **changes: Any) -> dict[str, Any]:
    """A config.json."""
    return {
        "model_type": architecture,
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": INTER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": DIM,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": 512,
        "tie_word_embeddings": tied,
        "eos_token_id": 2,
        "bos_token_id": 1,
        "hidden_act": "silu",
        **_EXPERT_KEYS.get(architecture, {}),
    } | changes


def tiny_weights(architecture: str = "llama", *, tied: bool = True, seed: int = 0) -> dict[str, torch.Tensor]:
    """float32 weights by Hugging Face name."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN), "model.norm.weight": (HIDDEN,)}
    if not tied:
        shapes["lm_head.weight"] = (VOCAB, HIDDEN)
    for i in range(LAYERS):
        layer, attn, mlp = f"model.layers.{i}", f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp"
        for name, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
            shapes[f"{attn}.{name}_proj.weight"] = (heads * DIM, HIDDEN)
            if architecture == "qwen2":
                shapes[f"{attn}.{name}_proj.bias"] = (heads * DIM,)
        if architecture in ("qwen3", "qwen3_moe"):
            shapes |= {f"{attn}.q_norm.weight": (DIM,), f"{attn}.k_norm.weight": (DIM,)}
        shapes[f"{attn}.o_proj.weight"] = (HIDDEN, HEADS * DIM)
        if architecture in _EXPERT_KEYS:
            shapes |= _expert_shapes(architecture, layer)
        else:
            shapes |= {f"{mlp}.gate_proj.weight": (INTER, HIDDEN), f"{mlp}.up_proj.weight": (INTER, HIDDEN)}
            shapes[f"{mlp}.down_proj.weight"] = (HIDDEN, INTER)
        shapes |= {f"{layer}.input_layernorm.weight": (HIDDEN,), f"{layer}.post_attention_layernorm.weight": (HIDDEN,)}
    random = torch.Generator().manual_seed(seed)
    return {name: 0.1 * torch.randn(shape, generator=random) for name, shape in shapes.items()}


def _expert_shapes(architecture: str, layer: str) -> dict[str, tuple[int, ...]]:
    mixtral = architecture == "mixtral"
    part, inter = (f"{layer}.block_sparse_moe", INTER) if mixtral else (f"{layer}.mlp", EXPERT_INTER)
    gate, down, up = ("w1", "w2", "w3") if mixtral else ("gate_proj", "down_proj", "up_proj")
    shapes: dict[str, tuple[int, ...]] = {f"{part}.gate.weight": (EXPERTS, HIDDEN)}
    for i in range(EXPERTS):
        expert = f"{part}.experts.{i}"
        shapes |= {f"{expert}.{name}.weight": (inter, HIDDEN) for name in (gate, up)}
        shapes[f"{expert}.{down}.weight"] = (HIDDEN, inter)
    return shapes


def write_directory(folder: Path, config: dict[str, Any], weights: dict[str, torch.Tensor], *, shards: int = 1) -> Path:
    """config.json and the weights in one safetensors file, or in ``shards`` of them with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(weights, folder / "model.safetensors")
        return folder
    home = {name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(weights)}
    for shard in set(home.values()):
        save_file({name: weights[name] for name in weights if home[name] == shard}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": home}))
    return folder


def write_gguf_model(
    path: Path,
    architecture: str,
    weights: dict[str, torch.Tensor],
    *,
    fields: dict[str, Any] | None = None,
    kind: Any = None,
    extra: dict[str, np.ndarray] | None = None,
) -> Path:
    """A GGUF file of the weights as llama.cpp writes it: for llama, rows of q and k reordered. ``kind``: ggml's type."""
    import gguf

    tensors: dict[str, tuple[np.ndarray, Any]] = {name: (values, None) for name, values in (extra or {}).items()}
    for name, tensor in weights.items():
        values = tensor.numpy().copy()
        if architecture == "llama" and ".q_proj.weight" in name:
            values = interleave(values, HEADS)
        if architecture == "llama" and ".k_proj.weight" in name:
            values = interleave(values, KV_HEADS)
        if kind is not None and values.ndim == 2:
            tensors[gguf_name(name)] = (gguf.quantize(values, kind), kind)
        else:
            tensors[gguf_name(name)] = (values, None)
    specials = ("<unk>", "<s>", "</s>")
    metadata = byte_level_fields(["qq"], ["q q"], special=specials)
    metadata |= {
        f"{architecture}.block_count": LAYERS,
        f"{architecture}.context_length": 512,
        f"{architecture}.embedding_length": HIDDEN,
        f"{architecture}.feed_forward_length": INTER,
        f"{architecture}.attention.head_count": HEADS,
        f"{architecture}.attention.head_count_kv": KV_HEADS,
        f"{architecture}.attention.key_length": DIM,
        f"{architecture}.attention.value_length": DIM,
        f"{architecture}.attention.layer_norm_rms_epsilon": 1e-5,
        f"{architecture}.rope.freq_base": 10000.0,
        "tokenizer.ggml.bos_token_id": 258,
        "tokenizer.ggml.eos_token_id": 259,
    }
    return write_gguf(
        path, architecture, {k: v for k, v in (metadata | (fields or {})).items() if v is not None}, tensors
    )


def interleave(values: np.ndarray, heads: int) -> np.ndarray:
    """Rows from Hugging Face's order (i, i + dim/2 rotate together) to llama.cpp's (2i, 2i + 1 do)."""
    per_head = values.reshape(heads, -1, values.shape[-1])
    half = per_head.shape[1] // 2
    mixed = np.empty_like(per_head)
    mixed[:, 0::2], mixed[:, 1::2] = per_head[:, :half], per_head[:, half:]
    return mixed.reshape(values.shape)


def gguf_name(name: str) -> str:
    top = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    if name in top or name == "lm_head.weight":
        return top.get(name, "output.weight")
    _, _, layer, rest = name.split(".", 3)
    part, kind = rest.rsplit(".", 1)
    return f"blk.{layer}.{_GGUF_NAMES[part]}.{kind}"
