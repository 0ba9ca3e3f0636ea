"""Which numbers of prefill and decode instances to have: one choice for both under one budget. Pure.

The fewest GPUs whose forecast meets the targets; where none does, what is forecast best. The present ratio stays where it
does as well; a role keeps its number if that would carry ``KEEP_MARGIN`` less, and shrinks only if the rest would carry
``DOWN_MARGIN`` more, so that noise moves nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from biphase.planner.capacity import DecodeModel, Forecast, OfferedLoad, PrefillModel, Setup
from biphase.planner.policy import ROLES, Policy, Targets
from biphase.protos.step_time import StepTime
from biphase.protos.values import Role

DOWN_MARGIN = 0.2
KEEP_MARGIN = 0.05
SAME = 0.01
"""Forecasts that differ by a smaller part are taken as equal."""


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Ratio:
    prefill: int
    decode: int

    def of(self, role: Role) -> int:
        return self.prefill if role == "prefill" else self.decode

    def gpus(self, setup: Setup) -> float:
        return self.prefill * setup.prefill.gpus + self.decode * setup.decode.gpus

    def __str__(self) -> str:
        return f"{self.prefill}P:{self.decode}D"


class Outlook:
    """What a load would mean for any ratio; asks the models once per number of instances."""

    def __init__(self, load: OfferedLoad, steps: Mapping[Role, StepTime], setup: Setup, targets: Targets) -> None:
        self.load, self.setup, self.targets = load, setup, targets
        self._steps = steps
        self._seen: dict[tuple[Role, int], Forecast] = {}

    @cached_property
    def prefill(self) -> PrefillModel:
        return PrefillModel(self.load, self._steps["prefill"], self.setup.prefill, self.targets)

    @cached_property
    def decode(self) -> DecodeModel:
        return DecodeModel(self.load, self._steps["decode"], self.setup.decode, self.targets)

    def forecast(self, role: Role, instances: int) -> Forecast:
        key = (role, instances)
        if key not in self._seen:
            if role == "prefill":
                self._seen[key] = self.prefill.at(instances)
            else:
                busy_s = self.prefill.busy_s if self.setup.colocated else 0.0
                self._seen[key] = self.decode.at(instances, prefill_s=busy_s)
        return self._seen[key]

    def attainment(self, ratio: Ratio) -> float:
        """Of both goals. Without prefill instances the decode instances compute the prompts too, unless that is forbidden."""
        if ratio.prefill == 0 and not self.setup.strict:
            if ratio.decode == 0:
                return 0.0
            return self.decode.at(ratio.decode, prefill_s=self.prefill.busy_s).attainment
        return self.forecast("prefill", ratio.prefill).attainment * self.forecast("decode", ratio.decode).attainment

    @cached_property
    def tighter(self) -> "Outlook":
        """The same with ``DOWN_MARGIN`` more load."""
        return Outlook(self.load.times(1 + DOWN_MARGIN), self._steps, self.setup, self.targets)

    @cached_property
    def looser(self) -> "Outlook":
        """The same with ``KEEP_MARGIN`` less load."""
        return Outlook(self.load.times(1 - KEEP_MARGIN), self._steps, self.setup, self.targets)

    def for_change(self, change: int) -> "Outlook":
        """The load under which a role that changes by so many instances is judged."""
        return self if change > 0 else self.tighter if change < 0 else self.looser

    @property
    def unreachable(self) -> list[str]:
        """Goals that no number of instances meets, in words."""
        found = []
        if not self.load.is_idle and not self.prefill.reachable and not self.setup.colocated:
            alone_ms, goal_ms = self.prefill.alone_s * 1e3, self.targets.ttft_ms
            found.append(
                f"ttft_ms {goal_ms:g} is out of reach: long prompts take {alone_ms:.0f} ms with nobody before them"
            )
        if not self.load.is_idle and not self.decode.reachable:
            alone_ms, goal_ms = self.decode.alone_s * 1e3, self.targets.tpot_ms
            found.append(f"tpot_ms {goal_ms:g} is out of reach: one request alone takes {alone_ms:.1f} ms a token")
        return found


def choose(outlook: Outlook, policy: Policy, current: Ratio, *, most_gpus: float) -> Ratio:
    """The ratio to have for this load within the bounds, the budget and ``most_gpus``."""
    candidates = _candidates(policy, outlook.setup, most_gpus)
    if not candidates:  # bounds that contradict each other for a while, as schedules may: the minima decide
        return Ratio(prefill=policy.prefill.min_replicas, decode=policy.decode.min_replicas)
    forecasts = {ratio: _forecast(outlook, ratio, current) for ratio in candidates}
    share, attainment = policy.targets.percentile / 100, policy.targets.attainment
    good = [ratio for ratio, (both, least) in forecasts.items() if both >= attainment and least >= share]
    if good:
        gpus = min(ratio.gpus(outlook.setup) for ratio in good)
        cheapest = [ratio for ratio in good if ratio.gpus(outlook.setup) <= gpus + 1e-9]
    else:
        best = max(both for both, _ in forecasts.values())
        near = [ratio for ratio, (both, _) in forecasts.items() if both >= best * (1 - SAME)]
        gpus = min(ratio.gpus(outlook.setup) for ratio in near)
        cheapest = [ratio for ratio in near if ratio.gpus(outlook.setup) <= gpus + 1e-9]
    if current in cheapest:
        return current
    best = max(forecasts[ratio][0] for ratio in cheapest)
    alike = [ratio for ratio in cheapest if forecasts[ratio][0] >= best * (1 - SAME)]
    return min(alike, key=lambda ratio: (_distance(ratio, current), -forecasts[ratio][0], ratio))


def outside(
    ratio: Ratio, policy: Policy, setup: Setup, *, roles: Sequence[Role] = ROLES, total: bool = True
) -> str | None:
    """Which of the policy's bounds a ratio breaks, in one line with value and limit; ``total``: the budget counts too."""
    for role in roles:
        count, bounds = ratio.of(role), policy.bounds(role)
        if count > bounds.max_replicas:
            return f"{role} is {count}, more than {role}.max_replicas {bounds.max_replicas} of the policy"
        if count < bounds.min_replicas:
            return f"{role} is {count}, less than {role}.min_replicas {bounds.min_replicas} of the policy"
    gpus, budget = ratio.gpus(setup), policy.gpu_budget
    if total and gpus > budget.max + 1e-9:
        return f"{ratio} takes {gpus:g} GPUs, more than gpu_budget.max {budget.max:g} of the policy"
    if total and gpus < budget.min - 1e-9:
        return f"{ratio} takes {gpus:g} GPUs, less than gpu_budget.min {budget.min:g} of the policy"
    return None


