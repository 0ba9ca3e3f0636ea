"""Where a deployment's policy comes from: a file that may change while it runs, or deploy.yaml itself."""

import json
from dataclasses import replace
from pathlib import Path

from biphase.cluster.deployment import Deployment
from biphase.cluster.signal_reports import setup_of
from biphase.planner.policy import Policy, contradiction
from biphase.planner.policy_file import policy_from, policy_from_text
from biphase.planner.ratio import Ratio, outside
from biphase.protos.errors import SetupError, one_line
from biphase.protos.values import Role


def check_policy(deployment: Deployment) -> Policy | None:
    """The policy that ``deployment`` names, None where it names none. Raises SetupError, one line."""
    return parse_policy(deployment, read_policy(deployment)) if deployment.autoscale else None


def check_counts(deployment: Deployment) -> None:
    """Raises SetupError for replicas beyond what the deployment's policy allows at any time: they would start, to be stopped
    again. Too few are no trouble, it starts more."""
    policy = check_policy(deployment)
    if policy is None or policy.dry_run:
        return
    reasons = [_too_many(deployment, one) for one in (policy, *map(policy.with_schedule, policy.schedules))]
    if all(reasons):
        raise SetupError(f"{reasons[0]}, {name_of(deployment)}: give fewer replicas to begin with, or a higher bound")


def _too_many(deployment: Deployment, policy: Policy) -> str | None:
    no_least = replace(
        policy,
        gpu_budget=replace(policy.gpu_budget, min=0.0),
        prefill=replace(policy.prefill, min_replicas=0),
        decode=replace(policy.decode, min_replicas=0),
    )
    ratio = Ratio(prefill=deployment.prefill.replicas, decode=deployment.decode.replicas)
    return outside(ratio, no_least, setup_of(deployment))


def read_policy(deployment: Deployment) -> str:
    """Its text. Raises SetupError for a file that cannot be read."""
    if is_inline(deployment):
        return deployment.autoscale
    try:
        return Path(deployment.autoscale).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else one_line(error)
        raise SetupError(f"cannot read policy file {deployment.autoscale}: {reason}") from error


def parse_policy(deployment: Deployment, text: str) -> Policy:
    """Raises SetupError for a bad key or value, and for what contradicts itself or the deployment."""
    source = name_of(deployment)
    try:
        inline = is_inline(deployment)
        policy = policy_from(json.loads(text), source=source) if inline else policy_from_text(text, source=source)
    except (ValueError, RecursionError) as error:  # of values that are beyond what can be read or shown
        raise SetupError(f"{source}: {one_line(error)}") from error
    setup = setup_of(deployment)
    gpus: dict[Role, float] = {"prefill": setup.prefill.gpus, "decode": setup.decode.gpus}
    problem = contradiction(policy, gpus=gpus, strict=setup.strict, colocated=setup.colocated)
    if problem is not None:
        raise SetupError(f"{source}: {problem}")
    return policy


def is_inline(deployment: Deployment) -> bool:
    return deployment.autoscale.startswith("{")


def name_of(deployment: Deployment) -> str:
    return "autoscale of the deploy file" if is_inline(deployment) else deployment.autoscale


def changed_since(deployment: Deployment) -> tuple[int, int] | None:
    """Something that differs when the file was written anew; None where there is none."""
    if is_inline(deployment):
        return (0, 0)
    try:
        stat = Path(deployment.autoscale).stat()
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_size
