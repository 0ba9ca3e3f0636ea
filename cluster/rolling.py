"""An update, instance by instance: which one is next, and when it has to pause. Pure.

Generations never work together, so what has to be left at every moment is a way to serve within one of them. Where the
last decode instance is to be renewed, a prefill instance that is new already turns first and serves alone meanwhile; the
renewed one then takes its place.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from biphase.cluster.reach import CUT_OFF
from biphase.cluster.reconcile import Reconciler
from biphase.cluster.slot import Slot
from biphase.cluster.wanted_set import ROLES, instances, reason_against_generations
from biphase.protos.values import Mode, Role


@dataclass(frozen=True, slots=True, kw_only=True)
class RollingUpdate:
    """One under way, or paused. ``previous``: the generation to go back to; ``current``: the instance that is being renewed;
    ``turned``: the prefill instance that decodes so that the last decode instance may go; ``counts``: how many there shall
    be of a role once all serve the new generation, where that changes."""

    generation: str
    previous: str
    grace_s: float
    allow_downtime: bool = False
    current: str = ""
    turned: str = ""
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
    """``until_s``: when to look again though nothing has happened; None: never. ``is_stuck``: nothing that is under way ends
    it, so that people have to know."""

    reason: str
    until_s: float | None = None
    is_stuck: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Renewed:
    """The current one serves in its new generation."""

    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """An instance does not come up in its new generation."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    pass


Step = Renew | TurnFirst | Wait | Renewed | Failed | Finished


def reason_against_update(core: Reconciler, mode: Mode, *, can_flip: bool) -> str | None:
    """Why an update of what is wanted now leaves a moment without service, None when it does not."""
    wanted = instances(core)
    held = [slot.name for slot in wanted if slot.held]
    roles = [slot.role for slot in wanted if not slot.held]
    besides = f" besides {', '.join(held)}, drained by hand" if held else ""
    if mode == "strict":
        for role in ROLES:
            if roles.count(role) < 2:
                count = roles.count(role)
                return f"mode is strict with {count} {role} instance{besides}: while it starts anew nobody serves"
        return None
    if roles.count("decode") >= 2 or ("decode" in roles and "prefill" in roles and can_flip):
        return None
    return (
        f"there is {roles.count('decode')} decode instance{besides} and no prefill instance that could take its place: "
        "while it starts anew nobody serves"
    )


def plan_of(core: Reconciler, update: RollingUpdate, mode: Mode, *, can_flip: bool) -> list[Renew | TurnFirst]:
    """What an update under which all goes well does, in its order. A ``Renew`` always has its role."""
    trial = Reconciler([], core.start_timeout_s)
    for slot in instances(core):
        one = replace(slot, kind=slot.role, phase="ready", linked=True, announcement=None, failures=0)
        one.flip, one.next_kind, one.ending = None, None, ""
        # who is down now is renewed first, and serves once it is
        is_down = not (slot.serves or slot.held or slot.flip is not None or slot.ending or _comes_back(slot))
        one.slow = is_down and slot.generation != update.generation
        trial.slots[one.name] = one
    steps: list[Renew | TurnFirst] = []
    while old := [slot for slot in trial.slots.values() if slot.generation != update.generation]:
        step = next_step(trial, update, mode, can_flip=can_flip, now_s=0.0)
        if isinstance(step, TurnFirst):
            trial.slots[step.name].kind, update = "decode", replace(update, turned=step.name)
            steps.append(step)
            continue
        name = step.name if isinstance(step, Renew) else _next_of(old).name
        slot = trial.slots[name]
        if isinstance(step, Renew) and step.role is not None:
            slot.kind, update = step.role, replace(update, turned="")
        slot.generation, slot.slow = update.generation, False
        steps.append(Renew(name=name, role="prefill" if slot.kind == "prefill" else "decode"))
    return steps