def nearest(ratio: Ratio, policy: Policy, setup: Setup) -> Ratio:
    """What comes nearest to a ratio within bounds and budget."""
    candidates = _candidates(policy, setup, policy.gpu_budget.max)
    if not candidates:
        return Ratio(prefill=policy.prefill.min_replicas, decode=policy.decode.min_replicas)
    return min(candidates, key=lambda candidate: (_distance(candidate, ratio), candidate))


def _candidates(policy: Policy, setup: Setup, most_gpus: float) -> list[Ratio]:
    most = min(policy.gpu_budget.max, most_gpus) + 1e-9
    least = min(policy.gpu_budget.min, most) - 1e-9
    within = [
        Ratio(prefill=prefill, decode=decode)
        for prefill in range(policy.prefill.min_replicas, policy.prefill.max_replicas + 1)
        if prefill * setup.prefill.gpus <= most
        for decode in range(policy.decode.min_replicas, policy.decode.max_replicas + 1)
        if prefill * setup.prefill.gpus + decode * setup.decode.gpus <= most
    ]
    enough = [ratio for ratio in within if ratio.gpus(setup) >= least]
    if enough or not within:
        return enough
    most_used = max(ratio.gpus(setup) for ratio in within)  # instances of several GPUs may miss a narrow budget
    return [ratio for ratio in within if ratio.gpus(setup) >= most_used - 1e-9]


def _forecast(outlook: Outlook, ratio: Ratio, current: Ratio) -> tuple[float, float]:
    """(attainment of both goals, of the lesser one); each role under the load for its change."""
    if ratio.prefill == 0:
        both = outlook.for_change(-1 if ratio < current else ratio > current).attainment(ratio)
        return both, both
    parts = [
        outlook.for_change(ratio.of(role) - current.of(role)).forecast(role, ratio.of(role)).attainment
        for role in ROLES
    ]
    return parts[0] * parts[1], min(parts)


def _distance(ratio: Ratio, current: Ratio) -> int:
    return abs(ratio.prefill - current.prefill) + abs(ratio.decode - current.decode)
