"""What every instance would refuse at its start is refused before anything starts or drains."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.dummy_directory import write_dummy_directory

from biphase.cluster.deployment import Deployment, RolePlan
from biphase.cluster.model_checks import check_model
from biphase.cluster.policy_source import check_counts
from biphase.engine.checkpoint import hf_config
from biphase.engine.model_config import ModelConfig
from biphase.protos.errors import SetupError

TOKEN_BYTES = 4 * 2 * 2 * 16 * 4
"""Of the test's model: layers, K and V, KV heads, dim, float32."""
NEEDED = 512 * TOKEN_BYTES


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    return hf_config.config_of(write_dummy_directory(tmp_path_factory.mktemp("model")) / "config.json")


def deployment(*, kv_memory_bytes: int | None = None, device: str = "cpu", **values: Any) -> Deployment:
    plan = RolePlan(kv_memory_bytes=kv_memory_bytes)
    return Deployment(**{"model": "m", "device": device, "prefill": RolePlan(), "decode": plan, **values})  # type: ignore[arg-type]


def test_kv_memory_that_holds_one_request_to_the_byte(config: ModelConfig) -> None:
    check_model(deployment(kv_memory_bytes=NEEDED), config)
    wanted = f"decode: kv_memory is {NEEDED - 1} bytes, one request of max_model_len 512 needs {NEEDED}: give more"
    with pytest.raises(SetupError, match=wanted):
        check_model(deployment(kv_memory_bytes=NEEDED - 1), config)


@pytest.mark.parametrize(
    ("values", "needed"),
    [
        ({"max_model_len": 256}, NEEDED // 2),
        ({"max_model_len": 250}, NEEDED // 2),  # whole blocks of 32
        ({"dtype": "bfloat16", "device": "auto"}, NEEDED // 2),
        ({"kv_dtype": "float8_e4m3fn", "device": "auto"}, NEEDED // 4),
        ({"device": "cuda"}, NEEDED // 2),
        ({"device": "auto"}, NEEDED // 2),
    ],
    ids=repr,
)
def test_what_a_pool_takes_less_by(config: ModelConfig, values: dict[str, Any], needed: int) -> None:
    check_model(deployment(kv_memory_bytes=needed, **values), config)
    with pytest.raises(SetupError, match=f"needs {needed}:"):
        check_model(deployment(kv_memory_bytes=needed - 1, **values), config)


def test_a_host_without_gpus_leaves_no_doubt(config: ModelConfig) -> None:
    with pytest.raises(SetupError, match=f"needs {NEEDED}:"):
        check_model(deployment(kv_memory_bytes=NEEDED // 2, device="auto"), config, may_have_gpus=False)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"dtype": "bfloat16"}, "prefill: dtype 'bfloat16' is not supported on cpu; there is: float32"),
        ({"kv_dtype": "float8_e4m3fn", "device": "auto"}, "prefill: kv_dtype 'float8_e4m3fn' is not supported on cpu"),
        ({"kv_dtype": "float16", "dtype": "bfloat16", "device": "cuda"}, "prefill: kv_dtype is 'float16', with dtype"),
        ({"prefill": RolePlan(block_size=48), "device": "cuda"}, "prefill: block_size is 48, on a GPU it is one of"),
    ],
    ids=repr,
)
def test_types_that_no_instance_could_compute_in(config: ModelConfig, values: dict[str, Any], reason: str) -> None:
    with pytest.raises(SetupError, match=reason):
        check_model(deployment(**values), config, may_have_gpus=False)


def test_ranks_share_what_a_request_takes(config: ModelConfig) -> None:
    plan = RolePlan(kv_memory_bytes=NEEDED // 4, tensor_parallel_size=2, pipeline_parallel_size=2)
    check_model(deployment(decode=plan), config)
    with pytest.raises(SetupError, match="decode: kv_memory is"):
        check_model(deployment(decode=replace(plan, kv_memory_bytes=NEEDED // 4 - 1)), config)


def test_a_role_without_instances_needs_nothing(config: ModelConfig) -> None:
    check_model(deployment(prefill=RolePlan(replicas=0, kv_memory_bytes=1)), config)


def test_a_context_beyond_the_models(config: ModelConfig) -> None:
    with pytest.raises(SetupError, match="max_model_len is 513, the model's limit is 512"):
        check_model(deployment(max_model_len=513), config)


def test_a_plan_that_the_model_cannot_be_cut_by(config: ModelConfig) -> None:
    with pytest.raises(SetupError, match="^decode: "):
        check_model(deployment(decode=RolePlan(tensor_parallel_size=3)), config)


POLICY = '{"gpu_budget": {"max": 3}, "decode": {"min_replicas": 2, "max_replicas": 2}%s}'


@pytest.mark.parametrize(("prefill", "decode"), [(1, 2), (1, 1)])
def test_counts_that_a_policy_can_begin_with(prefill: int, decode: int) -> None:
    counts = {"prefill": RolePlan(replicas=prefill), "decode": RolePlan(replicas=decode)}
    check_counts(deployment(autoscale=POLICY % "", **counts))


@pytest.mark.parametrize(
    ("prefill", "decode", "reason"),
    [
        (1, 3, "decode is 3, more than decode.max_replicas 2 of the policy"),
        (2, 2, "2P:2D takes 4 GPUs, more than gpu_budget.max 3 of the policy"),
    ],
)
def test_counts_that_a_policy_would_take_back(prefill: int, decode: int, reason: str) -> None:
    counts = {"prefill": RolePlan(replicas=prefill), "decode": RolePlan(replicas=decode)}
    with pytest.raises(SetupError, match=reason):
        check_counts(deployment(autoscale=POLICY % "", **counts))
    check_counts(deployment(autoscale=POLICY % ', "dry_run": true', **counts))


def test_without_a_policy_any_counts_do(tmp_path: Path) -> None:
    check_counts(deployment(decode=RolePlan(replicas=99)))
