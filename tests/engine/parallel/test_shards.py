"""A rank's part of a checkpoint: from a file or made up, the same slices of the whole; together they are the whole."""

import json
from pathlib import Path

import pytest
import torch
from support.tiny_models import tiny_config, tiny_weights, write_directory

from biphase.engine.checkpoint.dummy import dummy_config
from biphase.engine.checkpoint.layout import engine_tensors
from biphase.engine.checkpoint.opening import Checkpoint, open_checkpoint
from biphase.engine.checkpoint.shard import Cut, Shard
from biphase.engine.model_config import ModelConfig
from biphase.engine.parallel.local_config import layer_marks
from biphase.protos.errors import SetupError
from biphase.protos.parallel_plan import ParallelPlan

PLANS = [ParallelPlan(tp=2), ParallelPlan(pp=2), ParallelPlan(tp=4, pp=2)]
FAMILIES = ["llama", "mixtral", "qwen2", "qwen3"]


def opened(model: Path, shard: Shard | None = None, load_format: str = "auto") -> Checkpoint:
    return open_checkpoint(
        str(model),
        dtype="float32",
        cache_dir=model.parent / "cache",
        progress=lambda detail, done: None,
        load_format=load_format,
        shard=shard,
    )


def sizes(family: str) -> dict[str, int]:
    return {"num_local_experts": 4} if family == "mixtral" else {}


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """tiny_models' experts are five, which nothing divides: a file's are left out here."""
    family = request.param
    weights = tiny_weights(family, tied=False)
    weights = {name: tensor for name, tensor in weights.items() if "experts.4" not in name}
    weights = {name: tensor[:4] if "moe.gate" in name else tensor for name, tensor in weights.items()}
    return write_directory(tmp_path / family, tiny_config(family, tied=False, **sizes(family)), weights)


def sliced(tensor: torch.Tensor, cut: Cut) -> torch.Tensor:
    return torch.cat([tensor.index_select(cut.axis, torch.tensor(list(run))) for run in cut.runs], dim=cut.axis)


@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("load_format", ["auto", "dummy"])
def test_a_rank_loads_its_slices_and_nothing_else(model: Path, plan: ParallelPlan, load_format: str) -> None:
    whole = opened(model, load_format=load_format)
    for rank in range(plan.num_ranks):
        shard = Shard(plan=plan, rank=rank)
        part = opened(model, shard, load_format)
        assert (part.config, part.model_hash) == (whole.config, whole.model_hash)
        cuts = {cut.name: cut for cut in shard.cuts(whole.config)}
        assert part.tensors.keys() == cuts.keys()
        for name, tensor in part.tensors.items():
            assert tensor.is_contiguous()
            assert torch.equal(tensor, sliced(whole.tensors[cuts[name].tensor.name], cuts[name])), name


def test_whole_tensors_and_runs_of_rows_stay_in_the_mapped_file(tmp_path: Path) -> None:
    """Ranks of a host share what they can, and what one rank has to itself is no more than its part."""
    model = write_directory(tmp_path / "m", tiny_config(tied=False), tiny_weights(tied=False))
    for rank in (0, 1):
        found = opened(model, Shard(plan=ParallelPlan(tp=2), rank=rank)).tensors
        mapped = {name for name, tensor in found.items() if not tensor.untyped_storage().resizable()}
        assert mapped == {
            "embed",
            "lm_head",
            "norm",
            *(f"layers.{i}.{n}_norm" for i in (0, 1) for n in ("attn", "mlp")),
        }


def config_of(tmp_path: Path, family: str, **changes: int | bool) -> ModelConfig:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(tiny_config(family) | changes))
    return dummy_config(str(path))


@pytest.mark.parametrize("family", [*FAMILIES, "qwen3_moe"])
@pytest.mark.parametrize("plan", [*PLANS, ParallelPlan(tp=2, pp=2)], ids=str)
def test_every_element_has_a_rank_and_only_kv_heads_and_whole_tensors_have_several(
    tmp_path: Path, family: str, plan: ParallelPlan
) -> None:
    experts = {"mixtral": {"num_local_experts": 4}, "qwen3_moe": {"num_experts": 4}}.get(family, {})
    config = config_of(tmp_path, family, tie_word_embeddings=False, **experts)
    counts = {tensor.name: [0] * max(tensor.shape) for tensor in engine_tensors(config)}
    whole = set()
    for rank in range(plan.num_ranks):
        for cut in Shard(plan=plan, rank=rank).cuts(config):
            if cut.is_whole and plan.tp > 1:
                whole.add(cut.name.rpartition(".")[2])
            for run in cut.runs:
                for index in run:
                    counts[cut.tensor.name][index] += 1
    assert whole == (
        set()
        if plan.tp == 1
        else {"norm", "attn_norm", "mlp_norm"}
        | ({"q_norm", "k_norm"} if config.qk_norm else set())
        | ({"router"} if config.num_experts else set())
    )
    kv_rows = range(config.num_heads * config.head_dim, (config.num_heads + 2 * config.num_kv_heads) * config.head_dim)
    for tensor in engine_tensors(config):
        kind = tensor.name.rpartition(".")[2]
        for index, count in enumerate(counts[tensor.name]):
            replicated = kind.startswith("qkv") and index in kv_rows
            copies = plan.tp // config.num_kv_heads if replicated and plan.tp > config.num_kv_heads else 1
            expected = plan.tp if kind in whole else copies
            assert count in (expected, 0), tensor.name
        assert set(counts[tensor.name][: max(tensor.shape)]) - {0}, tensor.name


def test_a_tied_head_is_the_embedding_of_the_last_stage_too(tmp_path: Path) -> None:
    config = config_of(tmp_path, "llama")
    plan = ParallelPlan(tp=2, pp=2)
    has = [{cut.name for cut in Shard(plan=plan, rank=rank).cuts(config)} for rank in range(4)]
    assert ["embed" in names for names in has] == [True] * 4
    assert ["norm" in names for names in has] == [False, False, True, True]
    vocabulary = [Shard(plan=plan, rank=rank).vocabulary(config) for rank in range(2)]
    assert vocabulary == [range(130), range(130, 260)]


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (ParallelPlan(tp=3), r"m: tensor_parallel_size 3 does not divide the model's 4 attention heads"),
        (ParallelPlan(pp=3), r"m: pipeline_parallel_size 3 is more than the model's 2 layers"),
    ],
)
@pytest.mark.parametrize("load_format", ["auto", "dummy"])
def test_a_plan_is_refused_before_weights_are_read(
    tmp_path: Path, plan: ParallelPlan, message: str, load_format: str
) -> None:
    model = write_directory(tmp_path / "m", tiny_config(), tiny_weights())
    with pytest.raises(SetupError, match=message):
        opened(model, Shard(plan=plan, rank=0), load_format)
    assert not (tmp_path / "cache").exists()


def test_a_step_tells_about_four_times_how_far_it_is() -> None:
    assert [sorted(layer_marks(count)) for count in (1, 3, 4, 8)] == [[1], [1, 2, 3], [1, 2, 3, 4], [2, 4, 6, 8]]
    assert sorted(layer_marks(30)) == [8, 16, 24, 30] and sorted(layer_marks(5)) == [1, 2, 3, 4, 5]
