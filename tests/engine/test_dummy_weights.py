"""Dummy weights: any configuration into a model that depends on seed, names and indices alone."""

import json
import math
from pathlib import Path

import pytest
import torch
from support.tiny_models import tiny_config, tiny_weights, write_gguf_model

from biphase.engine.checkpoint.dummy import dummy_config, dummy_hash, dummy_tensor, dummy_tensors
from biphase.engine.checkpoint.layout import engine_tensors
from biphase.engine.checkpoint.opening import Checkpoint, open_checkpoint
from biphase.engine.config import EngineConfig
from biphase.engine.engine import Engine
from biphase.engine.step import SeqStep, StepPlan
from biphase.protos.errors import SetupError
from biphase.protos.ids import BlockId, SeqId
from biphase.protos.values import Sampling

CPU = torch.device("cpu")
CONFIGS = Path(__file__).parents[2] / "bench" / "configs"
FAMILIES = ["llama", "mixtral", "qwen2", "qwen3_moe"]


def write_config(folder: Path, family: str = "llama") -> Path:
    path = folder / f"{family}.json"
    path.write_text(json.dumps(tiny_config(family)))
    return path


def opened(model: Path, dtype: str = "float32") -> Checkpoint:
    return open_checkpoint(
        str(model), dtype=dtype, cache_dir=None, progress=lambda detail, done: None, load_format="dummy"
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_of_every_family(tmp_path: Path, family: str) -> None:
    made = opened(write_config(tmp_path, family))
    planned = engine_tensors(made.config)
    assert {tensor.name: tensor.shape for tensor in planned} == {n: tuple(t.shape) for n, t in made.tensors.items()}
    for name, tensor in made.tensors.items():
        if name.endswith("norm"):
            assert bool((tensor == 1).all())
        elif tensor.numel() > 1000:
            assert tensor.std() == pytest.approx(0.02, rel=0.1) and abs(tensor.mean()) < 0.003, name
    embed, qkv = made.tensors["embed"].flatten(), made.tensors["layers.0.qkv"].flatten()
    assert not torch.equal(embed[:50], qkv[:50])
    assert not torch.equal(qkv, made.tensors["layers.1.qkv"].flatten())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_smaller_dtype_is_the_rounded_model(tmp_path: Path, dtype: str) -> None:
    config = write_config(tmp_path)
    exact, rounded = opened(config), opened(config, dtype)
    for name, tensor in exact.tensors.items():
        assert torch.equal(rounded.tensors[name], tensor.to(getattr(torch, dtype)))
    assert exact.model_hash == rounded.model_hash


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_slice_is_made_alone(axis: int, tmp_path: Path) -> None:
    config = dummy_config(str(write_config(tmp_path, "mixtral")))
    tensor = next(t for t in engine_tensors(config) if t.name == "layers.1.experts_down")
    whole = dummy_tensor(tensor, torch.bfloat16, CPU)
    part = slice(2, 5) if axis == 0 else slice(13, 30)
    cut = whole[tuple(slice(None) if i != axis else part for i in range(3))]
    assert torch.equal(dummy_tensor(tensor, torch.bfloat16, CPU, axis=axis, part=part), cut)


def test_the_seed_and_the_configuration_make_the_model(tmp_path: Path) -> None:
    config = dummy_config(str(write_config(tmp_path)))
    again, other = (dummy_tensors(config, torch.float32, CPU, lambda *_: None, seed=seed) for seed in (0, 1))
    assert torch.equal(opened(tmp_path / "llama.json").tensors["embed"], again["embed"])
    assert not torch.equal(other["embed"], again["embed"])
    hashes = {dummy_hash(config), dummy_hash(config, seed=1), opened(write_config(tmp_path, "qwen2")).model_hash}
    assert len(hashes) == 3


def test_the_configuration_of_a_gguf_file(tmp_path: Path) -> None:
    path = write_gguf_model(tmp_path / "m.gguf", "llama", tiny_weights())
    assert opened(path).tensors["layers.0.gate_up"].shape == (128, 32)


@pytest.mark.parametrize(
    ("name", "billions"), [("llama-3-8b", 8.03), ("qwen3-8b", 8.19), ("mixtral-8x7b", 46.70)], ids=str
)
def test_configurations_of_the_bench(name: str, billions: float) -> None:
    tensors = engine_tensors(dummy_config(str(CONFIGS / f"{name}.json")))
    assert sum(math.prod(tensor.shape) for tensor in tensors) / 1e9 == pytest.approx(billions, abs=0.005)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "broken JSON"), ('{"model_type": "gpt2"}', "architecture 'gpt2' is not supported"), (None, "no such file")],
)
def test_what_is_no_configuration(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "config.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SetupError) as caught:
        opened(path)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_an_engine_runs_it(tmp_path: Path, family: str) -> None:
    model = str(write_config(tmp_path, family))
    config = EngineConfig(
        model=model, load_format="dummy", device="cpu", block_size=8, num_kv_blocks=8, max_model_len=64, threads=1
    )
    drawn = []
    for _ in range(2):
        engine = Engine.load(config, lambda detail, done: None)
        step = SeqStep(
            seq_id=SeqId(0), token_ids=list(range(3, 19)), start=0, blocks=[BlockId(1), BlockId(0)], sampling=Sampling()
        )
        drawn.append(engine.launch(StepPlan(seqs=(step,))).wait().tokens)
    assert drawn[0] == drawn[1] and drawn[0][0] is not None


def test_unknown_format() -> None:
    with pytest.raises(ValueError, match="^load_format 'gguf' is not supported; there are: auto, dummy$"):
        EngineConfig(model="m", load_format="gguf")
