"""What one decision leaves for the next, and over restarts of the controller: JSON-able values. Pure.

Times are seconds since 1970, so that they mean the same in the controller's next life on any host.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from biphase.planner.ratio import Ratio
from biphase.protos.step_time import StepTime
from biphase.protos.values import Role


@dataclass(frozen=True, slots=True, kw_only=True)
class Recommendation:
    """What one tick would have had: ``now`` with the GPUs that are there, ``ideal`` with new nodes as well."""

    at_s: float
    now: Ratio
    ideal: Ratio


@dataclass(frozen=True, slots=True, kw_only=True)
class RoleState:
    """One role's memory. ``expected``: instances that the last decision left wanted; None: before the first."""

    step: StepTime | None = None
    """The last step time that was fitted; kept while idle and while nobody serves the role."""
    changed_s: float | None = None
    expected: int | None = None
    failed_starts: int = 0
    start_after_s: float = 0.0
    """Starts back off until then."""
    asked_s: float | None = None
    """Since when a new node is asked for."""
    ask_after_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class AutoscalerState:
    """The owner is whoever calls ``decide`` and keeps what it returns."""

    prefill: RoleState = field(default_factory=RoleState)
    decode: RoleState = field(default_factory=RoleState)
    recommendations: tuple[Recommendation, ...] = ()
    flipped_s: float | None = None
    given_up: tuple[str, ...] = ()
    """Starts that were given up and have not gone yet."""
    served: tuple[str, ...] = ()
    """Instances of now that have come to serve at any time."""
    said: tuple[str, ...] = ()
    """What the last decision was about, in keys, so that only news is logged."""

    def of(self, role: Role) -> RoleState:
        return self.prefill if role == "prefill" else self.decode

    def having(self, role: Role, **changes: Any) -> "AutoscalerState":
        changed = replace(self.of(role), **changes)
        return replace(self, prefill=changed) if role == "prefill" else replace(self, decode=changed)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> "AutoscalerState":
        """The inverse of to_json; raises ValueError, KeyError or TypeError for anything else."""
        values: dict[str, Any] = json.loads(text)
        return AutoscalerState(
            prefill=_role(values["prefill"]),
            decode=_role(values["decode"]),
            recommendations=tuple(
                Recommendation(at_s=item["at_s"], now=Ratio(**item["now"]), ideal=Ratio(**item["ideal"]))
                for item in values["recommendations"]
            ),
            flipped_s=values["flipped_s"],
            given_up=tuple(values["given_up"]),
            served=tuple(values["served"]),
            said=tuple(values["said"]),
        )


def _role(values: Mapping[str, Any]) -> RoleState:
    step = values["step"]
    return RoleState(**{**values, "step": None if step is None else StepTime(**step)})


@dataclass(frozen=True, slots=True, kw_only=True)
class StartInstance:
    """On idle GPUs, or on the node that was asked for and has come: then the request that keeps its room is withdrawn."""

    role: Role
    on_new_node: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class StopInstance:
    """Drain it, then end it."""

    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FlipInstance:
    """Drain it, then let it serve ``role``."""

    name: str
    role: Role


@dataclass(frozen=True, slots=True, kw_only=True)
class AskNode:
    """Keep one placement group of the role's shape pending, so that the cluster's autoscaler brings a node."""

    role: Role


@dataclass(frozen=True, slots=True, kw_only=True)
class WithdrawNode:
    """Remove that placement group."""

    role: Role


@dataclass(frozen=True, slots=True, kw_only=True)
class Hold:
    """Too little is known: nothing is changed."""

    reason: str


Action = StartInstance | StopInstance | FlipInstance | AskNode | WithdrawNode | Hold


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What to do, why, and the state for the next time. ``is_news``: it differs from the last one.

    Under ``dry_run`` the actions are what would have been done, and the state follows what really is.
    """

    actions: tuple[Action, ...]
    reasons: tuple[str, ...]
    state: AutoscalerState
    current: Ratio
    target: Ratio
    is_news: bool = True
    dry_run: bool = False
