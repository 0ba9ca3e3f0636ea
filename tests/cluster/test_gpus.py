"""Shares of GPUs: who gets how much of which."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from biphase.cluster.backend import ProcessSpec
from biphase.cluster.deployment import Deployment, Device, RolePlan
from biphase.cluster.gpus import GpuPart, divide, host_gpus, in_parts, part_of
from biphase.cluster.process_runner import _worker_config
from biphase.cluster.wanted import spec_of
from biphase.protos.errors import SetupError

Role = tuple[int, float | None]
"""Replicas and ``gpus``."""


def deployment_of(prefill: Role, decode: Role, device: Device = "auto") -> Deployment:
    return Deployment(
        model="m",
        device=device,
        prefill=RolePlan(replicas=prefill[0], gpus=prefill[1]),
        decode=RolePlan(replicas=decode[0], gpus=decode[1]),
    )


def placed(prefill: Role, decode: Role, num_gpus: int, device: Device = "auto") -> dict[str, tuple[float, int | None]]:
    parts = divide(deployment_of(prefill, decode, device), num_gpus)
    return {name: (part.share, part.gpus[0] if part.gpus else None) for name, part in parts.items()}


CPU = (0.0, None)


@pytest.mark.parametrize(
    ("prefill", "decode", "num_gpus", "parts"),
    [
        # nobody says: one each where there are enough, else equal shares and no GPU that idles
        ((1, None), (1, None), 0, [CPU, CPU]),
        ((1, None), (1, None), 1, [(0.5, 0), (0.5, 0)]),
        ((1, None), (1, None), 2, [(1, 0), (1, 1)]),
        ((1, None), (1, None), 8, [(1, 0), (1, 1)]),
        ((2, None), (1, None), 1, [(0.3333, 0)] * 3),
        ((2, None), (2, None), 3, [(0.5, 0), (0.5, 1), (0.5, 2), (0.5, 0)]),
        ((0, None), (1, None), 1, [(1, 0)]),
        # explicit ones: the largest first, each on the first GPU with room
        ((1, 1.0), (2, 0.5), 2, [(1, 0), (0.5, 1), (0.5, 1)]),
        ((2, 0.5), (1, 1.0), 2, [(0.5, 1), (0.5, 1), (1, 0)]),
        ((2, 0.4), (2, 0.6), 2, [(0.4, 0), (0.4, 1), (0.6, 0), (0.6, 1)]),
        ((2, 0.6), (0, None), 3, [(0.6, 0), (0.6, 1)]),
        ((1, 0.9), (1, 0.1), 1, [(0.9, 0), (0.1, 0)]),
        ((10, 0.1), (0, None), 1, [(0.1, 0)] * 10),
        ((3, 1 / 3), (0, None), 1, [(0.3333, 0)] * 3),
        # what explicit ones leave, for the others
        ((1, 0.5), (1, None), 1, [(0.5, 0), (0.5, 0)]),
        ((1, 0.7), (1, None), 1, [(0.7, 0), (0.3, 0)]),
        ((1, 0.7), (2, None), 1, [(0.7, 0), (0.15, 0), (0.15, 0)]),
        ((1, 0.7), (2, None), 2, [(0.7, 0), (0.5, 1), (0.5, 1)]),
        ((2, None), (1, 1.0), 2, [(0.5, 1), (0.5, 1), (1, 0)]),
        ((1, None), (2, 0.7), 2, [(0.3, 0), (0.7, 0), (0.7, 1)]),
        # an instance on the CPU takes no part
        ((1, 0.0), (1, None), 1, [CPU, (1, 0)]),
        ((3, 0.0), (2, 1.0), 2, [CPU, CPU, CPU, (1, 0), (1, 1)]),
        ((1, 0.0), (1, 0.0), 2, [CPU, CPU]),
    ],
)
def test_shares_and_places(prefill: Role, decode: Role, num_gpus: int, parts: list[tuple[float, int | None]]) -> None:
    assert list(placed(prefill, decode, num_gpus).values()) == parts


@pytest.mark.parametrize(
    ("prefill", "decode", "num_gpus", "gpus"),
    [
        (RolePlan(), RolePlan(tensor_parallel_size=2), 4, [(2,), (0, 1)]),
        (RolePlan(), RolePlan(tensor_parallel_size=2, gpus=1.0), 3, [(2,), (0, 1)]),
        (RolePlan(tensor_parallel_size=2), RolePlan(pipeline_parallel_size=3), 5, [(0, 1), (2, 3, 4)]),
        (RolePlan(gpus=0.5), RolePlan(gpus=1.0, tensor_parallel_size=2), 3, [(2,), (0, 1)]),
        (
            RolePlan(tensor_parallel_size=2, pipeline_parallel_size=2),
            RolePlan(replicas=2),
            5,
            [(0, 1, 2, 3), (4,), (4,)],
        ),
        (RolePlan(tensor_parallel_size=2), RolePlan(tensor_parallel_size=2), 0, [(), ()]),
        (RolePlan(tensor_parallel_size=2, gpus=0.0), RolePlan(tensor_parallel_size=2), 2, [(), (0, 1)]),
    ],
)
def test_each_rank_has_a_gpu_of_its_own(
    prefill: RolePlan, decode: RolePlan, num_gpus: int, gpus: list[tuple[int, ...]]
) -> None:
    parts = divide(Deployment(model="m", prefill=prefill, decode=decode), num_gpus)
    assert [part.gpus for part in parts.values()] == gpus


def test_a_plan_of_more_ranks_than_gpus_is_one_line() -> None:
    plan = RolePlan(tensor_parallel_size=2, pipeline_parallel_size=2)
    with pytest.raises(SetupError) as refused:
        divide(Deployment(model="m", prefill=RolePlan(gpus=0.0), decode=plan), 3)
    assert str(refused.value) == (
        "1 instance of 4 ranks asks for 4 GPUs, this host has 3: lower gpus (a fraction shares a GPU, 0 is the CPU), "
        "tensor_parallel_size, pipeline_parallel_size or replicas"
    )


def test_on_the_cpu_nobody_has_a_share() -> None:
    assert placed((1, None), (1, None), 2, device="cpu") == {"prefill-0": CPU, "decode-0": CPU}


@pytest.mark.parametrize(
    ("prefill", "decode", "num_gpus", "line"),
    [
        ((1, 1.0), (1, None), 0, "1 instance asks for 1 GPU, this host has 0: lower gpus"),
        ((1, 1.0), (1, 0.5), 1, "2 instances ask for 1.5 GPUs, this host has 1: lower gpus"),
        (
            (1, 1.0),
            (1, None),
            1,
            "1 instance asks for 1 GPU, this host has 1, which leaves none for the 1 without gpus: ",
        ),
        (
            (3, 0.6),
            (0, None),
            2,
            "3 instances ask for 1.8 GPUs (3 x 0.6, each within one), this host has 2: lower gpus",
        ),
        ((1, 0.6), (2, 0.7), 2, "3 instances ask for 2 GPUs (2 x 0.7 and 1 x 0.6, each within one), this host has 2: "),
        ((3, 0.5), (0, 1.0), 1, "3 instances ask for 1.5 GPUs, this host has 1: "),
    ],
)
def test_what_does_not_fit_is_one_line(prefill: Role, decode: Role, num_gpus: int, line: str) -> None:
    with pytest.raises(SetupError) as refused:
        placed(prefill, decode, num_gpus)
    assert line in str(refused.value)
    assert str(refused.value).endswith("lower gpus (a fraction shares a GPU, 0 is the CPU) or replicas")
    assert "\n" not in str(refused.value)


ROLES = st.tuples(st.integers(0, 6), st.none() | st.floats(0, 1))


@given(ROLES, ROLES, st.integers(0, 4))
def test_no_gpu_is_given_twice(prefill: Role, decode: Role, num_gpus: int) -> None:
    try:
        parts = placed(prefill, decode, num_gpus)
    except SetupError:
        return
    assert parts == placed(prefill, decode, num_gpus), "another life, the same GPU"
    assert len(parts) == prefill[0] + decode[0]
    for gpu in range(num_gpus):
        assert sum(in_parts(share) for share, where in parts.values() if where == gpu) <= 10_000
    for role, (_, gpus) in (("prefill", prefill), ("decode", decode)):
        shares = {part for name, (part, _) in parts.items() if name.startswith(role)}
        assert len(shares) <= 1, "the same for all of a role"
        if gpus is not None and shares:
            assert shares.pop() == pytest.approx(gpus, abs=1.01e-4)
    assert all((share > 0) == (gpu is not None) for share, gpu in parts.values())
    if num_gpus and None in (gpus for replicas, gpus in (prefill, decode) if replicas):
        idle = set(range(num_gpus)) - {gpu for _, gpu in parts.values()}
        doubled = [
            name
            for name, (_, gpu) in parts.items()
            if gpu is not None
            and _unasked(name, prefill, decode)
            and [where for _, where in parts.values()].count(gpu) > 1
        ]
        assert not (idle and doubled), "nobody who leaves the choice shares while a GPU idles"


def _unasked(name: str, prefill: Role, decode: Role) -> bool:
    return (prefill if name.startswith("prefill") else decode)[1] is None


def test_the_gpus_of_a_host_are_those_that_are_visible(tmp_path: Path) -> None:
    for name in ("nvidia0", "nvidia10", "nvidia2", "nvidiactl", "nvidia-uvm", "null"):
        (tmp_path / name).touch()
    assert host_gpus({}, tmp_path) == ("0", "2", "10")
    assert host_gpus({"CUDA_VISIBLE_DEVICES": "3, GPU-3f"}, tmp_path) == ("3", "GPU-3f")
    assert host_gpus({"CUDA_VISIBLE_DEVICES": ""}, tmp_path) == ()
    assert host_gpus({"CUDA_VISIBLE_DEVICES": "-1"}, tmp_path) == ()


@pytest.mark.parametrize(("gpus", "device"), [(None, "auto"), (0.0, "cpu"), (0.5, "cuda"), (1.0, "cuda")])
def test_a_plan_that_says_how_many_gpus_means_it(gpus: float | None, device: str) -> None:
    """An instance that was promised a GPU and finds none must not start on the CPU instead."""
    deployment = Deployment(model="m", decode=RolePlan(gpus=gpus))
    base = ProcessSpec(
        name="controller", kind="controller", incarnation=1, deployment=deployment, run_dir="/r", controller_address=""
    )
    assert _worker_config(spec_of(base, "decode-0", 1)).engine.device == device
    assert _worker_config(spec_of(base, "prefill-0", 1)).engine.device == "auto"


def test_an_instance_that_is_added_finds_what_others_leave() -> None:
    deployment = deployment_of((1, 1.0), (1, 1.0))
    held = divide(deployment, 3)
    assert part_of(deployment, "decode-1", "decode", 3, held) == GpuPart(share=1.0, gpus=(2,))
    with pytest.raises(SetupError, match="decode-1 asks for 1 of a GPU for each rank, this host has 2, and none"):
        part_of(deployment, "decode-1", "decode", 2, held)
    again = {name: part for name, part in held.items() if name != "decode-0"}
    assert part_of(deployment, "decode-0", "decode", 3, again) == held["decode-0"], "a next life has what it had"
    taken = {**again, "decode-1": held["decode-0"]}
    assert part_of(deployment, "decode-0", "decode", 3, taken).gpus == (2,), "what another took meanwhile is its own"
    assert part_of(deployment_of((1, None), (1, None), "cpu"), "decode-1", "decode", 3, held) == GpuPart()
