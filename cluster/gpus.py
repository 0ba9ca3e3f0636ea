"""Which GPUs each instance computes on, and how much of them is its own. Pure but for ``host_gpus``; no torch, no Ray.

An explicit share (``gpus`` of a role) lies in one GPU. The explicit ones are placed first, the largest before the smaller,
in the order of instances where they are equal, each on the first GPU with room. Instances without ``gpus`` then get equal
shares, the largest at most 1 that all of them find in what is left, each on the GPU with most left. An instance of several
ranks has a whole GPU for each, asked for or not: ranks that compute together wait for the slowest, and NCCL refuses two on
one GPU. Instances on the CPU count nowhere. The answer depends on the deployment and the number of GPUs alone: every life
of an instance gets the same.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from biphase.cluster.deployment import Deployment
from biphase.cluster.wanted import wanted_of
from biphase.protos.errors import SetupError
from biphase.protos.values import Role

WHOLE = 10_000
"""Shares are counted in ten-thousandths, as Ray does: their sums are exact."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuPart:
    """What an instance has of the GPUs."""

    share: float = 0.0
    """The part of one GPU that each rank has, 0 to 1; 0: it computes on the CPU."""
    gpus: tuple[int, ...] = ()
    """Which of the GPUs, counted from 0, one for each rank. Ray, which places shares itself, does not take them."""


def divide(deployment: Deployment, num_gpus: int, *, where: str = "this host") -> dict[str, GpuPart]:
    """Every instance's part of ``num_gpus`` GPUs, by its name. Raises SetupError when they do not fit; see above.

    ``where`` names what has the GPUs, for the message.
    """
    asked: dict[str, list[int]] = {}
    unasked: list[str] = []
    parts: dict[str, GpuPart] = {}
    for wanted in wanted_of(deployment):
        if wanted.kind != "prefill" and wanted.kind != "decode":
            continue
        gpus, num_ranks = deployment.plan(wanted.kind).gpus, deployment.plan(wanted.kind).parallel.num_ranks
        parts[wanted.name] = GpuPart()
        if gpus is None and num_ranks > 1 and num_gpus:
            gpus = 1.0
        if gpus and deployment.device != "cpu":
            asked[wanted.name] = [in_parts(gpus)] * num_ranks
        elif gpus is None and deployment.device != "cpu" and num_gpus:
            unasked.append(wanted.name)
    left = [WHOLE] * num_gpus
    for name, shares in sorted(asked.items(), key=lambda item: -item[1][0]):
        taken: list[int] = []
        for share in shares:
            gpu = next((gpu for gpu, room in enumerate(left) if room >= share), None)
            if gpu is None:
                raise SetupError(_refusal(list(asked.values()), 0, num_gpus, where))
            left[gpu] -= share
            taken.append(gpu)
        parts[name] = GpuPart(share=shares[0] / WHOLE, gpus=tuple(taken))
    share = _equal_share(left, len(unasked))
    if unasked and share == 0:
        raise SetupError(_refusal(list(asked.values()), len(unasked), num_gpus, where))
    for name in unasked:
        gpu = max(range(num_gpus), key=left.__getitem__)  # the first of the emptiest: no GPU idles beside a shared one
        left[gpu] -= share
        parts[name] = GpuPart(share=share / WHOLE, gpus=(gpu,))
    return parts


def share_of(deployment: Deployment, name: str, role: Role, num_gpus: int, *, where: str = "this host") -> float:
    """The part of one GPU that each rank of an instance gets, of one that was added later too: as others of its role."""
    parts = divide(deployment, num_gpus, where=where)
    if name in parts:
        return parts[name].share
    gpus = deployment.plan(role).gpus
    if deployment.device == "cpu" or gpus == 0 or not num_gpus:
        return 0.0
    alike = (part.share for other, part in parts.items() if other.startswith(f"{role}-"))
    return gpus if gpus is not None else next(alike, 1.0)


