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
            phase, age_s = _phase(slot, now_s)
            role: Role = "prefill" if slot.role == "prefill" else "decode"
            found.append(Member(name=slot.name, role=role, phase=phase, age_s=age_s, node=slot.node, out=slot.slow))
    return tuple(found)


def _phase(slot: Slot, now_s: float) -> tuple[MemberPhase, float]:
    """As the planner calls it, and for how long: 0 where none has begun, as when a controller has just begun itself."""
    lasted_s = slot.lasted_s(now_s)
    told_s = max(0.0, now_s - slot.asked_s) if slot.asked_s is not None else lasted_s
    if slot.ending == "remove" or slot.held:
        return "draining", told_s
    if slot.flip is not None or slot.ending == "again":
        return "flipping", told_s
    if slot.is_up and slot.phase == "ready":
        return "ready", lasted_s
    if slot.is_up:
        return "draining", lasted_s
    if slot.no_room:
        return "lost", lasted_s
    return "starting", max(0.0, now_s - slot.down_since_s) if slot.down_since_s is not None else lasted_s
