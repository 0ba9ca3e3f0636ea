"""Whether instances fit this host's GPUs, also one after the other in what others give back. No process is started."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from biphase.cluster.backend import ProcessSpec
from biphase.cluster.deployment import Deployment, RolePlan
from biphase.cluster.gpus import GpuPart
from biphase.cluster.process_backend import ProcessBackend
from biphase.cluster.run_dir import RunDir
from biphase.cluster.wanted import spec_of
from biphase.protos.errors import SetupError

WHOLE = Deployment(model="m", prefill=RolePlan(gpus=1.0), decode=RolePlan(gpus=1.0))


@pytest.fixture
def backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ProcessBackend:
    """Two GPUs, each held by one instance."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    made = ProcessBackend(RunDir(tmp_path))
    for number, name in enumerate(("prefill-0", "decode-0")):
        made._gpu_parts[name, 1] = GpuPart(share=1.0, gpus=(number,))
        made._groups[name, 1] = cast("Any", SimpleNamespace(end=None))
    return made


def specs(deployment: Deployment, *names: str) -> list[ProcessSpec]:
    base = ProcessSpec(
        name="controller", kind="controller", incarnation=1, deployment=deployment, run_dir="/r", controller_address=""
    )
    return [spec_of(base, name, 1, kind="prefill" if name.startswith("prefill") else "decode") for name in names]


async def test_a_new_life_has_the_room_of_its_old_one(backend: ProcessBackend) -> None:
    names = ("prefill-0", "decode-0")
    await backend.check(specs(WHOLE, *names), {name: [name] for name in names})
    halves = replace(WHOLE, prefill=RolePlan(gpus=0.5), decode=RolePlan(gpus=0.5, replicas=3))
    # the half that prefill-0 leaves is free for those that start later
    await backend.check(specs(halves, *names, "decode-1", "decode-2"), {name: [name] for name in names})


async def test_an_added_one_needs_what_another_gives_back(backend: ProcessBackend) -> None:
    with pytest.raises(SetupError, match="decode-1 asks for 1 of a GPU .* none with so much left"):
        await backend.check(specs(WHOLE, "decode-1"))
    await backend.check(specs(WHOLE, "decode-1"), {"decode-1": ["prefill-0"]})


async def test_weights_that_are_not_here_are_one_line(backend: ProcessBackend) -> None:
    with pytest.raises(SetupError, match="this host has no weights: .*no such file"):
        await backend.check_nodes(replace(WHOLE, model="/nowhere/model.gguf"))
