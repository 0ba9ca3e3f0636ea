"""The cluster files that people copy: each is what Ray, KubeRay and `biphase` take, key by key and flag by flag."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from biphase.cluster.cli import make_parser
from biphase.cluster.deploy_schema import deployment_from, load_deployment
from biphase.cluster.down_command import ClusterFile
from biphase.cluster.ray_growth import growth_of
from biphase.cluster.router_places import RAY_WORKER_PORTS
from biphase.protos.errors import SetupError

FILES = Path(__file__).parents[2] / "cluster" / "ray"
CLUSTERS = [FILES / f"{name}.yaml" for name in ("local", "aws", "gcp")]
STARTS = ("head_start_ray_commands", "worker_start_ray_commands")


def load(path: Path) -> dict[str, Any]:
    values = yaml.safe_load(path.read_text())
    assert isinstance(values, dict)
    return values


def commands(values: dict[str, Any], *keys: str) -> list[list[str]]:
    """Every command of a cluster file as words, without what is set before it."""
    found = []
    for key in keys or STARTS:
        for line in values[key]:
            for part in re.split(r"[;|&]+ ?", re.sub(r"\$\((?:[^()]|\([^()]*\))*\)", "ADDRESS", line)):
                words = shlex.split(part)
                while words and re.fullmatch(r"[A-Za-z_]\w*=.*", words[0]):
                    del words[0]
                found += [words] if words else []
    return found


@pytest.mark.ray
@pytest.mark.parametrize("path", CLUSTERS, ids=lambda path: path.stem)
def test_ray_takes_every_key(path: Path) -> None:
    import ray.autoscaler
    from ray.autoscaler._private.util import prepare_config, validate_config

    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    values = load(path)
    validate_config(prepare_config(values))
    mine = {"min_workers"} if path.stem == "local" else set()  # Ray moves it to the one kind of node there is
    assert set(values) <= set(schema["properties"]) | mine


@pytest.mark.ray
@pytest.mark.parametrize("path", CLUSTERS, ids=lambda path: path.stem)
def test_every_flag_of_ray_start_exists(path: Path) -> None:
    from ray.scripts.scripts import start

    known = {flag for option in start.params for flag in option.opts}
    starts = [words for words in commands(load(path)) if words[:2] == ["ray", "start"]]
    assert len(starts) == 2
    for words in starts:
        assert {word.partition("=")[0] for word in words if word.startswith("--")} <= known
        assert any(word.startswith("--node-ip-address=") for word in words), "the private address, bound explicitly"


@pytest.mark.parametrize("path", CLUSTERS, ids=lambda path: path.stem)
def test_the_head_brings_biphase_up(path: Path) -> None:
    values = load(path)
    (serve,) = [words for words in commands(values, STARTS[0]) if words[0] == "biphase"]
    arguments = make_parser().parse_args(serve[1:])
    assert (arguments.run, arguments.detach) == ("serve", True)
    assert arguments.wait >= 60.0
    assert arguments.deploy_file in values["file_mounts"]
    for key in STARTS:
        assert all("RAY_AUTH_MODE=token" in line for line in values[key] if "ray start" in line or "biphase" in line)
        assert values[key][0] == "ray stop"
    assert "~/.ray/auth_token" in values["file_mounts"], "Ray reads the token there"
    assert "--include-dashboard=true" in " ".join(values[STARTS[0]]), "`ray job submit` needs it"
    assert any(".whl" in line for line in values["setup_commands"])


def test_the_local_one_turns_autoscaler_v2_off_at_ray_start_itself() -> None:
    (line,) = [line for line in load(FILES / "local.yaml")[STARTS[0]] if "ray start" in line]
    assert re.search(r"RAY_enable_autoscaler_v2=0 [^;]*ray start", line)


@pytest.mark.parametrize("path", CLUSTERS, ids=lambda path: path.stem)
def test_down_and_growth_read_them(path: Path) -> None:
    values, cluster = load(path), ClusterFile.read(path)
    assert cluster.name == "biphase"
    assert bool(cluster.workers) == (path.stem == "local")
    if path.stem != "local":
        growth = growth_of(values)
        assert (growth.most_workers, growth.least_workers, growth.num_gpus(0)) == (4, 2, 4)


def test_the_deployment_fits_the_machines_of_a_cluster() -> None:
    deployment = load_deployment(FILES / "deploy.yaml")
    assert deployment.placement == "spread"
    for place in deployment.router_places:
        assert place.host == "0.0.0.0" and place.port and place.port not in RAY_WORKER_PORTS
    assert deployment.prefill.gpus is not None and deployment.decode.gpus is not None


def test_the_manifest_of_kuberay() -> None:
    documents = {one["kind"]: one for one in yaml.safe_load_all((FILES / "kuberay.yaml").read_text())}
    assert set(documents) == {"ConfigMap", "RayCluster", "Service"}
    deployment = deployment_from(yaml.safe_load(documents["ConfigMap"]["data"]["deploy.yaml"]))
    spec = documents["RayCluster"]["spec"]
    head = spec["headGroupSpec"]["template"]["spec"]["containers"][0]
    (workers,) = spec["workerGroupSpecs"]
    worker = workers["template"]["spec"]["containers"][0]
    (line,) = head["args"]
    serve = re.search(r"biphase (serve [^)]*)\)", line)
    assert serve is not None and make_parser().parse_args(shlex.split(serve[1])).wait >= 60.0
    assert "$KUBERAY_GEN_RAY_START_CMD" in line and "$KUBERAY_GEN_RAY_START_CMD" in worker["args"][0]
    drain = shlex.split(worker["lifecycle"]["preStop"]["exec"]["command"][2])
    parsed = make_parser().parse_args(drain[1:])
    assert (parsed.run, parsed.node, parsed.wait) == ("drain", "$POD_IP", True)
    assert parsed.controller.endswith(f":{deployment.controller_port}")
    for container in (head, worker):
        assert {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "POD_IP"} <= {one["name"] for one in container["env"]}
    ports = {port["port"] for port in documents["Service"]["spec"]["ports"]}
    assert ports == {place.port for place in deployment.router_places}


def test_the_image_has_the_ray_that_biphase_asks_for() -> None:
    text = (FILES / "Dockerfile").read_text()
    version = ray_version()
    assert f"rayproject/ray:{version}" in text
    assert "biphase-*.whl" in text


def ray_version() -> str:
    spec = next(one for one in yaml.safe_load_all((FILES / "kuberay.yaml").read_text()) if one["kind"] == "RayCluster")
    version = spec["spec"]["rayVersion"]
    assert isinstance(version, str)
    return version


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a: [", "not valid YAML"),
        ("- a\n", "it is no mapping of keys; give the file that `ray up` was given"),
        ("cluster_name: x\n", "key 'provider' is missing"),
    ],
)
def test_another_file_is_no_cluster_file(tmp_path: Path, text: str, line: str) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(text)
    with pytest.raises(SetupError) as caught:
        ClusterFile.read(path)
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_kuberay_manifest_says_the_sum_of_its_workers() -> None:
    documents = yaml.safe_load_all((FILES / "kuberay.yaml").read_text())
    spec = next(each["spec"] for each in documents if each["kind"] == "RayCluster")
    (head,) = spec["headGroupSpec"]["template"]["spec"]["containers"]
    said = {each["name"]: each.get("value") for each in head["env"]}
    assert said["BIPHASE_MAX_WORKERS"] == str(sum(group["maxReplicas"] for group in spec["workerGroupSpecs"]))
    assert said["BIPHASE_MIN_WORKERS"] == str(sum(group["minReplicas"] for group in spec["workerGroupSpecs"]))
    for group in spec["workerGroupSpecs"]:
        (worker,) = group["template"]["spec"]["containers"]
        assert {each["name"] for each in worker["env"]} == set(said) - {"BIPHASE_MAX_WORKERS", "BIPHASE_MIN_WORKERS"}
