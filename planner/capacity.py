"""How many requests would meet their goals with n instances of a role. Pure: arithmetic on the fitted step time.

Prefill is a queue of n servers (M/G/n): a prompt takes its chunks' steps, waits are exponential beyond Erlang's C, and under
load several prompts share a step. So the headroom that a percentile of TTFT needs is part of the answer. Decode is a
processor-sharing queue: every request that runs makes the step longer, so the number that run has the distribution
p(N) = p(N-1) * (tokens/s * step(N/n)) / N, whatever the lengths' distribution. A token's time meets its goal while the
batch is small enough for it; KV blocks and max_num_seqs bound the batch too, and what waits beyond them misses.
"""

import math
from dataclasses import dataclass, field

from biphase.planner.policy import Targets
from biphase.protos.step_time import StepTime, attended
from biphase.protos.values import Role

MAX_STATES = 2048
"""Of the decode queue: more requests than that are looked at in groups of instances."""

LATE = 0.5
"""An overloaded role serves its share of the load, and half of that in time at best."""

KV_USE = 0.95

AVERAGED = 0.6
"""Deviation of the mean batch over an answer's life, as a part of the batch's own; agrees with the queueing model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoleShape:
    """What a deployment says of one role's instances."""

    gpus: float = 1.0
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    kv_tokens: int = 0
    """Tokens that the KV blocks of one instance hold; 0: not known yet."""
    step_time: StepTime = field(default_factory=StepTime)
    """From deploy.yaml, until one is fitted; unknown: ``prior_of`` guesses from the limits."""
    plan: str = "tp 1 x pp 1"
    """How an instance is cut, GPUs of a rank included: it turns in place only where both roles' are the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What a decision must know of the deployment. ``flip_s``: a flip in place; ``rebuild_s``: ranks made anew. Both are
    assumed, nobody measures them."""

    prefill: RoleShape = field(default_factory=RoleShape)
    decode: RoleShape = field(default_factory=RoleShape)
    strict: bool = False
    colocated: bool = False
    flip_s: float = 1.0
    rebuild_s: float = 60.0

    def shape(self, role: Role) -> RoleShape:
        return self.prefill if role == "prefill" else self.decode

    @property
    def turn_s(self) -> float:
        """What turning one instance to the other role costs it in seconds."""
        return self.flip_s if self.prefill.plan == self.decode.plan else self.rebuild_s


@dataclass(frozen=True, slots=True, kw_only=True)
class OfferedLoad:
    """What arrives, before dispatch. Lengths as (tokens, share of requests)."""

    requests_per_s: float = 0.0
    prompt_lengths: tuple[tuple[float, float], ...] = ((512.0, 1.0),)
    output_mean: float = 128.0
    output_square: float = 0.0
    """Mean square; 0: taken as if all were of the mean length."""
    output_tokens_per_s: float = 0.0

    @property
    def prompt_mean(self) -> float:
        return sum(length * share for length, share in self.prompt_lengths)

    @property
    def is_idle(self) -> bool:
        return self.requests_per_s <= 0 and self.output_tokens_per_s <= 0

    def times(self, factor: float) -> "OfferedLoad":
        """The same requests, so many times as often."""
        return OfferedLoad(
            requests_per_s=self.requests_per_s * factor,
            prompt_lengths=self.prompt_lengths,
            output_mean=self.output_mean,
            output_square=self.output_square,
            output_tokens_per_s=self.output_tokens_per_s * factor,
        )


