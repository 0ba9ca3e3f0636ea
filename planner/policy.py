"""What an autoscaling policy says: frozen values, and the contradictions among them. Pure: the file is read elsewhere.

Defaults live here, once. GPUs are counted as ranks use them: an instance of tp x pp ranks with a GPU each is so many; on
the CPU a rank counts as one.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from biphase.protos.values import Role

ROLES: tuple[Role, Role] = ("prefill", "decode")
Direction = Literal["up", "down"]


def other(role: Role) -> Role:
    return "decode" if role == "prefill" else "prefill"


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuBudget:
    """GPUs of all instances together, starting and draining ones included. min = max: only the ratio moves."""

    min: float = 0.0
    max: float = 8.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RoleBounds:
    min_replicas: int = 1
    max_replicas: int = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class BudgetChange:
    """What a schedule sets of the budget. None: as it is."""

    min: float | None = None
    max: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BoundsChange:
    """What a schedule sets of a role's bounds. None: as it is."""

    min_replicas: int | None = None
    max_replicas: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """The goals of a request, and how many must meet them."""

    ttft_ms: float = 1000.0
    tpot_ms: float = 100.0
    percentile: float = 90.0
    """Each goal alone is met by so many of 100 requests; what prefill's queueing headroom is sized for."""
    attainment: float = 0.9
    """Share of requests that meet both."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleRule:
    """One direction. Both hold for each role on its own."""

    stabilization_s: float
    """All recommendations of so long must agree: growing takes the least of them, shrinking the most."""
    cooldown_s: float
    """From a role's last change, whichever way, to its next one in this direction."""
    max_step: int
    """Instances of a role per decision."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoleFlip:
    """Turning an instance to the other role in place."""

    enabled: bool = True
    min_gain: float = 0.05
    """Predicted rise of attainment, 0..1, that a flip must bring, its cost taken off."""
    cooldown_s: float = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """Bounds for ``duration_s`` from each time that ``cron`` (five fields, in ``time_zone``) names."""

    cron: str
    duration_s: float
    time_zone: str = "UTC"
    name: str = ""
    gpu_budget: BudgetChange = field(default_factory=BudgetChange)
    prefill: BoundsChange = field(default_factory=BoundsChange)
    decode: BoundsChange = field(default_factory=BoundsChange)

    def bounds(self, role: Role) -> BoundsChange:
        return self.prefill if role == "prefill" else self.decode

    @property
    def label(self) -> str:
        return self.name or self.cron


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """How a deployment scales. ``docs/autoscaling.md`` explains every key."""

    interval_s: float = 5.0
    window_s: float = 60.0
    gpu_budget: GpuBudget = field(default_factory=GpuBudget)
    prefill: RoleBounds = field(default_factory=RoleBounds)
    decode: RoleBounds = field(default_factory=RoleBounds)
    targets: Targets = field(default_factory=Targets)
    scale_up: ScaleRule = field(default_factory=lambda: ScaleRule(stabilization_s=10.0, cooldown_s=15.0, max_step=4))
    scale_down: ScaleRule = field(default_factory=lambda: ScaleRule(stabilization_s=60.0, cooldown_s=60.0, max_step=1))
    role_flip: RoleFlip = field(default_factory=RoleFlip)
    start_timeout_s: float = 300.0
    """A start that does not serve by then is given up, stops counting and backs off."""
    node_wait_s: float = 600.0
    """How long a new node is asked for."""
    schedules: tuple[Schedule, ...] = ()
    dry_run: bool = False
    """Say what would be done, do nothing."""

    def bounds(self, role: Role) -> RoleBounds:
        return self.prefill if role == "prefill" else self.decode

    def rule(self, direction: Direction) -> ScaleRule:
        return self.scale_up if direction == "up" else self.scale_down

    def with_schedule(self, schedule: Schedule) -> "Policy":
        """The bounds that a schedule gives, over these."""
        return replace(
            self,
            gpu_budget=replace(self.gpu_budget, **_given(schedule.gpu_budget)),
            prefill=replace(self.prefill, **_given(schedule.prefill)),
            decode=replace(self.decode, **_given(schedule.decode)),
        )

    @staticmethod
    def from_values(values: Mapping[str, Any]) -> "Policy":
        """From plain values, every key given, the parts as mappings. KeyError or TypeError for others."""
        return Policy(
            **{
                **values,
                "gpu_budget": GpuBudget(**values["gpu_budget"]),
                "prefill": RoleBounds(**values["prefill"]),
                "decode": RoleBounds(**values["decode"]),
                "targets": Targets(**values["targets"]),
                "scale_up": ScaleRule(**values["scale_up"]),
                "scale_down": ScaleRule(**values["scale_down"]),
                "role_flip": RoleFlip(**values["role_flip"]),
                "schedules": tuple(_schedule_from(item) for item in values["schedules"]),
            }
        )


def _schedule_from(values: Mapping[str, Any]) -> Schedule:
    kinds: dict[str, Any] = {"gpu_budget": BudgetChange, "prefill": BoundsChange, "decode": BoundsChange}
    return Schedule(**{**values, **{key: kind(**(values[key] or {})) for key, kind in kinds.items()}})


def _given(change: BudgetChange | BoundsChange) -> dict[str, Any]:
    return {key: value for key, value in asdict(change).items() if value is not None}


def contradiction(
    policy: Policy, *, gpus: Mapping[Role, float] | None = None, strict: bool = False, colocated: bool = False
) -> str | None:
    """What cannot hold together, in one line with both values; None where all can.

    ``gpus``: of one instance of each role, where the deployment is known; ``strict``: its mode, in which decode instances
    never prefill; ``colocated``: it has no prefill instance by design.
    """
    for path, part in [
        ("", policy),
        *((f"schedules.{i}.", policy.with_schedule(s)) for i, s in enumerate(policy.schedules)),
    ]:
        found = _against_bounds(path, part, gpus or {}, strict)
        if found is not None:
            return found
    if policy.window_s < policy.interval_s:
        return f"window_s is {policy.window_s:g}, less than interval_s {policy.interval_s:g}"
    for direction, rule in (("up", policy.scale_up), ("down", policy.scale_down)):
        if 0 < rule.stabilization_s < policy.interval_s:
            return (
                f"scale_{direction}.stabilization_s is {rule.stabilization_s:g}, less than interval_s "
                f"{policy.interval_s:g}: give at least that, or 0"
            )
    if colocated and policy.prefill.max_replicas > 0:
        return f"prefill.max_replicas is {policy.prefill.max_replicas}, and the deployment has 0 prefill instances"
    return None


def _against_bounds(path: str, policy: Policy, gpus: Mapping[Role, float], strict: bool) -> str | None:
    budget = policy.gpu_budget
    if budget.min > budget.max:
        return f"{path}gpu_budget.min is {budget.min:g}, more than gpu_budget.max {budget.max:g}"
    for role in ROLES:
        bounds = policy.bounds(role)
        if bounds.min_replicas > bounds.max_replicas:
            return f"{path}{role}.min_replicas is {bounds.min_replicas}, more than {role}.max_replicas {bounds.max_replicas}"
    if policy.decode.min_replicas < 1:
        return f"{path}decode.min_replicas is 0, the least is 1: without a decode instance no request ends"
    if strict and policy.prefill.min_replicas < 1:
        return (
            f"{path}prefill.min_replicas is 0 with mode strict, whose least is 1: decode instances do not prefill in it"
        )
    for word, counts in (
        ("min", [policy.bounds(role).min_replicas for role in ROLES]),
        ("max", [policy.bounds(role).max_replicas for role in ROLES]),
    ):
        parts = [count * gpus.get(role, 1.0) for role, count in zip(ROLES, counts, strict=True)]
        text = f"{counts[0]} prefill and {counts[1]} decode instances of {word}_replicas take {sum(parts):g} GPUs"
        if word == "min" and sum(parts) > budget.max + 1e-9:
            return f"{path}gpu_budget.max is {budget.max:g}, and the {text}"
        if word == "max" and sum(parts) < budget.min - 1e-9 and math.isfinite(budget.min):
            return f"{path}gpu_budget.min is {budget.min:g}, and the {text} at most"
    return None
