"""From a deployment to the processes it wants. Pure."""

from dataclasses import replace

from biphase.cluster.backend import CONTROLLER, Kind, ProcessSpec
from biphase.cluster.deployment import Deployment
from biphase.cluster.reconcile import Wanted


def wanted_of(deployment: Deployment) -> list[Wanted]:
    """Instances first: they take longest to load."""
    instances = [Wanted(name=f"prefill-{index}", kind="prefill") for index in range(deployment.prefill.replicas)]
    instances += [Wanted(name=f"decode-{index}", kind="decode") for index in range(deployment.decode.replicas)]
    return [*instances, Wanted(name="router-0", kind="router")]


def spec_of(base: ProcessSpec, name: str, incarnation: int) -> ProcessSpec:
    """The spec of one life of ``name`` in the deployment of ``base``."""
    kind: Kind = CONTROLLER if name == CONTROLLER else _kinds(base.deployment)[name]
    one = replace(base, name=name, kind=kind, incarnation=incarnation, cpus=0.0, gpus=0.0)
    if kind != "prefill" and kind != "decode":
        return one
    role = base.deployment.plan(kind)
    return replace(one, cpus=role.cpus, gpus=role.gpus, plan=role.parallel)


def _kinds(deployment: Deployment) -> dict[str, Kind]:
    return {wanted.name: wanted.kind for wanted in wanted_of(deployment)}
