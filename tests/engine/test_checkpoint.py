"""What comes out of a checkpoint: every format and family into the same engine tensors."""

import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from support.smollm2 import needs_smollm2
from support.tiny_models import EXPERTS, LAYERS, tiny_config, tiny_weights, write_directory, write_gguf_model

from biphase.engine.checkpoint.layout import engine_tensors
from biphase.engine.checkpoint.opening import Checkpoint, open_checkpoint
from biphase.engine.model_config import FrequencyFactors, LinearScaling, Llama3Scaling, ModelConfig

FAMILIES = ["llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe"]
REFERENCE = Path(__file__).parents[1] / "reference" / "smollm2_greedy.json"


def quiet(detail: str, fraction: float) -> None:
    assert detail and 0.0 <= fraction <= 1.0


def opened(model: Path, cache: Path, dtype: str = "float32") -> Checkpoint:
    return open_checkpoint(str(model), dtype=dtype, cache_dir=cache, progress=quiet)


def fused(weights: dict[str, torch.Tensor], tied: bool = True) -> dict[str, torch.Tensor]:
    """The engine's tensors, built here by hand."""
    tensors = {"embed": weights["model.embed_tokens.weight"], "norm": weights["model.norm.weight"]}
    if not tied:
        tensors["lm_head"] = weights["lm_head.weight"]
    for i in range(LAYERS):
        layer = f"model.layers.{i}"

        def stack(*names: str, layer: str = layer) -> torch.Tensor:
            return torch.cat([weights[f"{layer}.{name}"] for name in names])

        heads = [f"self_attn.{h}_proj" for h in "qkv"]
        tensors[f"layers.{i}.attn_norm"] = stack("input_layernorm.weight")
        tensors[f"layers.{i}.qkv"] = stack(*(f"{h}.weight" for h in heads))
        if f"{layer}.self_attn.q_proj.bias" in weights:
            tensors[f"layers.{i}.qkv_bias"] = stack(*(f"{h}.bias" for h in heads))
        if f"{layer}.self_attn.q_norm.weight" in weights:
            tensors[f"layers.{i}.q_norm"] = stack("self_attn.q_norm.weight")
            tensors[f"layers.{i}.k_norm"] = stack("self_attn.k_norm.weight")
        tensors[f"layers.{i}.o"] = stack("self_attn.o_proj.weight")
        tensors[f"layers.{i}.mlp_norm"] = stack("post_attention_layernorm.weight")
        if f"{layer}.mlp.gate_proj.weight" in weights:
            tensors[f"layers.{i}.gate_up"] = stack("mlp.gate_proj.weight", "mlp.up_proj.weight")
            tensors[f"layers.{i}.down"] = stack("mlp.down_proj.weight")
        else:
            router, gate_up, down = experts(weights, layer)
            tensors[f"layers.{i}.router"] = router
            tensors[f"layers.{i}.experts_gate_up"], tensors[f"layers.{i}.experts_down"] = gate_up, down
    return tensors


