"""A policy run offline over a recorded history: what it would have done. Pure.

The load is the recorded one; the instances follow the decisions. A start serves after ``start_s``, a flip after the setup's
``turn_s``, a stopped instance is gone after ``drain_s``, a node that is asked for never comes. An instance that the history does not have
reports what a recorded one of the history says of its step times.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from biphase.planner.autoscaler import decide
from biphase.planner.autoscaler_state import (
    AutoscalerState,
    Decision,
    FlipInstance,
    StartInstance,
    StopInstance,
)
from biphase.planner.capacity import Setup
from biphase.planner.history import Moment
from biphase.planner.policy import ROLES, Policy
from biphase.planner.ratio import Ratio
from biphase.planner.reports import InstanceReport, Member, Room
from biphase.planner.signals import ClusterSignals, SignalWindow
from biphase.protos.values import Role


@dataclass(frozen=True, slots=True, kw_only=True)
class Replayed:
    """One decision: seconds since the history began, what really ran then, what would have run."""

    at_s: float
    recorded: Ratio
    decision: Decision
    signals: ClusterSignals


class Replay:
    """The owner of the instances that would have been. ``setup``: at first. ``follow`` False: decisions over the fleet as it was."""

    def __init__(
        self,
        policy: Policy,
        setup: Setup,
        *,
        start_s: float = 30.0,
        drain_s: float = 5.0,
        follow: bool = True,
    ) -> None:
        self._policy = policy if follow else replace(policy, dry_run=True)
        self._setup, self._start_s, self._drain_s = setup, start_s, drain_s
        self._follow = follow
        self._members: list[Member] | None = None
        self._window = SignalWindow()
        self._state = AutoscalerState()
        self._gpus = 0.0

    def run(self, history: Iterable[Moment]) -> Iterator[Replayed]:
        """A decision whenever ``interval_s`` has passed in the history."""
        first_s = due_s = last_s = None
        for moment in history:
            self._setup = moment.setup or self._setup
            for report in moment.reports:
                self._window.add(report, moment.unix_s)
            if first_s is None or due_s is None or last_s is None:
                first_s = due_s = last_s = moment.unix_s
            self._age(moment, moment.unix_s - last_s)
            last_s = moment.unix_s
            if moment.unix_s < due_s - 1e-6:
                continue
            due_s = max(due_s + self._policy.interval_s, moment.unix_s)
            signals = self._signals(moment)
            decision = decide(self._policy, signals, self._state, moment.unix_s)
            self._state = decision.state
            if self._follow:
                for action in decision.actions:
                    self._carry_out(action)
            yield Replayed(
                at_s=moment.unix_s - first_s, recorded=_ratio(moment.members), decision=decision, signals=signals
            )

    def _signals(self, moment: Moment) -> ClusterSignals:
        members = tuple(self._members or ())
        signals = self._window.over(
            self._policy.window_s,
            moment.unix_s,
            interval_s=self._policy.interval_s,
            members=moment.members,
            room=moment.room,
            setup=self._setup,
        )
        if not self._follow:
            return signals
        reports: list[InstanceReport] = []
        for member in members:
            report = signals.report(member.name) or next(iter(signals.instances), None)
            if report is not None and member.phase == "ready":
                reports.append(replace(report, name=member.name, role=member.role))
        ready = sum(member.phase == "ready" for member in members)
        share = signals.num_heard / signals.num_known if signals.num_known else 1.0
        idle = max(0.0, self._gpus - sum(self._setup.shape(member.role).gpus for member in members))
        fit = {role: int((idle + 1e-9) // max(self._setup.shape(role).gpus, 1e-9)) for role in ROLES}
        room = Room(prefill=fit["prefill"], decode=fit["decode"], can_grow=moment.room.can_grow)
        return replace(
            signals,
            members=members,
            instances=tuple(reports),
            num_known=ready,
            num_heard=round(share * ready),
            room=room,
        )

    def _age(self, moment: Moment, seconds: float) -> None:
        if self._members is None or not self._follow:
            self._members = list(moment.members)
        held = sum(self._setup.shape(member.role).gpus for member in moment.members if member.phase != "lost")
        idle = max(moment.room.idle(role) * self._setup.shape(role).gpus for role in ROLES)
        self._gpus = held + idle
        if not self._follow:
            return
        kept: list[Member] = []
        for member in self._members:
            member = replace(member, age_s=member.age_s + seconds)
            if member.phase == "draining" and member.age_s >= self._drain_s:
                continue
            takes_s = {"starting": self._start_s, "flipping": self._setup.turn_s}.get(member.phase)
            if takes_s is not None and member.age_s >= takes_s:
                member = replace(member, phase="ready", age_s=0.0)
            kept.append(member)
        self._members = kept

    def _carry_out(self, action: object) -> None:
        assert self._members is not None
        match action:
            case StartInstance(role=role):
                self._members.append(Member(name=self._free_name(role), role=role, phase="starting"))
            case StopInstance(name=name):
                self._change(name, phase="draining", age_s=0.0)
            case FlipInstance(name=name, role=role):
                self._change(name, role=role, phase="flipping", age_s=0.0)

    def _change(self, name: str, **changes: object) -> None:
        assert self._members is not None
        self._members = [
            replace(member, **changes) if member.name == name else member  # type: ignore[arg-type]
            for member in self._members
        ]

    def _free_name(self, role: Role) -> str:
        names = {member.name for member in self._members or ()}
        number = next(number for number in range(len(names) + 1) if f"{role}-{number}" not in names)
        return f"{role}-{number}"


def _ratio(members: Iterable[Member]) -> Ratio:
    counts = dict.fromkeys(ROLES, 0)
    for member in members:
        counts[member.role] += member.phase in ("ready", "starting", "flipping")
    return Ratio(prefill=counts["prefill"], decode=counts["decode"])
