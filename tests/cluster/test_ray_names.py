"""Names in a Ray cluster, and the sums of what is asked of one."""

import pytest

from biphase.cluster.backend import Kind, ProcessSpec
from biphase.cluster.deployment import Deployment
from biphase.cluster.gpus import GpuPart
from biphase.cluster.ray_names import ActorName
from biphase.cluster.ray_room import Room, bundles_of, fits, refusal, rooms_asked
from biphase.protos.parallel_plan import ParallelPlan

ONE = 10_000


@pytest.mark.parametrize(
    "name",
    [
        ActorName(name="decode-0", kind="decode", incarnation=7),
        ActorName(name="a.b-c_1.2of3", kind="prefill", incarnation=12, rank=3, num_ranks=8),
        ActorName(name="router-0", kind="router", incarnation=1),
    ],
)
def test_a_name_says_all(name: ActorName) -> None:
    assert ActorName.parse(str(name)) == name


@pytest.mark.parametrize("text", ["", "decode-0#1", "decode/decode-0", "decode/decode-0#x", "decode/decode-0#1.2"])
def test_what_is_no_name_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no name of an actor"):
        ActorName.parse(text)


def spec(name: str, kind: Kind, *, tp: int = 1, pp: int = 1, cpus: float = 0.0) -> ProcessSpec:
    return ProcessSpec(
        name=name,
        kind=kind,
        incarnation=1,
        deployment=Deployment(model="m"),
        run_dir="/r",
        controller_address="",
        cpus=cpus,
        plan=ParallelPlan(tp=tp, pp=pp),
    )


def test_a_bundle_is_a_stage() -> None:
    one = spec("decode-0", "decode", tp=4, pp=2, cpus=0.5)
    assert bundles_of(one, 1.0) == [{"CPU": 2.0, "GPU": 4.0}] * 2
    assert bundles_of(spec("decode-0", "decode", tp=2), 0.0) == [{"memory": 1}]


def test_stages_are_asked_for_whole() -> None:
    specs = [spec("prefill-0", "prefill", cpus=1), spec("decode-0", "decode", tp=2, pp=2, cpus=1), spec("r", "router")]
    asked = rooms_asked(specs, {"decode-0": GpuPart(share=1.0, gpus=(0, 1, 2, 3))})
    assert asked == [Room(2 * ONE, 2 * ONE)] * 2 + [Room(0, ONE)]
    assert fits(asked, [Room(2 * ONE, 3 * ONE), Room(2 * ONE, 2 * ONE)])
    assert not fits(asked, [Room(3 * ONE, 9 * ONE), Room(ONE, 9 * ONE)]), "no host has room for the second stage"


def test_what_does_not_fit_is_one_line_with_both_numbers() -> None:
    specs = [spec("prefill-0", "prefill", cpus=1), spec("decode-0", "decode", tp=4, pp=1, cpus=1), spec("r", "router")]
    asked = rooms_asked(specs, {})
    assert refusal(specs, asked, [Room(0, 3 * ONE)]) == (
        "2 instances of 5 ranks ask Ray for 5 CPUs, 3 are free: lower cpus in deploy.yaml (0 is allowed), "
        "tensor_parallel_size, pipeline_parallel_size or replicas"
    )
    assert "5 CPUs, 6 are free on 2 hosts, where a stage asks for 4 on one host and the most on one is 3: " in refusal(
        specs, asked, [Room(0, 3 * ONE), Room(0, 3 * ONE)]
    )