def next_step(core: Reconciler, update: RollingUpdate, mode: Mode, *, can_flip: bool, now_s: float) -> Step:
    if core.reach.is_cut_off:  # no limit runs out, and nobody begins to leave
        return Wait(reason=CUT_OFF)
    for slot in instances(core):
        reason = _reason_of_failure(core, update, slot, now_s)
        if reason:
            return Failed(name=slot.name, reason=reason)
    current = core.slots.get(update.current)
    if current is not None and (current.generation == update.generation or current.ending):
        if current.serves or (current.held and current.is_up and not current.ending):
            return Renewed(name=current.name)
        looks_for_room = current.phase == "starting" and not current.is_placed
        until_s = now_s + core.start_timeout_s - current.lasted_s(now_s) if looks_for_room else None
        return Wait(reason=f"{current.name} is {current.phase}", until_s=until_s)
    turning = [each.name for each in instances(core) if each.flip is not None]
    if turning:
        return Wait(reason=f"{turning[0]} is turning")
    old = [each for each in instances(core) if each.generation != update.generation]
    if not old:
        return Finished()
    free = [each for each in old if not each.ending]
    if not free:
        return Wait(reason=f"{old[0].name} is to start anew already")
    victim = _next_of(free)
    if victim.is_unheard or _comes_back(victim):  # whom else to renew is plain once it is there
        return Wait(reason=f"{victim.name} is {_away(victim)}")
    others = [each for each in instances(core) if each.serves and each is not victim]
    away = [each for each in instances(core) if not each.serves]
    is_stuck = not any(each.is_unheard or _comes_back(each) for each in away)
    nobody_does = is_stuck and not _serve(mode, [*others, victim])  # it costs nothing that it leaves
    if _serve(mode, others) or not victim.serves or nobody_does or update.allow_downtime:
        return Renew(name=victim.name, role=_swapped(core, update, victim))
    if mode == "auto" and victim.kind == "decode" and can_flip:
        stand_ins = [each for each in others if each.kind == "prefill" and each.generation == update.generation]
        if stand_ins:
            return TurnFirst(name=stand_ins[0].name)
    why = ", ".join(f"{each.name} is {_away(each)}" for each in away)
    return Wait(reason=f"nobody would serve without {victim.name}" + (f": {why}" if why else ""), is_stuck=is_stuck)


def _reason_of_failure(core: Reconciler, update: RollingUpdate, slot: Slot, now_s: float) -> str:
    """Why an instance is taken not to come up in the new generation; empty: it may."""
    if slot.generation != update.generation:
        return ""
    if slot.name != update.current:  # it has served there: one death is repaired as ever
        crashes = slot.phase == "waiting" and slot.failures > 1 and update.previous != update.generation
        return slot.reason if crashes else ""
    if slot.phase == "waiting" and slot.failures > 0:
        return slot.reason
    if slot.phase == "starting" and not slot.is_placed and slot.lasted_s(now_s) >= core.start_timeout_s:
        waits_for = slot.announcement.detail if slot.announcement is not None else ""
        return f"no room within {core.start_timeout_s:g} s" + (f": {waits_for}" if waits_for else "")
    return ""


def _next_of(old: list[Slot]) -> Slot:
    """Who serves nobody, nor soon will, first. Then prefill and decode in turns, so that pairs of one generation exist for as
    long as there can be any."""
    down = [slot for slot in old if not (slot.serves or slot.is_unheard or _comes_back(slot))]
    if down:
        return down[0]
    prefill = [slot for slot in old if slot.kind == "prefill"]
    decode = [slot for slot in old if slot.kind == "decode"]
    return prefill[0] if len(prefill) >= max(1, len(decode)) else decode[0] if decode else prefill[0]


def _comes_back(slot: Slot) -> bool:
    """Whether it has served before and is on its way up again, after one failed start at most."""
    on_its_way = slot.phase in ("waiting", "starting", "loading", "lost") and not slot.no_room
    return on_its_way and slot.ever_ready and slot.failures <= 1


def _away(slot: Slot) -> str:
    """Why it does not serve."""
    if slot.held:
        return "drained by hand"
    if slot.is_unheard:
        return "not heard yet"
    return "out for being slow" if slot.slow else slot.phase


def _swapped(core: Reconciler, update: RollingUpdate, victim: Slot) -> Role | None:
    """The role of the one that has turned to decode so that this one may go."""
    turned = core.slots.get(update.turned)
    swaps = victim.kind == "decode" and turned is not None and turned is not victim and turned.role == "decode"
    return "prefill" if swaps else None


def _serve(mode: Mode, slots: Iterable[Slot]) -> bool:
    return reason_against_generations(mode, [(slot.kind, slot.generation) for slot in slots]) is None
