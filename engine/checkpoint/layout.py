"""The engine's tensors of a model: names, shapes, and the checkpoint tensors each is made of. Pure: no torch, no files.

Every matrix is ``[out, in]`` row-major; fused ones are their parts' rows one below the other. Experts' matrices are
``[experts, out, in]``.
"""

from dataclasses import dataclass

from biphase.engine.model_config import ModelConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One tensor of the checkpoint, by its Hugging Face name, and the shape that the configuration implies."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineTensor:
    """One tensor of the engine: ``parts`` stacked along the first axis, which is then cut into ``num_experts``."""

    name: str
    parts: tuple[Part, ...]
    num_experts: int = 0
    """0: not cut."""

    @property
    def shape(self) -> tuple[int, ...]:
        rows, rest = sum(part.shape[0] for part in self.parts), self.parts[0].shape[1:]
        return (self.num_experts, rows // self.num_experts, *rest) if self.num_experts else (rows, *rest)


def engine_tensors(config: ModelConfig) -> list[EngineTensor]:
    """All tensors of a model, in the order in which a forward pass reads them."""
    hidden, inter, dim = config.hidden_size, config.intermediate_size, config.head_dim
    q_size, kv_size = config.num_heads * dim, config.num_kv_heads * dim
    tensors = [_tensor("embed", ("model.embed_tokens.weight", (config.vocab_size, hidden)))]
    for i in range(config.num_layers):
        ours, theirs = f"layers.{i}", f"model.layers.{i}"
        attn, mlp = f"{theirs}.self_attn", f"{theirs}.mlp"
        heads = (("q", q_size), ("k", kv_size), ("v", kv_size))
        tensors.append(_tensor(f"{ours}.attn_norm", (f"{theirs}.input_layernorm.weight", (hidden,))))
        tensors.append(_tensor(f"{ours}.qkv", *((f"{attn}.{h}_proj.weight", (size, hidden)) for h, size in heads)))
        if config.attention_bias:
            tensors.append(_tensor(f"{ours}.qkv_bias", *((f"{attn}.{h}_proj.bias", (size,)) for h, size in heads)))
        if config.qk_norm:
            tensors.append(_tensor(f"{ours}.q_norm", (f"{attn}.q_norm.weight", (dim,))))
            tensors.append(_tensor(f"{ours}.k_norm", (f"{attn}.k_norm.weight", (dim,))))
        tensors.append(_tensor(f"{ours}.o", (f"{attn}.o_proj.weight", (hidden, q_size))))
        tensors.append(_tensor(f"{ours}.mlp_norm", (f"{theirs}.post_attention_layernorm.weight", (hidden,))))
        if config.num_experts:
            tensors += _experts(config, ours, theirs)
            continue
        tensors.append(
            _tensor(
                f"{ours}.gate_up",
                (f"{mlp}.gate_proj.weight", (inter, hidden)),
                (f"{mlp}.up_proj.weight", (inter, hidden)),
            )
        )
        tensors.append(_tensor(f"{ours}.down", (f"{mlp}.down_proj.weight", (hidden, inter))))
    tensors.append(_tensor("norm", ("model.norm.weight", (hidden,))))
    if not config.tie_word_embeddings:
        tensors.append(_tensor("lm_head", ("lm_head.weight", (config.vocab_size, hidden))))
    return tensors


_EXPERT_NAMES = {
    "mixtral": ("block_sparse_moe", "w1", "w3", "w2"),
    "qwen3_moe": ("mlp", "gate_proj", "up_proj", "down_proj"),
}
"""By architecture: the layer's part, then an expert's gate, up and down."""


def _experts(config: ModelConfig, ours: str, theirs: str) -> list[EngineTensor]:
    """The feed-forward part of a mixture-of-experts layer."""
    hidden, inter, count = config.hidden_size, config.moe_intermediate_size, config.num_experts
    part, gate, up, down = _EXPERT_NAMES[config.architecture]
    each = [f"{theirs}.{part}.experts.{i}" for i in range(count)]
    gate_up = [(f"{expert}.{name}.weight", (inter, hidden)) for expert in each for name in (gate, up)]
    downs = [(f"{expert}.{down}.weight", (hidden, inter)) for expert in each]
    return [
        _tensor(f"{ours}.router", (f"{theirs}.{part}.gate.weight", (count, hidden))),
        _tensor(f"{ours}.experts_gate_up", *gate_up, num_experts=count),
        _tensor(f"{ours}.experts_down", *downs, num_experts=count),
    ]


def _tensor(name: str, *parts: tuple[str, tuple[int, ...]], num_experts: int = 0) -> EngineTensor:
    return EngineTensor(
        name=name, parts=tuple(Part(name=part, shape=shape) for part, shape in parts), num_experts=num_experts
    )
