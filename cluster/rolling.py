"""An update, instance by instance: which one is next, and when it has to pause. Pure.

Generations never work together, so what has to be left at every moment is a way to serve within one of them. Where the
last decode instance is to be renewed, a prefill instance that is new already turns first and serves alone meanwhile; the
renewed one then takes its place.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from biphase.cluster.reconcile import Reconciler
from biphase.cluster.slot import Slot
from biphase.cluster.wanted_set import instances, reason_against_serving
from biphase.protos.values import Mode, Role


@dataclass(frozen=True, slots=True, kw_only=True)
class RollingUpdate:
    """One under way, or paused. ``current``: the instance that is being renewed; ``counts``: how many there shall be of a
    role once all serve the new generation, where that changes."""

    generation: str
    previous: str
    grace_s: float
    allow_downtime: bool = False
    current: str = ""
    paused: str = ""
    counts: dict[Role, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Renew:
    """``role``: what it becomes, where it swaps places with the one that turned for it."""

    name: str
    role: Role | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnFirst:
    """A prefill instance has to decode meanwhile."""

    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Wait:
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Renewed:
    """The current one serves in its new generation."""

    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """The current one does not come up in its new generation."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    pass


Step = Renew | TurnFirst | Wait | Renewed | Failed | Finished


def reason_against_update(core: Reconciler, mode: Mode, *, can_flip: bool) -> str | None:
    """Why an update of what is wanted now leaves a moment without service, None when it does not."""
    counts = core.counts()
    if mode == "strict":
        for role in ("prefill", "decode"):
            if counts[role] < 2:
                return f"mode is strict with {counts[role]} {role} instance: while it starts anew nobody serves"
        return None
    if counts["decode"] >= 2 or (counts["prefill"] >= 1 and can_flip):
        return None
    return "there is 1 decode instance and no prefill instance that could take its place: while it starts anew nobody serves"


def plan_of(core: Reconciler, generation: str) -> list[str]:
    """The instances that an update renews, in its order."""
    old = [slot for slot in instances(core) if slot.generation != generation]
    order: list[Slot] = []
    while old:
        order.append(_next_of(old))
        old.remove(order[-1])
    return [slot.name for slot in order]


def next_step(core: Reconciler, update: RollingUpdate, mode: Mode, *, can_flip: bool) -> Step:
    slot = core.slots.get(update.current)
    if slot is not None:
        if slot.generation == update.generation and slot.serves:
            return Renewed(name=slot.name)
        if slot.generation == update.generation and slot.phase == "waiting" and slot.failures > 0:
            return Failed(name=slot.name, reason=slot.reason)
        return Wait(reason=f"{slot.name} is {slot.phase}")
    turning = [each.name for each in instances(core) if each.flip is not None]
    if turning:
        return Wait(reason=f"{turning[0]} is turning")
    old = [each for each in instances(core) if each.generation != update.generation and not each.is_leaving]
    if not old:
        return Finished()
    victim = _next_of(old)
    others = [each for each in instances(core) if each.serves and each is not victim]
    if _serve(mode, others) or not victim.serves or update.allow_downtime:
        return Renew(name=victim.name, role=_swapped(core, victim))
    if mode == "auto" and victim.kind == "decode" and can_flip:
        stand_ins = [each for each in others if each.kind == "prefill" and each.generation == update.generation]
        if stand_ins:
            return TurnFirst(name=stand_ins[0].name)
    return Wait(reason=f"nobody would serve without {victim.name}")


def _next_of(old: list[Slot]) -> Slot:
    """Prefill and decode in turns, so that pairs of one generation exist for as long as there can be any."""
    prefill = [slot for slot in old if slot.kind == "prefill"]
    decode = [slot for slot in old if slot.kind == "decode"]
    return prefill[0] if len(prefill) >= max(1, len(decode)) else decode[0] if decode else prefill[0]


def _swapped(core: Reconciler, victim: Slot) -> Role | None:
    """Prefill, where a prefill instance has turned to decode so that this one may go, and none is left."""
    kinds = [slot.role for slot in instances(core) if slot is not victim]
    turned = any(slot.name.startswith("prefill") and slot.kind == "decode" for slot in instances(core))
    return "prefill" if victim.kind == "decode" and "prefill" not in kinds and turned else None


def _serve(mode: Mode, slots: Iterable[Slot]) -> bool:
    there = list(slots)
    return any(
        reason_against_serving(mode, [slot.kind for slot in there if slot.generation == generation]) is None
        for generation in {slot.generation for slot in there}
    )