def part_of(
    deployment: Deployment,
    name: str,
    role: Role,
    num_gpus: int,
    held: Mapping[str, GpuPart],
    *,
    where: str = "this host",
) -> GpuPart:
    """The part of an instance that starts now, beside what others hold: that of ``divide`` where it is free, else the
    first GPUs with room. Raises SetupError when there is none."""
    share = in_parts(share_of(deployment, name, role, num_gpus, where=where))
    if not share:
        return GpuPart()
    left = [WHOLE] * num_gpus
    for other, part in held.items():
        for index in part.gpus if other != name else ():
            left[index] -= in_parts(part.share)
    first = divide(deployment, num_gpus, where=where).get(name, GpuPart()).gpus
    taken: list[int] = []
    for rank in range(deployment.plan(role).parallel.num_ranks):
        wish = first[rank : rank + 1]
        gpu = next((gpu for gpu in (*wish, *range(num_gpus)) if left[gpu] >= share), None)
        if gpu is None:
            raise SetupError(
                f"{name} asks for {share / WHOLE:g} of a GPU for each rank, {where} has {num_gpus}, and none with so "
                "much left"
            )
        left[gpu] -= share
        taken.append(gpu)
    return GpuPart(share=share / WHOLE, gpus=tuple(taken))


def in_parts(amount: float) -> int:
    """Ten-thousandths of ``amount``, rounded down; above 0 at least 1."""
    return max(int(amount * WHOLE + 1e-6), 1 if amount > 0 else 0)


def _equal_share(left: Sequence[int], count: int) -> int:
    """The largest share that ``count`` instances find in what is ``left`` of the GPUs, each within one; 0: there is none."""
    # with the largest some GPU is full, or else all of them could have more
    fillings = {room // sharers for room in set(left) for sharers in range(1, count + 1)} - {0}
    fitting = (share for share in sorted(fillings, reverse=True) if sum(room // share for room in left) >= count)
    return next(fitting, 0)


def _refusal(instances: Sequence[Sequence[int]], num_unasked: int, num_gpus: int, where: str) -> str:
    asked = [share for shares in instances for share in shares]
    total = sum(asked)
    who, ask = ("1 instance", "asks") if len(instances) == 1 else (f"{len(instances)} instances", "ask")
    if len(asked) > len(instances):
        who += f" of {len(asked)} ranks"
    text = f"{who} {ask} for {total / WHOLE:g} GPU{'' if total == WHOLE else 's'}"
    if not num_unasked and total <= num_gpus * WHOLE:
        counts = " and ".join(f"{asked.count(share)} x {share / WHOLE:g}" for share in sorted(set(asked), reverse=True))
        text += f" ({counts}, each within one)"
    text += f", {where} has {num_gpus}"
    if num_unasked:
        text += f", which leaves none for the {num_unasked} without gpus"
    plans = ", tensor_parallel_size, pipeline_parallel_size" if len(asked) > len(instances) else ""
    return f"{text}: lower gpus (a fraction shares a GPU, 0 is the CPU){plans} or replicas"


def host_gpus(environment: Mapping[str, str] = os.environ, devices: Path = Path("/dev")) -> tuple[str, ...]:
    """GPUs that processes of this host may use, as CUDA_VISIBLE_DEVICES names them, else as the driver shows them."""
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return tuple(name.strip() for name in visible.split(",") if name.strip() not in ("", "-1", "NoDevFiles"))
    found = (path.name.removeprefix("nvidia") for path in devices.glob("nvidia[0-9]*"))
    return tuple(str(index) for index in sorted(int(name) for name in found if name.isdecimal()))


def may_have_gpus(devices: Path = Path("/dev")) -> bool:
    """Whether torch might find one here, by other doors than the driver's own too (WSL, Tegra), hidden ones included."""
    return any(any(devices.glob(pattern)) for pattern in ("nvidia[0-9]*", "dxg", "nvmap", "nvhost*"))
