"""From a deployment to the processes it wants at first, and to what one life of a process is started with. Pure."""

from collections.abc import Sequence
from dataclasses import replace

from biphase.cluster.backend import CONTROLLER, Kind, ProcessSpec
from biphase.cluster.deployment import Deployment
from biphase.cluster.slot import Wanted


def wanted_of(deployment: Deployment) -> list[Wanted]:
    """Instances first: they take longest to load."""
    instances = [Wanted(name=f"prefill-{index}", kind="prefill") for index in range(deployment.prefill.replicas)]
    instances += [Wanted(name=f"decode-{index}", kind="decode") for index in range(deployment.decode.replicas)]
    return [*instances, *(Wanted(name=place.name, kind="router") for place in deployment.router_places)]


def spec_of(
    base: ProcessSpec,
    name: str,
    incarnation: int,
    *,
    kind: Kind | None = None,
    deployment: Deployment | None = None,
    avoid: Sequence[str] = (),
) -> ProcessSpec:
    """The spec of one life of ``name``. ``kind``: where it is not the one that the deployment begins with;
    ``deployment``: where it is another generation than that of ``base``; ``avoid``: hosts that get no instance."""
    deployment = deployment or base.deployment
    if kind is None:
        kind = CONTROLLER if name == CONTROLLER else _kinds(deployment)[name]
    one = replace(base, name=name, kind=kind, incarnation=incarnation, deployment=deployment, cpus=0.0, gpus=0.0)
    if kind != "prefill" and kind != "decode":
        return one
    role = deployment.plan(kind)
    return replace(one, cpus=role.cpus, gpus=role.gpus, plan=role.parallel, avoid_nodes=tuple(avoid))


def _kinds(deployment: Deployment) -> dict[str, Kind]:
    return {wanted.name: wanted.kind for wanted in wanted_of(deployment)}
