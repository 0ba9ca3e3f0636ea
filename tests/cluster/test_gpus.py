"""Shares of GPUs: who gets how much of which."""

from pathlib import Path

import pytest

from biphase.cluster.gpus import gpu_for, host_gpus, share_of


@pytest.mark.parametrize(
    ("asked", "device", "num_instances", "num_gpus", "share"),
    [
        (None, "auto", 2, 0, 0.0),
        (None, "auto", 2, 1, 0.5),
        (None, "auto", 2, 2, 1.0),
        (None, "auto", 2, 8, 1.0),
        (None, "cuda", 4, 3, 0.5),  # two on one, one on each of the others
        (None, "cpu", 2, 2, 0.0),
        (0.0, "auto", 2, 2, 0.0),
        (0.25, "auto", 2, 1, 0.25),
        (1.0, "auto", 2, 0, 1.0),  # the backend refuses it, with both numbers
    ],
)
def test_a_share(asked: float | None, device: str, num_instances: int, num_gpus: int, share: float) -> None:
    assert share_of(asked, device=device, num_instances=num_instances, num_gpus=num_gpus) == share


def test_gpus_are_filled_one_after_the_other() -> None:
    gpus = ("4", "7", "GPU-3f")
    assert [gpu_for(i, 1.0, gpus) for i in range(3)] == ["4", "7", "GPU-3f"]
    assert [gpu_for(i, 0.5, gpus) for i in range(4)] == ["4", "4", "7", "7"]
    assert [gpu_for(i, 1 / 3, gpus) for i in range(4)] == ["4", "4", "4", "7"]
    assert [gpu_for(i, 0.6, gpus) for i in range(3)] == ["4", "7", "GPU-3f"]


def test_the_gpus_of_a_host_are_those_that_are_visible(tmp_path: Path) -> None:
    for name in ("nvidia0", "nvidia10", "nvidia2", "nvidiactl", "nvidia-uvm", "null"):
        (tmp_path / name).touch()
    assert host_gpus({}, tmp_path) == ("0", "2", "10")
    assert host_gpus({"CUDA_VISIBLE_DEVICES": "3, GPU-3f"}, tmp_path) == ("3", "GPU-3f")
    assert host_gpus({"CUDA_VISIBLE_DEVICES": ""}, tmp_path) == ()
    assert host_gpus({"CUDA_VISIBLE_DEVICES": "-1"}, tmp_path) == ()
