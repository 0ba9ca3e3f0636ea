"""Changes of the wanted set: more, fewer, other roles, drains. Each is checked whole before anything changes. Pure.

What is refused raises InvalidRequest with the reason and the nearest known name.
"""

import difflib
import itertools
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass

from biphase.cluster.backend import Kind
from biphase.cluster.reconcile import Reconciler
from biphase.cluster.slot import FlipTo, Slot
from biphase.protos.errors import InvalidRequest
from biphase.protos.values import Mode, Role

ROLES: tuple[Role, ...] = ("prefill", "decode")
MAX_REPLICAS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalePlan:
    """How the wanted counts are reached: roles change first, then instances stop, then new ones start."""

    flips: tuple[tuple[str, Role], ...] = ()
    stops: tuple[str, ...] = ()
    adds: tuple[Role, ...] = ()

    def __str__(self) -> str:
        words = [f"{name} turns to {role}" for name, role in self.flips]
        words += [f"{name} drains and stops" for name in self.stops]
        words += [f"a new {role} instance starts" for role in self.adds]
        return ", ".join(words) or "nothing changes"


def instances(core: Reconciler) -> list[Slot]:
    """Those that are wanted: whatever goes for good is not among them."""
    return [slot for slot in core.slots.values() if slot.is_instance and slot.ending != "remove"]


def instance(core: Reconciler, name: str) -> Slot:
    """The instance of that name. Raises InvalidRequest for another process's name and for none."""
    slot = core.slots.get(name)
    if slot is not None and slot.is_instance:
        return slot
    known = [slot.name for slot in core.slots.values() if slot.is_instance]
    if slot is not None:
        raise InvalidRequest(f"{name} is a {slot.kind}, no instance; instances: {', '.join(known)}")
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else f"instances: {', '.join(known)}"
    raise InvalidRequest(f"no instance is called {name}: {hint}")


def first_free_name(core: Reconciler, role: Role) -> str:
    return free_name(role, core.slots)


def free_name(role: Role, taken: Container[str]) -> str:
    """The first that is not ``taken``."""
    return next(name for number in itertools.count() if (name := f"{role}-{number}") not in taken)


def reason_against_serving(mode: Mode, roles: Iterable[Kind]) -> str | None:
    """Why instances of these roles serve nobody, None when they do."""
    there = list(roles)
    if "decode" not in there:
        return "no decode instance that serves would be left"
    if mode == "strict" and "prefill" not in there:
        return "no prefill instance that serves would be left, and mode is strict"
    return None


def reason_against_generations(mode: Mode, there: Iterable[tuple[Kind, str]]) -> str | None:
    """Why instances of these roles and generations serve nobody, None when those of any one generation do."""
    there = list(there)
    by_generation: dict[str, list[Kind]] = {}
    for kind, generation in there:
        by_generation.setdefault(generation, []).append(kind)
    if any(reason_against_serving(mode, kinds) is None for kinds in by_generation.values()):
        return None
    reason = reason_against_serving(mode, [kind for kind, _ in there])
    return reason or "no prefill and decode instance of the same generation would be left, and mode is strict"


def check_others_serve(
    core: Reconciler,
    mode: Mode,
    without: Container[str],
    doing: str,
    *,
    then: Mapping[str, Kind] | None = None,
    new: Iterable[tuple[Kind, str]] = (),
) -> None:
    """Raises InvalidRequest where nobody could serve while ``without`` are away though somebody can now, and where nobody
    could once all others are back that are only away for a while. ``then``: who of them comes back, in which role; ``new``:
    (role, generation) of those that start in their place."""
    then = then or {}
    serving = [slot for slot in core.slots.values() if slot.is_instance and slot.serves]
    wanted = [slot for slot in instances(core) if not slot.held]
    now = [(slot.name, slot.kind, slot.generation) for slot in serving]
    later = [(slot.name, slot.role, slot.next_generation or slot.generation) for slot in wanted]
    stay = [(kind, generation) for name, kind, generation in now if name not in without]
    come = [
        (then.get(name, kind), generation) for name, kind, generation in later if name in then or name not in without
    ]
    for before, left in ((now, stay), (later, [*come, *new])):
        if reason_against_generations(mode, [(kind, generation) for _, kind, generation in before]) is not None:
            continue  # nothing is taken away
        reason = reason_against_generations(mode, left)
        if reason is not None:
            raise InvalidRequest(f"{doing} is refused: {reason}")


def check_is_free(slot: Slot) -> None:
    """Raises InvalidRequest for an instance with which something is under way."""
    if slot.flip is not None:
        raise InvalidRequest(f"{slot.name} is turning to {slot.flip.kind} already")
    if slot.ending == "remove":
        raise InvalidRequest(f"{slot.name} is already draining, to be stopped")
    if slot.ending == "again":
        raise InvalidRequest(f"{slot.name} is already draining, to be started anew")
    if slot.held:
        raise InvalidRequest(f"{slot.name} is already draining; `biphase drain {slot.name} --undo` ends that")


