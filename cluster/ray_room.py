"""What instances ask a Ray cluster for, and whether it has that much: CPUs and GPUs by host. Counts only, no Ray."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from biphase.cluster.backend import ProcessSpec
from biphase.cluster.gpus import WHOLE, GpuPart, in_parts


class Room(NamedTuple):
    """What a stage of an instance asks for, or what a host has, in ten-thousandths."""

    gpus: int
    cpus: int


NOTHING = Room(0, 0)


def room_of(resources: Mapping[str, Any]) -> Room:
    """Of what Ray says a host has."""
    return Room(in_parts(resources.get("GPU", 0.0)), in_parts(resources.get("CPU", 0.0)))


def rooms_asked(specs: Sequence[ProcessSpec], parts: Mapping[str, GpuPart]) -> list[Room]:
    """The stages of all instances, the largest first: a stage lies on one host, an instance may lie on several."""
    stages = [
        Room(spec.plan.tp * in_parts(parts.get(spec.name, GpuPart()).share), spec.plan.tp * in_parts(spec.cpus))
        for spec in specs
        for _ in range(spec.plan.pp)
    ]
    return sorted((stage for stage in stages if stage != NOTHING), reverse=True)


def bundles_of(spec: ProcessSpec, share: float) -> list[dict[str, float]]:
    """An instance's placement group: a bundle per stage. Ray takes no empty ones, so one byte stands for nothing."""
    each = {name: spec.plan.tp * amount for name, amount in (("CPU", spec.cpus), ("GPU", share)) if amount}
    return [each or {"memory": 1} for _ in range(spec.plan.pp)]


def fits(asked: Sequence[Room], hosts: Sequence[Room]) -> bool:
    """Whether every demand, the largest first, finds a host with that much left."""
    left = sorted(hosts, reverse=True)
    for one in asked:
        fitting = next((i for i, there in enumerate(left) if there.gpus >= one.gpus and there.cpus >= one.cpus), None)
        if fitting is None:
            return False
        left[fitting] = Room(left[fitting].gpus - one.gpus, left[fitting].cpus - one.cpus)
    return True


def how_many(each: Sequence[Room], hosts: Sequence[Room], most: int) -> int:
    """How many instances of those stages fit, at most ``most``."""
    count = 0
    while count < most and fits(sorted(list(each) * (count + 1), reverse=True), hosts):
        count += 1
    return count


def refusal(specs: Sequence[ProcessSpec], asked: Sequence[Room], free: Sequence[Room]) -> str:
    """One line with both numbers of what is short."""
    instances = [spec for spec in specs if spec.kind in ("prefill", "decode")]
    num_ranks = sum(spec.plan.num_ranks for spec in instances)
    who = f"{len(instances)} instance{'s' if len(instances) > 1 else ''}"
    who += f" of {num_ranks} ranks ask" if num_ranks > len(instances) else " ask" if len(instances) > 1 else " asks"
    plans = ", tensor_parallel_size, pipeline_parallel_size" if num_ranks > len(instances) else ""
    short_of_gpus = not fits([Room(one.gpus, 0) for one in asked], free)
    unit, key, hint = (
        ("GPUs", "gpus", "a fraction shares a GPU, 0 is the CPU") if short_of_gpus else ("CPUs", "cpus", "0 is allowed")
    )
    wanted, there = (sum(getattr(one, key) for one in rooms) for rooms in (asked, free))
    largest, most = (max(getattr(one, key) for one in rooms) for rooms in (asked, free))
    hosts = f" on {len(free)} hosts" if len(free) > 1 else ""
    if largest > most and wanted <= there:
        hosts += f", where a stage asks for {largest / WHOLE:g} on one host and the most on one is {most / WHOLE:g}"
    return f"{who} Ray for {wanted / WHOLE:g} {unit}, {there / WHOLE:g} are free{hosts}: lower {key} in deploy.yaml ({hint}){plans} or replicas"
