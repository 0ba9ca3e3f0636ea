"""Signals of made-up clusters, for tests of the autoscaler's decisions without a queueing model."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

from biphase.planner.autoscaler import decide
from biphase.planner.autoscaler_state import (
    AutoscalerState,
    Decision,
    FlipInstance,
    StartInstance,
    StopInstance,
)
from biphase.planner.capacity import OfferedLoad, Setup
from biphase.planner.policy import ROLES, GpuBudget, Policy, RoleBounds, RoleFlip, ScaleRule, Targets
from biphase.planner.ratio import Ratio
from biphase.planner.reports import InstanceReport, JointHistogram, Member, Room
from biphase.planner.signals import ClusterSignals
from biphase.protos.step_time import StepTime
from biphase.protos.values import Role

PREFILL_STEP = StepTime(fixed_s=5e-3, per_token_s=5e-4, per_context_s=1e-8, num_steps=99)
DECODE_STEP = StepTime(fixed_s=10e-3, per_token_s=2e-3, per_context_s=1e-6, num_steps=99)

POLICY = Policy(
    interval_s=5.0,
    window_s=30.0,
    gpu_budget=GpuBudget(min=0.0, max=8.0),
    prefill=RoleBounds(min_replicas=1, max_replicas=6),
    decode=RoleBounds(min_replicas=1, max_replicas=6),
    targets=Targets(ttft_ms=800.0, tpot_ms=40.0),
    scale_up=ScaleRule(stabilization_s=10.0, cooldown_s=15.0, max_step=8),
    scale_down=ScaleRule(stabilization_s=20.0, cooldown_s=15.0, max_step=8),
    role_flip=RoleFlip(enabled=True, min_gain=0.05, cooldown_s=15.0),
    start_timeout_s=60.0,
    node_wait_s=120.0,
)

START_S = 1_700_000_000.0


def make_load(requests_per_s: float, prompt: float = 400.0, output: float = 50.0) -> OfferedLoad:
    return OfferedLoad(
        requests_per_s=requests_per_s,
        prompt_lengths=((prompt, 1.0),),
        output_mean=output,
        output_tokens_per_s=requests_per_s * output,
    )


def make_members(ratio: Ratio) -> tuple[Member, ...]:
    return tuple(
        Member(name=f"{role}-{index}", role=role, node=f"node-{index}", age_s=1000.0)
        for role in ROLES
        for index in range(ratio.of(role))
    )


def make_report(member: Member, work: int = 0) -> InstanceReport:
    return InstanceReport(
        name=member.name,
        role=member.role,
        uptime_s=1000.0,
        running_tokens=work,
        prefill_step=PREFILL_STEP,
        decode_step=DECODE_STEP,
    )


def make_signals(
    load: OfferedLoad,
    members: Sequence[Member],
    *,
    idle: int = 8,
    silent: Iterable[str] = (),
    work: dict[str, int] | None = None,
    can_grow: bool = False,
    setup: Setup | None = None,
) -> ClusterSignals:
    ready = [member for member in members if member.phase == "ready"]
    heard = [member for member in ready if member.name not in set(silent)]
    return ClusterSignals(
        load=load,
        span_s=30.0,
        watched_s=30.0,
        num_requests=100,
        num_known=len(ready),
        num_heard=len(heard),
        num_routers=1,
        instances=tuple(make_report(member, (work or {}).get(member.name, 0)) for member in heard),
        members=tuple(members),
        room=Room(prefill=idle, decode=idle, can_grow=can_grow),
        setup=setup or Setup(),
    )


class Cluster:
    """What becomes of decisions: starts take ``start_s``, drains ``drain_s``; the owner of members and state."""

    def __init__(
        self,
        policy: Policy,
        ratio: Ratio,
        *,
        gpus: int = 8,
        start_s: float = 0.0,
        drain_s: float = 0.0,
        fitted: bool = True,
        setup: Setup | None = None,
    ) -> None:
        self.policy, self.gpus, self.start_s, self.drain_s = policy, gpus, start_s, drain_s
        self.members = list(make_members(ratio))
        self.state = AutoscalerState()
        self.now_s = START_S
        self.fitted = fitted
        self.setup = setup or Setup()
        self.can_grow = False
        self.latency = JointHistogram()

    @property
    def idle(self) -> int:
        return max(0, self.gpus - sum(member.phase != "lost" for member in self.members))

    def tick(self, load: OfferedLoad, *, silent: Iterable[str] = (), obey: bool = True) -> Decision:
        """One interval later: phases end, a decision is made and carried out."""
        self.now_s += self.policy.interval_s
        self._age(self.policy.interval_s)
        signals = make_signals(
            load, self.members, idle=self.idle, silent=silent, can_grow=self.can_grow, setup=self.setup
        )
        signals = replace(signals, latency=self.latency)
        if not self.fitted:
            bare = tuple(replace(r, prefill_step=StepTime(), decode_step=StepTime()) for r in signals.instances)
            signals = replace(signals, instances=bare)
        decision = decide(self.policy, signals, self.state, self.now_s)
        assert decision == decide(self.policy, signals, self.state, self.now_s)
        assert AutoscalerState.from_json(decision.state.to_json()) == decision.state
        self.state = decision.state
        if obey:
            self.carry_out(decision)
        return decision

    def carry_out(self, decision: Decision) -> None:
        self.state = decision.state
        if not decision.dry_run:
            for action in decision.actions:
                self._carry_out(action)
        self._age(0.0)

    def run(self, load: OfferedLoad, seconds: float) -> list[Decision]:
        return [self.tick(load) for _ in range(round(seconds / self.policy.interval_s))]

    @property
    def ratio(self) -> Ratio:
        counts = {r: sum(m.role == r and m.phase not in ("draining", "lost") for m in self.members) for r in ROLES}
        return Ratio(prefill=counts["prefill"], decode=counts["decode"])

    @property
    def held(self) -> int:
        """GPUs."""
        return sum(member.phase != "lost" for member in self.members)

    def set_phase(self, name: str, **changes: object) -> None:
        self.members = [replace(m, **changes) if m.name == name else m for m in self.members]  # type: ignore[arg-type]

    def _age(self, seconds: float) -> None:
        kept = []
        for member in self.members:
            member = replace(member, age_s=member.age_s + seconds)
            if member.phase in ("starting", "flipping") and member.age_s >= self.start_s:
                member = replace(member, phase="ready", age_s=0.0)
            if member.phase == "draining" and member.age_s >= self.drain_s:
                continue
            kept.append(member)
        self.members = kept

    def _carry_out(self, action: object) -> None:
        match action:
            case StartInstance(role=role):
                assert self.idle > 0, "a start on no GPU"
                self.members.append(Member(name=self._free_name(role), role=role, phase="starting", node="node-x"))
            case StopInstance(name=name):
                self.set_phase(name, phase="draining", age_s=0.0)
            case FlipInstance(name=name, role=role):
                self.set_phase(name, role=role, phase="flipping", age_s=0.0)

    def _free_name(self, role: Role) -> str:
        names = {member.name for member in self.members}
        return next(f"{role}-{n}" for n in range(1000) if f"{role}-{n}" not in names)


def change_of(decision: Decision, members: Sequence[Member]) -> dict[Role, int]:
    """By how many instances a decision changes each role; failed and lost ones that are dropped count for nothing."""
    phases = {member.name: member for member in members}
    change: dict[Role, int] = {"prefill": 0, "decode": 0}
    for action in decision.actions:
        match action:
            case StartInstance(role=role):
                change[role] += 1
            case StopInstance(name=name):
                if phases[name].phase == "ready":
                    change[phases[name].role] -= 1
            case FlipInstance(name=name, role=role):
                change[role] += 1
                change[phases[name].role] -= 1
    return change
