"""The instances as a decision counts them: what serves or will, what holds GPUs, and whom it would cost least. Pure."""

from collections import Counter

from biphase.planner.policy import ROLES, Policy
from biphase.planner.ratio import Ratio
from biphase.planner.reports import Member
from biphase.planner.signals import ClusterSignals
from biphase.protos.values import Role


class Fleet:
    """A view of ``signals.members`` under ``policy``. A start that is overdue counts for nothing, nor one given up."""

    def __init__(self, signals: ClusterSignals, policy: Policy, given_up: tuple[str, ...] = ()) -> None:
        self._setup, self._policy, self._given_up = signals.setup, policy, set(given_up)
        self.members = signals.members
        self._work = {report.name: report.work_left for report in signals.instances}
        self._on_node = Counter(member.node for member in self.members if member.phase != "lost")
        self._room = signals.room

    def is_late(self, member: Member) -> bool:
        return member.phase == "starting" and (
            member.age_s > self._policy.start_timeout_s or member.name in self._given_up
        )

    @property
    def newly_late(self) -> list[Member]:
        """Starts that are overdue and not given up yet."""
        return [member for member in self.members if self.is_late(member) and member.name not in self._given_up]

    def serving(self, role: Role) -> list[Member]:
        """Those that serve a role or are about to, stragglers that are kept from work left out."""
        return [member for member in self.members if member.role == role and self._counts(member) and not member.out]

    def wanted(self, role: Role) -> int:
        """How many of a role the controller wants now."""
        return sum(
            member.role == role and member.phase != "draining" and member.name not in self._given_up
            for member in self.members
        )

    def lost(self, role: Role) -> list[Member]:
        return [member for member in self.members if member.role == role and member.phase == "lost"]

    @property
    def ratio(self) -> Ratio:
        return Ratio(prefill=len(self.serving("prefill")), decode=len(self.serving("decode")))

    @property
    def gpus(self) -> float:
        """What is held: by starting, draining and slow instances too."""
        return sum(
            self._setup.shape(member.role).gpus
            for member in self.members
            if self._counts(member) or member.phase == "draining"
        )

    @property
    def over_budget(self) -> bool:
        """Whether more is held, what drains already left out, than the budget allows."""
        kept = sum(self._setup.shape(member.role).gpus for member in self.members if self._counts(member))
        return kept > self._policy.gpu_budget.max + 1e-9

    @property
    def idle_gpus(self) -> float:
        return max(self._room.idle(role) * self._setup.shape(role).gpus for role in ROLES)

    def missing(self, policy: Policy) -> Role | None:
        """The role that nobody serves, nor will, though the bounds ask for it."""
        for role in reversed(ROLES):
            if not self.serving(role) and policy.bounds(role).min_replicas > 0:
                return role
        return None

    def victims(self, role: Role, *, ready: bool = False) -> list[Member]:
        """Whom to stop first: least work left, then the emptiest node. ``ready``: only those that serve now."""
        found = [member for member in self.serving(role) if member.phase == "ready" or not ready]
        return sorted(
            (member for member in found if member.phase != "flipping"),
            key=lambda member: (
                self._work.get(member.name, 0),
                member.phase != "starting",
                self._on_node[member.node],
                member.name,
            ),
        )

    def _counts(self, member: Member) -> bool:
        return member.phase in ("ready", "starting", "flipping") and not self.is_late(member)
