"""The wanted set in the planner's words: its members, what they are doing and for how long. Pure."""

from collections.abc import Iterable

from biphase.cluster.slot import Slot
from biphase.planner.reports import Member, MemberPhase
from biphase.protos.values import Role


def role_of(slot: Slot) -> Role:
    """What an instance is now."""
    return "prefill" if slot.kind == "prefill" else "decode"


def members_of(slots: Iterable[Slot], now_s: float) -> tuple[Member, ...]:
    found = []
    for slot in slots:
        if slot.is_instance:
            phase, since_s = _phase(slot)
            role: Role = "prefill" if slot.role == "prefill" else "decode"
            age_s = (
                max(0.0, now_s - since_s) if since_s else 0.0
            )  # a controller that has just begun has started nothing
            found.append(Member(name=slot.name, role=role, phase=phase, age_s=age_s, node=slot.node, out=slot.slow))
    return tuple(found)


def _phase(slot: Slot) -> tuple[MemberPhase, float]:
    """As the planner calls it, and since when."""
    if slot.ending == "remove" or slot.held:
        return "draining", slot.asked_s or slot.since_s
    if slot.flip is not None or slot.ending == "again":
        return "flipping", slot.asked_s or slot.since_s
    if slot.is_up and slot.phase == "ready":
        return "ready", slot.since_s
    if slot.is_up:
        return "draining", slot.since_s
    if slot.no_room:
        return "lost", slot.since_s
    return "starting", slot.down_since_s if slot.down_since_s is not None else slot.since_s