def prior_of(role: Role, shape: RoleShape, targets: Targets) -> StepTime:
    """The step time to plan with until one is fitted: the deployment's, or one for which its batch limits fit the goals."""
    if shape.step_time.is_known:
        return shape.step_time
    if role == "prefill":
        per_token_s = targets.ttft_ms / 1e3 / 4 / shape.max_num_batched_tokens
        return StepTime(fixed_s=0.0, per_token_s=per_token_s, num_steps=1)
    half_s = targets.tpot_ms / 1e3 / 2
    return StepTime(fixed_s=half_s, per_token_s=half_s / shape.max_num_seqs, num_steps=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """``attainment``: share of requests that meet the role's goal; ``utilisation``: of what n instances can do."""

    attainment: float
    utilisation: float


class PrefillModel:
    """Prefill under one load: prompts in, first tokens out."""

    def __init__(self, load: OfferedLoad, step: StepTime, shape: RoleShape, targets: Targets) -> None:
        self._rate = load.requests_per_s
        budget = shape.max_num_batched_tokens
        self._served = [
            (chunks * step.fixed_s, step.per_token_s * length + step.per_context_s * attended(0, round(length)), share)
            for length, share in load.prompt_lengths
            for chunks in [math.ceil(length / budget)]
        ]
        self._fixed_s = sum(fixed * share for fixed, _, share in self._served)
        self._variable_s = sum(variable * share for _, variable, share in self._served)
        self._most_per_step = max(1.0, budget / max(1.0, load.prompt_mean))
        self.busy_s = self._rate * (self._fixed_s + self._variable_s)
        """Seconds per second that all prompts take."""
        alone = sorted((fixed + variable, share) for fixed, variable, share in self._served)
        self.alone_s = _quantile(alone, targets.percentile / 100)
        """A prompt of the percentile's length, with nobody before it."""
        self.goal_s = targets.ttft_ms / 1e3
        self.reachable = self.alone_s < self.goal_s
        if not self.reachable:
            self.goal_s = 2 * self.alone_s

    def at(self, instances: int) -> Forecast:
        if self._rate <= 0:
            return Forecast(attainment=1.0, utilisation=0.0)
        if instances <= 0:
            return Forecast(attainment=0.0, utilisation=math.inf)
        each = self._rate / instances
        # prompts that wait share a step: so many as arrive during one, as far as its budget goes
        spare = 1 - each * self._variable_s
        together = (
            min(self._most_per_step, max(1.0, each * self._fixed_s / spare)) if spare > 0 else self._most_per_step
        )
        mean_s = self._fixed_s / together + self._variable_s
        least_s = self._fixed_s / self._most_per_step + self._variable_s
        load = each * mean_s
        if load >= 1:
            return Forecast(attainment=LATE / max(1.0, each * least_s), utilisation=each * least_s)
        square = sum(share * (fixed / together + variable) ** 2 for fixed, variable, share in self._served)
        wait_s = square / mean_s / 2 / (instances * (1 - load))
        waits = _erlang_c(instances, load * instances)
        held_s = (together - 1) * self._variable_s
        met = 0.0
        for fixed, variable, share in self._served:
            left_s = self.goal_s - fixed - variable - held_s
            if left_s >= 0:
                met += share * (1 - waits * math.exp(-left_s / max(wait_s, 1e-12)))
        return Forecast(attainment=max(met, LATE), utilisation=load)


class DecodeModel:
    """Decode under one load: how many requests run at once, and whether the step is short enough for all."""

    def __init__(self, load: OfferedLoad, step: StepTime, shape: RoleShape, targets: Targets) -> None:
        self._tokens_per_s = load.output_tokens_per_s
        # seen over time a long output is there longer: half its mean square over its mean
        output = (load.output_square or load.output_mean**2) / max(1.0, load.output_mean) / 2
        context = load.prompt_mean + output
        self._fixed_s = step.fixed_s
        self._each_s = step.per_token_s + step.per_context_s * context
        self.most = float(shape.max_num_seqs)
        """Requests that one instance can run at once."""
        if shape.kv_tokens > 0:
            self.most = max(1.0, min(self.most, KV_USE * shape.kv_tokens / max(1.0, context)))
        self.kv_bound = self.most < shape.max_num_seqs
        self.goal_s = targets.tpot_ms / 1e3
        self.alone_s = self._step_s(1.0)
        self.reachable = self.alone_s <= self.goal_s
        if not self.reachable:
            self.goal_s = 2 * self.alone_s
        self.batch = self.most
        """Requests at which the step just meets the goal."""
        if self._each_s > 0:
            self.batch = max(1.0, min(self.most, (self.goal_s - self._fixed_s) / self._each_s))

    def _step_s(self, batch: float) -> float:
        return self._fixed_s + self._each_s * max(1.0, batch)

    def at(self, instances: int, *, prefill_s: float = 0.0) -> Forecast:
        """``prefill_s``: seconds per second that local prefill takes of all instances together."""
        if self._tokens_per_s <= 0 and prefill_s <= 0:
            return Forecast(attainment=1.0, utilisation=0.0)
        if instances <= 0:
            return Forecast(attainment=0.0, utilisation=math.inf)
        spare = max(1e-3, 1 - prefill_s / instances)
        load = self._tokens_per_s / spare * self._step_s(self.batch) / (instances * self.batch)
        if load >= 1:
            return Forecast(attainment=LATE / load, utilisation=load)
        group = min(instances, max(1, int(MAX_STATES / self.most)))
        tokens_per_s = self._tokens_per_s / spare * group / instances
        return Forecast(attainment=max(LATE, self._within(group, tokens_per_s)), utilisation=load)

    def _within(self, instances: int, tokens_per_s: float) -> float:
        """The share of arrivals that find room for one more within the goal."""
        limit, last = instances * self.batch, int(instances * self.most)
        weights, weight, total, first_moment = [1.0], 1.0, 1.0, 0.0
        for number in range(1, last + 1):
            weight *= tokens_per_s * self._step_s(number / instances) / number
            weights.append(weight)
            total += weight
            first_moment += weight * number
            if total > 1e200:
                weights = [value / total for value in weights]
                weight, first_moment, total = weight / total, first_moment / total, 1.0
            if weight < 1e-12 * total and number > limit:
                break
        else:
            ratio = tokens_per_s * self._step_s(self.most) / (instances * self.most)
            if ratio >= 1:
                return 0.0
            total += weight * ratio / (1 - ratio)
        mean = first_moment / total
        if limit > mean:  # an answer's mean over its life strays less than the batch at any one moment
            limit = min(mean + (limit - mean) / AVERAGED, instances * self.most)
        return sum(weights[: max(0, int(limit + 1e-9))]) / total


def _quantile(values: list[tuple[float, float]], share: float) -> float:
    seen = 0.0
    for value, part in values:
        seen += part
        if seen >= share - 1e-9:
            return value
    return values[-1][0] if values else 0.0


def _erlang_c(servers: int, offered: float) -> float:
    """The chance that all servers are busy."""
    blocked = 1.0
    for number in range(1, servers + 1):
        blocked = offered * blocked / (number + offered * blocked)
    share = offered / servers
    return blocked / (1 - share + share * blocked)
