"""What a controller's next life must know: kept outside it, by the backend. Values and JSON only.

Times are seconds of the controller's clock, which starts at the Unix time and never goes back within a life.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from biphase.cluster.backend import Kind, ProcessSpec
from biphase.cluster.reconcile import Reconciler
from biphase.cluster.slot import Ending, FlipTo, Slot


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotState:
    """A wanted process: its newest life, how often it was started again, and what is under way with it."""

    kind: Kind
    incarnation: int
    life: int
    restarts: int = 0
    ever_ready: bool = False
    generation: str = ""
    next_generation: str | None = None
    next_kind: Kind | None = None
    held: bool = False
    resumes: bool = False
    ending: Ending = ""
    flip: FlipTo | None = None
    grace_s: float = 0.0
    asked_s: float | None = None
    address: str = ""
    failures: int = 0
    not_before_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Pin:
    """Counts that people have set: the policy decides nothing until then (None: until they say auto)."""

    text: str
    prefill: int
    decode: int
    until_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class AbandonedLife:
    """A life on a host that could not be reached, whose place was given away at ``since_s``; it is to end."""

    name: str
    kind: Kind
    life: int
    """The incarnation it was started with."""
    incarnation: int
    address: str = ""
    node: str = ""
    since_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ControllerState:
    """``epoch`` counts the controller's lives; ``was_ready``: the deployment was up as a whole at least once."""

    epoch: int = 0
    was_ready: bool = False
    slots: Mapping[str, SlotState] = field(default_factory=dict)
    former: Mapping[str, int] = field(default_factory=dict)
    """The last incarnation of names that are wanted no more."""
    cordoned: Mapping[str, str] = field(default_factory=dict)
    pin: Pin | None = None
    generation: str = ""
    """The one that is wanted; those that instances still serve are in ``deployments`` as well."""
    deployments: Mapping[str, str] = field(default_factory=dict)
    """As JSON, by generation."""
    policy: str = ""
    """The text of the policy that was obeyed last."""
    autoscaler: Mapping[str, Any] = field(default_factory=dict)
    """The autoscaler's own state: cooldowns, starts under way."""
    update: Mapping[str, Any] = field(default_factory=dict)
    abandoned: Sequence[AbandonedLife] = ()
    """Those that nobody has seen gone yet."""

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> "ControllerState":
        """Keys that this version does not know are left out: a newer one may have written them."""
        values = json.loads(text)
        slots = {}
        for name, slot in values.pop("slots", {}).items():
            slot["flip"] = FlipTo(**slot["flip"]) if slot.get("flip") else None
            slots[name] = SlotState(**_known(SlotState, slot))
        pin = values.pop("pin", None)
        abandoned = tuple(AbandonedLife(**_known(AbandonedLife, life)) for life in values.pop("abandoned", ()))
        return ControllerState(
            **_known(ControllerState, values),
            slots=slots,
            pin=Pin(**_known(Pin, pin)) if pin else None,
            abandoned=abandoned,
        )


def _known(kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    names = {item.name for item in fields(kind)}
    return {name: value for name, value in values.items() if name in names}


def slots_of(core: Reconciler) -> dict[str, SlotState]:
    """The wanted set as it is kept."""
    return {
        name: SlotState(**{item.name: getattr(slot, item.name) for item in fields(SlotState)})
        for name, slot in core.slots.items()
    }


def restore(core: Reconciler, state: ControllerState) -> None:
    """The wanted set of an earlier life; without one the deployment's own stays."""
    if state.slots:
        core.slots = {
            name: Slot(name=name, **{item.name: getattr(kept, item.name) for item in fields(SlotState)})
            for name, kept in state.slots.items()
        }
    core.former.update(state.former)
    core.node_failures.cordoned.update(state.cordoned)
    core.was_ready = state.was_ready


def first_state(specs: Sequence[ProcessSpec], *, started: bool = True, used: ControllerState | None = None) -> str:
    """The state before the first controller: the supervisor has started these, or leaves that to it. ``used``: the epochs
    and incarnations of an earlier deployment of this name."""
    lives = [(spec, spec.incarnation if started else 0) for spec in specs]
    slots = {spec.name: SlotState(kind=spec.kind, incarnation=life, life=life) for spec, life in lives}
    return replace(used or ControllerState(), slots=slots).to_json()
