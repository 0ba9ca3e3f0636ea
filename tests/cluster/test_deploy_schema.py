"""The deploy file: what it accepts, and the one line it answers a mistake with."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from biphase.cluster.deploy_schema import deployment_from, load_deployment, merge, parse_bytes
from biphase.cluster.deployment import Deployment, RolePlan
from biphase.cluster.generation import generation_of
from biphase.cluster.router_places import RouterPlace
from biphase.cluster.wanted import wanted_of
from biphase.protos.errors import SetupError
from biphase.protos.step_time import StepTime

EXAMPLES = sorted(
    path for path in (Path(__file__).parents[2] / "examples").glob("*.yaml") if not path.stem.startswith("policy")
)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_load(path: Path) -> None:
    assert load_deployment(path).model == "smollm2"


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 3


def test_every_key_is_in_the_example_of_every_key() -> None:
    import yaml

    from biphase.cluster.deploy_schema import _DeploymentSchema, _LimitsSchema, _RolePlanSchema, _RouterSchema

    values = yaml.safe_load((EXAMPLES[0].parent / "every_key.yaml").read_text())
    assert set(_DeploymentSchema.model_fields) - set(values) == {"weights_cache"}
    assert set(values["routers"][0]) == set(_RouterSchema.model_fields)
    assert set(values["prefill"]) == set(_RolePlanSchema.model_fields)
    assert set(values["limits"]) == set(_LimitsSchema.model_fields)


def test_defaults_are_the_values_own() -> None:
    assert deployment_from({"model": "m"}, source="here") == Deployment(model="m")


def test_a_full_deployment_survives_json() -> None:
    deployment = deployment_from(
        {
            "model": "m",
            "prefill": {"replicas": 3, "kv_memory": "2GiB", "cpus": 0},
            "decode": {"step_time": {"fixed_ms": 10, "per_token_us": 2000, "per_context_us": 1.5}},
            "limits": {"max_stop_strings": 4},
        },
        source="here",
    )
    assert deployment.prefill == RolePlan(replicas=3, kv_memory_bytes=2 * 2**30, cpus=0)
    assert deployment.decode.step_time == StepTime(fixed_s=0.01, per_token_s=2e-3, per_context_s=1.5e-6, num_steps=1)
    assert deployment.decode.step_time.is_known and not deployment.prefill.step_time.is_known
    assert generation_of(deployment) == generation_of(replace(deployment, decode=RolePlan())), "no instance starts anew"
    assert deployment.limits.max_stop_strings == 4
    assert Deployment.from_json(deployment.to_json()) == deployment


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"model": "m", "prefil": {}}, "here: unknown key prefil: did you mean prefill?"),
        ({"model": "m", "decode": {"kv_memry": 1}}, "here: unknown key decode.kv_memry: did you mean kv_memory?"),
        ({}, "here: key model is missing"),
        ({"modl": "m"}, "here: unknown key modl: did you mean model?"),
        ({"model": ""}, "here: model is empty"),
        ({"model": "m", "port": 70000}, "here: port is 70000: the most is 65535"),
        ({"model": "m", "port": "80"}, "here: port is '80': input should be a valid integer"),
        ({"model": "m", "prefill": {"replicas": -1}}, "here: prefill.replicas is -1: the least is 0"),
        ({"model": "m", "mode": "fast"}, "here: mode is 'fast': it must be 'auto' or 'strict'"),
        ({"model": "m", "decode": {"kv_memory": "2XB"}}, "decode.kv_memory is '2XB': give bytes as a number or with"),
        ({"model": "m", "decode": {"kv_memory": 5}}, "5 bytes is less than the least, 1048576 (1MiB)"),
        ({"model": "m", "decode": 3}, "here: decode is 3: it must be a mapping of replicas, tensor"),
        (
            {"model": "m", "decode": {"step_time": {"fixed": 1}}},
            "here: unknown key decode.step_time.fixed: did you mean fixed_ms?",
        ),
        (
            {"model": "m", "decode": {"step_time": 5}},
            "here: decode.step_time is 5: it must be a mapping of fixed_ms, per_",
        ),
        (
            {"model": "m", "decode": {"step_time": {"fixed_ms": -1}}},
            "here: decode.step_time.fixed_ms is -1: the least is 0",
        ),
        (
            {"model": "m", "decode": {"step_time": {"per_token_us": 200_000.0}}},
            "here: decode.step_time.per_token_us is 200000: the most is 100000",
        ),
        ({"model": "m", "decode": {"step_time": {}}}, "here: decode.step_time is {}: a step that takes no time"),
        ({"model": "m", "name": "A/../b"}, "here: name is 'A/../b': 1 to 63 characters of a-z"),
        ({"model": "m", "start_timeout_s": 0}, "here: start_timeout_s is 0: it must be above 0"),
        ({"model": "m", "decode": {"replicas": 0}}, "decode.replicas is 0: at least 1 decode instance is needed"),
        ({"model": "m", "mode": "strict", "prefill": {"replicas": 0}}, "strict needs at least 1 prefill instance"),
        (
            {"model": "m", "decode": {"gpus": 2.0}},
            "here: decode.gpus is 2: the most is 1, of each rank: an instance of several has tensor_parallel_size",
        ),
        ({"model": "m", "decode": {"tp": 0}}, "here: decode.tensor_parallel_size is 0: the least is 1"),
        ({"model": "m", "prefill": {"pp": 65}}, "here: prefill.pipeline_parallel_size is 65: the most is 64"),
        (
            {"model": "m", "decode": {"tp": 2, "tensor_parallel_size": 2}},
            "here: decode.tp and tensor_parallel_size are the same key, give one of them",
        ),
        (
            {"model": "m", "decode": {"tp": 2, "pp": 2, "gpus": 0.5}},
            "decode.gpus is 0.5 with tp 2 x pp 2: each rank of an instance needs a GPU of its own, give 1, or 0 for",
        ),
        ({"model": "m", "kv_transport": "udp"}, "here: kv_transport is 'udp': it must be 'auto', 'grpc', 'tcp', 'shm'"),
        ({"model": "m", "kv_codec": "zip"}, "here: kv_codec is 'zip': it must be 'raw', 'auto', 'fp8', 'int8' or"),
        ({"model": "m", "device": "cpu", "kv_transport": "cuda_ipc"}, "kv_transport is cuda_ipc with device cpu: it"),
        ({"model": "m", "inject_faults": "drop=2"}, "here: inject_faults: "),
        ({"model": "m", "inject_faults": "dorp=0.1"}, "fault 'dorp=0.1' is none of drop, delay"),
        ({"model": "m", "decode": {"gpus": math.nan}}, "here: decode.gpus is nan: it must be a finite number"),
        ({"model": "m", "drain_s": math.inf}, "here: drain_s is inf: it must be a finite number"),
        ({"model": "m", "device": "gpu"}, "here: device is 'gpu': it must be 'auto', 'cpu' or 'cuda'"),
        ({"model": "m", "device": "cpu", "decode": {"gpus": 0.5}}, "decode.gpus is 0.5 with device cpu: give another"),
        (
            {"model": "m", "device": "cpu", "dtype": "bfloat16"},
            "dtype is bfloat16 with device cpu: the CPU computes in",
        ),
        ({"model": "m", "device": "cuda", "prefill": {"gpus": 0}}, "device is cuda and gpus is 0: give device auto"),
        ({"model": "m", "routers": []}, "here: routers is empty: the least is 1"),
        ({"model": "m", "routers": {}}, "here: routers is {}: input should be a valid list"),
        ({"model": "m", "routers": [{"prot": 1}]}, "here: unknown key routers.0.prot: did you mean port?"),
        ({"model": "m", "routers": [{}, {"port": 70000}]}, "here: routers.1.port is 70000: the most is 65535"),
        ({"model": "m", "routers": [{"port": 12000}]}, "here: routers.0.port is 12000: Ray gives 10002 to 19999"),
        ({"model": "m", "routers": [{"name": "decode-7"}]}, "here: routers.0.name is 'decode-7': prefill, decode,"),
        ({"model": "m", "routers": [{"name": "a", "port": 1}, {"name": "a"}]}, "here: routers: 2 are called 'a'"),
        ({"model": "m", "routers": [{}, {}]}, "here: routers: 2 listen at port 8700 of the head, give each"),
        (
            {"model": "m", "backend": "process", "routers": [{"node": "b"}]},
            "routers.0.node is 'b' with backend process",
        ),
        ({"model": "m", "placement": "far"}, "here: placement is 'far': it must be 'pack', 'spread' or 'near'"),
        ({"model": "m", "limits": {"max_queued_requests": 0}}, "limits.max_queued_requests is 0: it must be above 0"),
    ],
)
def test_a_mistake_is_one_line_with_key_value_and_limit(values: dict[str, Any], line: str) -> None:
    with pytest.raises(SetupError) as caught:
        deployment_from(values, source="here")
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("model: m\nprefill:\n  replicas: 1\n  thraeds: 2\n", ":4: unknown key prefill.thraeds: did you mean threads?"),
        ("model: m\nport: -1\n", ":2: port is -1: the least is 0"),
        ("model: m\n  bad\n: [", "not valid YAML"),
        ("model: m\nmodel: n\n", ":2: not valid YAML: key model is given twice"),
        ("- a\n- b\n", "a deploy file is a mapping of keys"),
        ("", "a deploy file is a mapping of keys"),
        ("model: !!python/object/apply:os.system [ls]\n", "not valid YAML"),
    ],
)
def test_a_bad_file_is_one_line_with_its_place(tmp_path: Path, text: str, line: str) -> None:
    path = tmp_path / "deploy.yaml"
    path.write_text(text)
    with pytest.raises(SetupError) as caught:
        load_deployment(path)
    assert str(caught.value).startswith(str(path))
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_mistake_in_a_list_has_its_line(tmp_path: Path) -> None:
    path = tmp_path / "deploy.yaml"
    path.write_text("model: m\nrouters:\n  - port: 1\n  - prot: 2\n")
    with pytest.raises(SetupError, match=r":4: unknown key routers.1.prot: did you mean port"):
        load_deployment(path)


def test_what_a_router_leaves_out_is_the_deployments() -> None:
    routers = [{"node": "10.0.0.2"}, {"name": "door", "host": "0.0.0.0", "port": 9000}]
    deployment = deployment_from({"model": "m", "host": "10.0.0.1", "routers": routers, "placement": "spread"})
    assert deployment.router_places == (
        RouterPlace(name="router-0", host="10.0.0.1", port=8700, node="10.0.0.2"),
        RouterPlace(name="door", host="0.0.0.0", port=9000),
    )
    assert [wanted.name for wanted in wanted_of(deployment) if wanted.kind == "router"] == ["router-0", "door"]
    assert Deployment.from_json(deployment.to_json()) == deployment


def test_there_is_one_router_by_default() -> None:
    assert Deployment(model="m", port=1).router_places == (RouterPlace(name="router-0", host="127.0.0.1", port=1),)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match=r"nowhere\.yaml: No such file"):
        load_deployment(tmp_path / "nowhere.yaml")


def test_flags_win_over_the_file_key_by_key(tmp_path: Path) -> None:
    path = tmp_path / "deploy.yaml"
    path.write_text("model: m\nprefill: {replicas: 2, threads: 3}\n")
    deployment = load_deployment(path, {"port": 0, "prefill": {"replicas": 1}})
    assert (deployment.port, deployment.prefill.replicas, deployment.prefill.threads) == (0, 1, 3)


def test_short_names_of_a_plan_are_the_long_ones(tmp_path: Path) -> None:
    path = tmp_path / "deploy.yaml"
    path.write_text("model: m\nprefill: {tp: 2}\ndecode:\n  tensor_parallel_size: 4\n  pp: 2\n")
    deployment = load_deployment(path)
    assert [str(plan.parallel) for plan in (deployment.prefill, deployment.decode)] == ["tp 2 x pp 1", "tp 4 x pp 2"]
    assert deployment.num_ranks == 2 + 8
    overridden = load_deployment(path, {"prefill": {"tensor_parallel_size": 1}})
    assert overridden.num_ranks == 1 + 8


def test_a_mistake_under_a_short_name_has_its_line(tmp_path: Path) -> None:
    path = tmp_path / "deploy.yaml"
    path.write_text("model: m\ndecode:\n  replicas: 1\n  pp: -2\n")
    with pytest.raises(SetupError, match=r":4: decode.pipeline_parallel_size is -2: the least is 1"):
        load_deployment(path)


def test_block_sizes_of_the_roles_may_differ() -> None:
    assert deployment_from({"model": "m", "prefill": {"block_size": 16}}).decode.block_size is None


def test_merge_goes_into_mappings() -> None:
    assert merge({"a": {"b": 1, "c": 2}}, {"a": {"b": 3}, "d": 4}) == {"a": {"b": 3, "c": 2}, "d": 4}


@pytest.mark.parametrize(
    ("given", "num_bytes"), [("2GiB", 2**31), ("512 MiB", 2**29), ("1.5gb", 1_500_000_000), (2**20, 2**20)]
)
def test_sizes(given: str | int, num_bytes: int) -> None:
    assert parse_bytes(given) == num_bytes
