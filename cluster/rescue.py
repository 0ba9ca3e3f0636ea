"""When a role that is needed has lost all its instances and none of them finds room: who turns for it. Pure.

The lost one and the one that turns swap their roles, so that the ratio is the wanted one again as soon as there is room.
"""

from dataclasses import dataclass

from biphase.cluster.reconcile import Reconciler
from biphase.cluster.slot import Slot
from biphase.cluster.wanted_set import instances
from biphase.protos.values import Mode, Role

PATIENCE_S = 5.0
"""A start that has not said a word for so long has found no room."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rescue:
    """``turns`` takes ``role``; ``waits`` takes what ``turns`` was."""

    turns: str
    waits: str
    role: Role


def rescue(core: Reconciler, mode: Mode, now_s: float) -> Rescue | None:
    """What to do now, None when nothing helps or nothing is amiss."""
    if not core.was_ready:
        return None
    needed: tuple[Role, ...] = ("decode",) if mode == "auto" else ("decode", "prefill")
    for role in needed:
        ours = [slot for slot in instances(core) if slot.role == role]
        lost = [slot for slot in ours if _has_no_room(slot, now_s)]
        if not lost or len(lost) < len(ours):
            continue  # one serves, loads, or turns already
        others = [slot for slot in instances(core) if slot.serves and slot.kind not in (role, "router")]
        if len(others) > 1 or (others and mode == "auto"):
            turns = min(others, key=lambda slot: (slot.work.left if slot.work is not None else 0, slot.name))
            return Rescue(turns=turns.name, waits=lost[0].name, role=role)
    return None


def _has_no_room(slot: Slot, now_s: float) -> bool:
    if slot.phase == "waiting":
        return slot.no_room or slot.failures > 1
    silent = slot.announcement is None or (slot.announcement.pid == 0 and slot.phase == "starting")
    return slot.phase == "starting" and silent and not slot.adopted and slot.lasted_s(now_s) >= PATIENCE_S
