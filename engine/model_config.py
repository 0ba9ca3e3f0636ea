"""What a model is, in numbers. Plain frozen dataclasses: no torch, no files.

Rotary convention everywhere: Hugging Face's (a head's first half is rotated against its second half).
"""

import json
import math
from dataclasses import asdict, dataclass
from typing import Any

SUPPORTED_ARCHITECTURES = ("llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe")


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearScaling:
    """Every position divided by ``factor``."""

    factor: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Llama3Scaling:
    """Llama 3.x: long wavelengths divided by ``factor``, short ones kept, those between blended."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FrequencyFactors:
    """Each inverse frequency divided by its own factor (GGUF's ``rope_freqs.weight``); rotary_dim / 2 of them."""

    factors: tuple[float, ...]


RopeScaling = Llama3Scaling | LinearScaling | FrequencyFactors
_SCALINGS: dict[str, type[RopeScaling]] = {
    "llama3": Llama3Scaling,
    "linear": LinearScaling,
    "factors": FrequencyFactors,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding over the first ``rotary_dim`` elements of a head."""

    theta: float
    scaling: RopeScaling | None
    rotary_dim: int

    def inverse_frequencies(self) -> list[float]:
        """rotary_dim / 2 angles per position, in radians, scaling applied; element i turns the pair (i, i + dim/2)."""
        plain = [self.theta ** (-2 * i / self.rotary_dim) for i in range(self.rotary_dim // 2)]
        match self.scaling:
            case None:
                return plain
            case LinearScaling(factor=factor):
                return [f / factor for f in plain]
            case FrequencyFactors(factors=factors):
                return [f / factor for f, factor in zip(plain, factors, strict=True)]
            case Llama3Scaling() as scaling:
                return [_llama3(f, scaling) for f in plain]


def _llama3(frequency: float, scaling: Llama3Scaling) -> float:
    """One frequency by Llama 3.1's rule (Meta's reference code, ``apply_scaling``)."""
    turns = scaling.original_max_position_embeddings * frequency / (2 * math.pi)
    if turns < scaling.low_freq_factor:
        return frequency / scaling.factor
    if turns > scaling.high_freq_factor:
        return frequency
    blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    return (1 - blend) * frequency / scaling.factor + blend * frequency


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A decoder-only transformer: RMS norm, rotary attention with grouped heads, gated SiLU feed-forward.

    ``num_experts`` 0: one feed-forward part of ``intermediate_size`` in each layer. Else each layer has that many of
    ``moe_intermediate_size`` (``intermediate_size`` says nothing then); a token takes the ``num_experts_per_tok`` of
    the highest softmax, weighted by it, divided by the sum over those taken where ``norm_topk_prob`` says so.
    ``attention_bias``: q, k and v have biases (qwen2). ``qk_norm``: q and k heads are RMS-normalised before the
    rotation (qwen3). ``sliding_window``: a token sees itself and the window - 1 tokens before it; None: all.
    ``tie_word_embeddings``: the output head is the embedding; there is no ``lm_head`` tensor.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RopeConfig
    max_position_embeddings: int
    tie_word_embeddings: bool
    attention_bias: bool = False
    qk_norm: bool = False
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    norm_topk_prob: bool = False
    sliding_window: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None

    def __post_init__(self) -> None:
        """Raises ValueError naming the field and its bound."""
        if self.architecture not in SUPPORTED_ARCHITECTURES:
            raise ValueError(f"architecture {self.architecture!r} is not one of {', '.join(SUPPORTED_ARCHITECTURES)}")
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "max_position_embeddings",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, must be at least 1")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}")
        if self.num_experts < 0:
            raise ValueError(f"num_experts is {self.num_experts}, must be at least 0")
        if self.num_experts and self.moe_intermediate_size < 1:
            raise ValueError(f"moe_intermediate_size is {self.moe_intermediate_size}, must be at least 1")
        if self.num_experts and not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ValueError(
                f"num_experts_per_tok is {self.num_experts_per_tok}, must be in 1 .. num_experts {self.num_experts}"
            )
        if self.rope.rotary_dim % 2 or not 0 < self.rope.rotary_dim <= self.head_dim:
            raise ValueError(f"rotary_dim {self.rope.rotary_dim} must be even and in 2 .. head_dim {self.head_dim}")
        if (
            isinstance(self.rope.scaling, FrequencyFactors)
            and 2 * len(self.rope.scaling.factors) != self.rope.rotary_dim
        ):
            raise ValueError(
                f"{len(self.rope.scaling.factors)} rope frequency factors for rotary_dim {self.rope.rotary_dim}"
            )
        for name, value in (("rms_norm_eps", self.rms_norm_eps), ("rope theta", self.rope.theta)):
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} is {value}, must be above 0")
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ValueError(f"sliding_window is {self.sliding_window}, must be at least 1")
        for token in (*self.eos_token_ids, *(() if self.bos_token_id is None else (self.bos_token_id,))):
            if not 0 <= token < self.vocab_size:
                raise ValueError(f"special token id {token} is outside the vocabulary of {self.vocab_size}")

    def to_json(self) -> str:
        """One canonical line; ``from_json`` reads it back. Part of the model hash."""
        fields = asdict(self)
        if self.rope.scaling is not None:
            kind = next(kind for kind, cls in _SCALINGS.items() if isinstance(self.rope.scaling, cls))
            fields["rope"]["scaling"]["kind"] = kind
        return json.dumps(fields, sort_keys=True, separators=(",", ":"))

    @staticmethod
    def from_json(text: str) -> "ModelConfig":
        """Inverse of ``to_json``. Raises ValueError, KeyError or TypeError on anything else."""
        fields: dict[str, Any] = json.loads(text)
        rope = fields.pop("rope")
        scaling = rope.pop("scaling")
        if scaling is not None:
            cls = _SCALINGS[scaling.pop("kind")]
            if cls is FrequencyFactors:
                scaling["factors"] = tuple(scaling["factors"])
            rope["scaling"] = cls(**scaling)
        else:
            rope["scaling"] = None
        fields["eos_token_ids"] = tuple(fields["eos_token_ids"])
        return ModelConfig(rope=RopeConfig(**rope), **fields)