def experts(weights: dict[str, torch.Tensor], layer: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Router, gate and up, down; from a file's names or from those in transformers' memory."""
    if f"{layer}.mlp.experts.gate_up_proj" in weights:
        names = ("gate.weight", "experts.gate_up_proj", "experts.down_proj")
        router, gate_up, down = (weights[f"{layer}.mlp.{name}"] for name in names)
        return router, gate_up, down
    mixtral = f"{layer}.block_sparse_moe.gate.weight" in weights
    part = f"{layer}.block_sparse_moe" if mixtral else f"{layer}.mlp"

    def all_of(name: str) -> list[torch.Tensor]:
        return [weights[f"{part}.experts.{i}.{name}.weight"] for i in range(EXPERTS)]

    gate, up, down_name = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
    both = [torch.cat(pair) for pair in zip(all_of(gate), all_of(up), strict=True)]
    return weights[f"{part}.gate.weight"], torch.stack(both), torch.stack(all_of(down_name))


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor.to(found[name].dtype)), name


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_directory(tmp_path: Path, family: str, tied: bool) -> None:
    weights = tiny_weights(family, tied=tied)
    checkpoint = opened(write_directory(tmp_path / "m", tiny_config(family, tied=tied), weights), tmp_path)
    assert_equal(checkpoint.tensors, fused(weights, tied))
    assert checkpoint.config.architecture == family
    assert checkpoint.config.attention_bias is (family == "qwen2")
    assert checkpoint.config.qk_norm is family.startswith("qwen3")
    assert checkpoint.config.norm_topk_prob is (family == "mixtral")
    assert checkpoint.config.num_experts == (EXPERTS if family in ("mixtral", "qwen3_moe") else 0)
    assert checkpoint.config.tie_word_embeddings is tied
    assert len(checkpoint.model_hash) == 16


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_gguf(tmp_path: Path, family: str, tied: bool) -> None:
    weights = tiny_weights(family, tied=tied)
    checkpoint = opened(write_gguf_model(tmp_path / "m.gguf", family, weights), tmp_path)
    assert_equal(checkpoint.tensors, fused(weights, tied))
    assert checkpoint.config.eos_token_ids == (259,)
    assert checkpoint.config.bos_token_id == 258


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_1"])
def test_gguf_types(tmp_path: Path, kind: str) -> None:
    """Quantized in llama.cpp's row order; the values are those of the gguf package's own dequantization."""
    ggml = gguf.GGMLQuantizationType[kind]
    weights = tiny_weights()
    rounded = {
        name: torch.from_numpy(gguf.dequantize(gguf.quantize(w.numpy(), ggml), ggml)).reshape(w.shape)
        if w.ndim == 2
        else w
        for name, w in weights.items()
    }
    checkpoint = opened(write_gguf_model(tmp_path / "m.gguf", "llama", weights, kind=ggml), tmp_path)
    assert_equal(checkpoint.tensors, fused(rounded))


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtypes(tmp_path: Path, stored: torch.dtype, dtype: str) -> None:
    weights = {name: w.to(stored) for name, w in tiny_weights().items()}
    checkpoint = opened(write_directory(tmp_path / "m", tiny_config(), weights), tmp_path, dtype)
    assert {t.dtype for t in checkpoint.tensors.values()} == {getattr(torch, dtype)}
    assert_equal(checkpoint.tensors, fused(weights))


def test_shards_give_the_same_model(tmp_path: Path) -> None:
    weights = tiny_weights(tied=False)
    one = opened(write_directory(tmp_path / "one", tiny_config(tied=False), weights), tmp_path)
    many = opened(write_directory(tmp_path / "many", tiny_config(tied=False), weights, shards=3), tmp_path)
    assert one.model_hash == many.model_hash
    assert_equal(many.tensors, one.tensors)


def test_a_tied_head_in_the_file_is_left_out(tmp_path: Path) -> None:
    weights = tiny_weights()
    stored = weights | {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}
    checkpoint = opened(write_directory(tmp_path / "m", tiny_config(), stored), tmp_path)
    assert_equal(checkpoint.tensors, fused(weights))


def test_tensors_are_aligned(tmp_path: Path) -> None:
    checkpoint = opened(write_directory(tmp_path / "m", tiny_config(), tiny_weights()), tmp_path)
    assert all(t.data_ptr() % 64 == 0 and t.is_contiguous() for t in checkpoint.tensors.values())


def test_odd_sizes_keep_their_element_alignment(tmp_path: Path) -> None:
    weights = tiny_weights()
    weights["model.embed_tokens.weight"] = torch.randn(261, 32)
    checkpoint = opened(write_directory(tmp_path / "m", tiny_config(vocab_size=261), weights), tmp_path, "bfloat16")
    assert_equal(checkpoint.tensors, fused(weights))


Change = Callable[[dict[str, Any], dict[str, torch.Tensor]], None]


def change_theta(config: dict[str, Any], weights: dict[str, torch.Tensor]) -> None:
    config["rope_theta"] = 20000.0


def change_first(config: dict[str, Any], weights: dict[str, torch.Tensor]) -> None:
    weights["model.layers.1.mlp.down_proj.weight"][0, 0] += 1


def change_last(config: dict[str, Any], weights: dict[str, torch.Tensor]) -> None:
    weights["model.embed_tokens.weight"][-1, -1] += 1


def swap_names(config: dict[str, Any], weights: dict[str, torch.Tensor]) -> None:
    gate, up = "model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.up_proj.weight"
    weights[gate], weights[up] = weights[up], weights[gate]


@pytest.mark.parametrize("change", [change_theta, change_first, change_last, swap_names])
def test_the_hash_tells_models_apart(tmp_path: Path, change: Change) -> None:
    config, weights = tiny_config(), tiny_weights()
    before = opened(write_directory(tmp_path / "a", config, weights), tmp_path)
    change(config, weights)
    after = opened(write_directory(tmp_path / "b", config, weights), tmp_path)
    assert before.model_hash != after.model_hash


def test_the_hash_is_the_same_in_every_dtype_and_place(tmp_path: Path) -> None:
    weights = tiny_weights()
    first = opened(write_directory(tmp_path / "a", tiny_config(), weights), tmp_path / "c")
    second = opened(write_directory(tmp_path / "b", tiny_config(), weights), tmp_path / "d", "bfloat16")
    assert first.model_hash == second.model_hash


def config_of(tmp_path: Path, **changes: Any) -> ModelConfig:
    family = changes.pop("family", "llama")
    folder = write_directory(tmp_path / "m", tiny_config(family, **changes), tiny_weights(family))
    return opened(folder, tmp_path).config


def test_llama3_rope(tmp_path: Path) -> None:
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    config = config_of(tmp_path, rope_theta=500000.0, rope_scaling=scaling | {"rope_type": "llama3"})
    assert config.rope.theta == 500000.0
    assert config.rope.scaling == Llama3Scaling(**scaling)  # type: ignore[arg-type]


def test_rope_parameters_of_newer_files(tmp_path: Path) -> None:
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 77.0}
    config = config_of(tmp_path, rope_parameters=rope, rope_theta=None)
    assert (config.rope.theta, config.rope.scaling) == (77.0, LinearScaling(factor=2.0))


def test_gguf_rope_factors(tmp_path: Path) -> None:
    factors = np.array([1, 1, 1, 2, 4, 8, 8, 8], dtype=np.float32)
    path = write_gguf_model(tmp_path / "m.gguf", "llama", tiny_weights(), extra={"rope_freqs.weight": factors})
    assert opened(path, tmp_path).config.rope.scaling == FrequencyFactors(factors=tuple(factors.tolist()))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"family": "mistral", "sliding_window": 128}, 128),
        ({"family": "mistral", "sliding_window": None}, None),
        ({"family": "mistral"}, 4096),
        ({"family": "llama", "sliding_window": 128}, None),
        ({"family": "qwen2", "sliding_window": 128, "use_sliding_window": False}, None),
        ({"family": "qwen2", "sliding_window": 128, "use_sliding_window": True, "max_window_layers": 2}, None),
        ({"family": "qwen3", "sliding_window": 128, "use_sliding_window": True, "max_window_layers": 0}, 128),
    ],
)
def test_sliding_window(tmp_path: Path, changes: dict[str, Any], expected: int | None) -> None:
    assert config_of(tmp_path, **changes).sliding_window == expected


def test_generation_config_names_the_eos_tokens(tmp_path: Path) -> None:
    folder = write_directory(tmp_path / "m", tiny_config(), tiny_weights())
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9, 7]}))
    assert opened(folder, tmp_path).config.eos_token_ids == (7, 9)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_transformers_saves(tmp_path: Path, family: str) -> None:
    """A model built and saved by transformers itself, whatever its release writes into config.json."""
    transformers = pytest.importorskip("transformers", reason="the independent writer")
    keys = tiny_config(family)
    keys = {k: v for k, v in keys.items() if k not in ("model_type", "rope_theta", "hidden_act")}
    config = transformers.AutoConfig.for_model(family, **keys)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "m", max_shard_size="40KB")
    checkpoint = opened(tmp_path / "m", tmp_path)
    weights = {name: value for name, value in model.state_dict().items() if name != "lm_head.weight"}
    assert (tmp_path / "m" / "model.safetensors.index.json").is_file()
    assert_equal(checkpoint.tensors, fused(weights))
    assert checkpoint.config.rope.theta == (1e6 if family == "mixtral" else 1e4)


def test_layout_lists_every_shape(tmp_path: Path) -> None:
    checkpoint = opened(write_directory(tmp_path / "m", tiny_config("qwen2"), tiny_weights("qwen2")), tmp_path)
    assert {t.name: t.shape for t in engine_tensors(checkpoint.config)} == {
        name: tuple(tensor.shape) for name, tensor in checkpoint.tensors.items()
    }


@needs_smollm2
def test_smollm2_weights_are_those_of_the_reference(tmp_path: Path) -> None:
    """Bit for bit what the independent reader of tests/reference made of the same file."""
    checkpoint = open_checkpoint("smollm2", dtype="float32", cache_dir=tmp_path, progress=quiet)
    sizes = {"q_proj": 576, "k_proj": 192, "v_proj": 192, "gate_proj": 1536, "up_proj": 1536}
    gguf_order: dict[str, tuple[str, torch.Tensor]] = {
        "output_norm": ("model.norm", checkpoint.tensors["norm"]),
        "token_embd": ("model.embed_tokens", checkpoint.tensors["embed"]),
    }
    for i in range(30):
        qkv = checkpoint.tensors[f"layers.{i}.qkv"].split([sizes[f"{h}_proj"] for h in "qkv"])
        gate, up = checkpoint.tensors[f"layers.{i}.gate_up"].split([1536, 1536])
        parts = {
            "attn_norm": ("input_layernorm", checkpoint.tensors[f"layers.{i}.attn_norm"]),
            "attn_q": ("self_attn.q_proj", qkv[0]),
            "attn_k": ("self_attn.k_proj", qkv[1]),
            "attn_v": ("self_attn.v_proj", qkv[2]),
            "attn_output": ("self_attn.o_proj", checkpoint.tensors[f"layers.{i}.o"]),
            "ffn_norm": ("post_attention_layernorm", checkpoint.tensors[f"layers.{i}.mlp_norm"]),
            "ffn_gate": ("mlp.gate_proj", gate),
            "ffn_up": ("mlp.up_proj", up),
            "ffn_down": ("mlp.down_proj", checkpoint.tensors[f"layers.{i}.down"]),
        }
        gguf_order |= {f"blk.{i}.{ggml}": (f"model.layers.{i}.{name}", t) for ggml, (name, t) in parts.items()}
    digest = hashlib.sha256()
    for key in sorted(gguf_order, key=lambda stem: f"{stem}.weight"):
        name, tensor = gguf_order[key]
        digest.update(f"{name}.weight".encode() + tensor.contiguous().numpy().tobytes())
    assert digest.hexdigest() == json.loads(REFERENCE.read_text(encoding="utf-8"))["header"]["weights_sha256"]


@needs_smollm2
def test_smollm2_second_start_converts_nothing(tmp_path: Path) -> None:
    seen: list[float] = []
    first_s = second_s = 0.0
    for _ in range(2):
        first_s, started_s = second_s, time.perf_counter()
        seen.append(-1.0)
        open_checkpoint("smollm2", dtype="float32", cache_dir=tmp_path, progress=lambda _, done: seen.append(done))
        second_s = time.perf_counter() - started_s
    assert seen[0] == seen[-1] == -1.0 and seen[1] == 0.0 and seen[-2] == 1.0
    assert second_s < first_s / 4