def victims(core: Reconciler, role: Role) -> list[Slot]:
    """Instances of a role, the first to go first: not up yet, then least work left, then from the emptiest host."""
    wanted = [slot for slot in instances(core) if slot.role == role]
    per_node = [slot.node for slot in instances(core)]

    def order(slot: Slot) -> tuple[bool, int, int, int]:
        work_left = slot.work.left if slot.work is not None else 0
        return slot.is_up, work_left, per_node.count(slot.node), -slot.incarnation

    # the highest number first among equals
    return sorted(sorted(wanted, key=lambda slot: slot.name, reverse=True), key=order)


def plan_scale(core: Reconciler, wanted: Mapping[Role, int], *, mode: Mode, can_flip: bool) -> ScalePlan:
    """How to reach ``wanted`` instances of each role; a role that is not named keeps its count. InvalidRequest."""
    now = core.counts()
    counts: dict[Role, int] = {role: wanted.get(role, now[role]) for role in ROLES}
    for role, count in counts.items():
        if count > MAX_REPLICAS:
            raise InvalidRequest(f"{role} is {count}: the most is {MAX_REPLICAS}")
    if counts["decode"] == 0:
        raise InvalidRequest("decode is 0: at least 1 decode instance is needed, prefill alone ends no request")
    if mode == "strict" and counts["prefill"] == 0:
        raise InvalidRequest("prefill is 0 with mode strict: strict needs at least 1 prefill instance")
    over = {role: [slot.name for slot in victims(core, role)][: max(0, now[role] - counts[role])] for role in ROLES}
    under = {role: max(0, counts[role] - now[role]) for role in ROLES}
    flips: list[tuple[str, Role]] = []
    turns: tuple[tuple[Role, Role], ...] = (("prefill", "decode"), ("decode", "prefill"))
    for source, target in turns if can_flip else ():
        for name in list(over[source]):
            if under[target] > 0 and core.slots[name].is_up and not core.slots[name].is_leaving:
                flips.append((name, target))
                over[source].remove(name)
                under[target] -= 1
    return ScalePlan(
        flips=tuple(flips),
        stops=tuple(over["prefill"] + over["decode"]),
        adds=tuple(role for role in ROLES for _ in range(under[role])),
    )


def add(core: Reconciler, role: Role, generation: str, now_s: float) -> str:
    """One more instance; returns its name."""
    name = first_free_name(core, role)
    core.slots[name] = Slot(
        name=name, kind=role, generation=generation, not_before_s=now_s, since_s=now_s, down_since_s=now_s
    )
    core.refresh(now_s)
    return name


def stop(core: Reconciler, name: str, grace_s: float, now_s: float) -> None:
    """Drain it, then end it for good."""
    slot = core.slots[name]
    slot.ending, slot.held, slot.flip = "remove", False, None
    _leave(slot, grace_s)
    core.refresh(now_s)


def renew(
    core: Reconciler, name: str, grace_s: float, now_s: float, *, generation: str | None, role: Role | None
) -> None:
    """Drain it, end it, and start it anew, in another generation or role where one is given."""
    slot = core.slots[name]
    if slot.phase == "waiting":  # there is nothing to end
        slot.generation, slot.next_kind = generation or slot.generation, role or slot.next_kind
        slot.failures, slot.not_before_s = 0, now_s
        core.refresh(now_s)
        return
    slot.ending, slot.next_generation = "again", generation
    slot.next_kind = role or slot.next_kind
    _leave(slot, grace_s)
    core.refresh(now_s)


def flip(core: Reconciler, name: str, role: Role, grace_s: float, now_s: float) -> None:
    """Drain it, then let it turn."""
    slot = core.slots[name]
    slot.flip = FlipTo(kind=role, incarnation=slot.incarnation + 1)
    _leave(slot, grace_s)
    core.refresh(now_s)


def hold(core: Reconciler, name: str, grace_s: float, now_s: float) -> None:
    """Drain it; it stays."""
    slot = core.slots[name]
    slot.held, slot.resumes = True, False
    _leave(slot, grace_s)
    core.refresh(now_s)


def resume(core: Reconciler, name: str, now_s: float) -> None:
    """End a drain: of one that is held, or that was to stop and has not been asked to yet."""
    slot = core.slots[name]
    slot.held, slot.ending, slot.resumes, slot.told, slot.asked_s = False, "", True, False, None
    slot.next_generation = slot.next_kind = None
    core.refresh(now_s)


def take_back(core: Reconciler, name: str, now_s: float) -> bool:
    """Leave an instance as it is that was to start anew and has not been asked to end yet; whether that was so."""
    slot = core.slots.get(name)
    if slot is None or slot.ending != "again" or slot.stop_asked_s is not None or slot.phase in ("waiting", "lost"):
        return False
    if slot.held:  # drained by hand as well, which stays
        slot.ending, slot.next_generation, slot.next_kind = "", None, None
        core.refresh(now_s)
    else:
        resume(core, name, now_s)
    return True


def _leave(slot: Slot, grace_s: float) -> None:
    slot.grace_s, slot.asked_s, slot.told, slot.resumes = grace_s, None, False, False
