"""How many instances of which role there should be, and what to do about it now. Pure: (policy, signals, state, now).

One decision for both roles. A load's best ratio (``ratio.py``) becomes the target once it has been recommended throughout
the stabilization time; ``moves.py`` approaches it. ``now_s`` is seconds since 1970: cooldowns hold over restarts, and
schedules need it.
"""

from collections.abc import Sequence
from dataclasses import replace

from biphase.planner.autoscaler_state import AutoscalerState, Decision, Hold, Recommendation
from biphase.planner.capacity import Setup, prior_of
from biphase.planner.fleet import Fleet
from biphase.planner.moves import Moves
from biphase.planner.policy import ROLES, Policy, other
from biphase.planner.ratio import Outlook, Ratio, choose, nearest, outside
from biphase.planner.reports import JointHistogram
from biphase.planner.schedules import in_force
from biphase.planner.signals import ClusterSignals
from biphase.protos.step_time import StepTime, attended
from biphase.protos.values import Role

MIN_STEPS = 20
"""An instance's fit counts from so many steps on."""

MIN_REQUESTS = 20
"""Measured attainment counts from so many requests on."""

REFERENCE: dict[Role, tuple[int, int]] = {"prefill": (512, attended(0, 512)), "decode": (16, 16 * 512)}
"""The work at which step times are compared."""


def decide(
    policy: Policy, signals: ClusterSignals, state: AutoscalerState, now_s: float, *, pinned: Ratio | None = None
) -> Decision:
    """What to do now. ``pinned``: the ratio that somebody asked for; it replaces the choice, not the bounds."""
    before = state
    policy, schedules = in_force(policy, now_s)
    fleet = Fleet(signals, policy, state.given_up)
    state = _observed(state, signals, fleet, now_s)
    steps = {role: state.of(role).step or prior_of(role, signals.setup.shape(role), policy.targets) for role in ROLES}
    outlook = Outlook(signals.load, steps, signals.setup, policy.targets)
    moves = Moves(policy, signals, fleet, state, now_s, outlook=outlook, pinned=pinned is not None)
    moves.give_up_late_starts()
    if pinned is not None:
        target = nearest(pinned, policy, signals.setup)
        if target == pinned:
            moves.say("pin", f"pinned to {pinned}")
        else:
            why = outside(pinned, policy, signals.setup) or f"{target} comes nearest within the bounds"
            moves.say(f"pin {pinned} {target}", f"pinned to {pinned}, {target} is kept: {why}")
        moves.towards(target, target)
        return moves.decision(before, target)
    if 2 * signals.num_heard < signals.num_known:
        reason = f"{signals.num_heard} of {signals.num_known} instances report, under half"
        moves.say("hold", f"hold: {reason}")
        return moves.decision(before, fleet.ratio, (Hold(reason=reason),))
    for label in schedules:
        moves.say(f"schedule {label}", f"schedule {label} is on")
    for text in outlook.unreachable:
        moves.say(text.split(" ")[0], text)
    target, ideal = _target(policy, signals, fleet, moves, outlook, now_s)
    moves.towards(target, ideal)
    return moves.decision(before, target)


def reason_against(
    ratio: Ratio, policy: Policy, setup: Setup, now_s: float, *, roles: Sequence[Role] = ROLES, total: bool = True
) -> str | None:
    """Why somebody may not pin this ratio now, in one line with value and limit; None where they may.

    ``roles``: those whose number they give; ``total``: whether the GPUs of all change.
    """
    policy, schedules = in_force(policy, now_s)
    found = outside(ratio, policy, setup, roles=roles, total=total)
    if found is None:
        return None
    return found + (f" (schedule {', '.join(schedules)} is on)" if schedules else "")


def _observed(state: AutoscalerState, signals: ClusterSignals, fleet: Fleet, now_s: float) -> AutoscalerState:
    """The state brought up to what really happened: step times, changes by others, starts that came to serve."""
    ready = [member for member in signals.members if member.phase == "ready"]
    for role in ROLES:
        seen = state.of(role)
        wanted = fleet.wanted(role)
        changed_s = now_s if seen.expected not in (None, wanted) else seen.changed_s
        # one that comes back, or a life of the controller that sees all come to serve, says nothing of new starts
        served = any(member.role == role and member.name not in state.served for member in ready)
        state = state.having(
            role,
            step=_fitted(signals, role) or seen.step,
            # a clock that was set back must not hold things for ever
            changed_s=None if changed_s is None else min(changed_s, now_s),
            expected=wanted,
            failed_starts=0 if served else seen.failed_starts,
            start_after_s=0.0 if served else seen.start_after_s,
        )
    starting = {member.name for member in signals.members if member.phase == "starting"}
    known = set(state.served) | {member.name for member in ready}
    return replace(
        state,
        served=tuple(member.name for member in signals.members if member.name in known),
        given_up=tuple(name for name in state.given_up if name in starting),
        flipped_s=None if state.flipped_s is None else min(state.flipped_s, now_s),
    )


def _fitted(signals: ClusterSignals, role: Role) -> StepTime | None:
    """The step time of the middle one of all instances that know theirs: one liar does not decide."""
    found = [report.prefill_step if role == "prefill" else report.decode_step for report in signals.instances]
    known = [step for step in found if step.num_steps >= MIN_STEPS and step.is_known]
    known.sort(key=lambda step: step.seconds(*REFERENCE[role]))
    return known[(len(known) - 1) // 2] if known else None


def _target(
    policy: Policy, signals: ClusterSignals, fleet: Fleet, moves: Moves, outlook: Outlook, now_s: float
) -> tuple[Ratio, Ratio]:
    """(what to have with the GPUs that are there, what to have with new nodes too), both stabilized."""
    current = fleet.ratio
    here_gpus = fleet.gpus + fleet.idle_gpus
    now = choose(outlook, policy, current, most_gpus=here_gpus)
    ideal = now
    if here_gpus < policy.gpu_budget.max:
        ideal = choose(outlook, policy, current, most_gpus=policy.gpu_budget.max)
    if signals.watched_s >= min(2 * policy.interval_s, policy.window_s):  # one report says nothing yet
        moves.recommend(Recommendation(at_s=now_s, now=now, ideal=ideal))
    ups, downs = moves.agreeing("up"), moves.agreeing("down")
    counts: dict[Role, int] = {}
    wishes: dict[Role, int] = {}
    for role in ROLES:
        bounds, have = policy.bounds(role), current.of(role)
        least = min((item.now.of(role) for item in ups), default=have)
        most = max((item.now.of(role) for item in downs), default=have)
        counts[role] = least if least > have else min(most, have)
        if fleet.over_budget:  # bounds are kept at once: they are orders, not estimates
            counts[role] = min(counts[role], now.of(role))
        counts[role] = min(max(counts[role], bounds.min_replicas), bounds.max_replicas)
        wishes[role] = max(counts[role], min((item.ideal.of(role) for item in ups), default=0))
    missing = fleet.missing(policy)
    if missing is not None:
        counts = _repaired(policy, signals.setup, current, missing, min(here_gpus, policy.gpu_budget.max))
        wishes = {role: max(counts[role], wishes[role]) for role in ROLES}
    target = Ratio(prefill=counts["prefill"], decode=counts["decode"])
    kept = _vetoed(policy, signals, outlook, current, target)
    if kept:
        *_, both, requests = _measured(signals).shares(policy.targets.ttft_ms, policy.targets.tpot_ms)
        names = " and ".join(kept) + (" stay" if len(kept) > 1 else " stays")
        more = ", more was forecast" if outlook.attainment(current) >= policy.targets.attainment else ""
        moves.say("veto", f"{names}: only {both:.0%} of {requests} requests met their goals{more}")
        target = Ratio(**{role: current.of(role) if role in kept else target.of(role) for role in ROLES})
    return target, Ratio(prefill=wishes["prefill"], decode=wishes["decode"])


def _repaired(policy: Policy, setup: Setup, current: Ratio, missing: Role, most_gpus: float) -> dict[Role, int]:
    """At once: its minimum of the role that nobody serves, and of the other one what that leaves. More waits as ever."""
    kept = other(missing)
    counts: dict[Role, int] = {missing: policy.bounds(missing).min_replicas, kept: current.of(kept)}
    counts[kept] = min(counts[kept], policy.bounds(kept).max_replicas)

    def fits() -> bool:
        return Ratio(prefill=counts["prefill"], decode=counts["decode"]).gpus(setup) <= most_gpus + 1e-9

    while not fits() and counts[kept] > policy.bounds(kept).min_replicas:
        counts[kept] -= 1
    if missing == "decode" and not fits() and not setup.strict:
        return {"prefill": max(0, current.prefill - 1), "decode": 1}  # which can prefill too
    return counts


def _vetoed(policy: Policy, signals: ClusterSignals, outlook: Outlook, current: Ratio, target: Ratio) -> list[Role]:
    """Roles that may not shrink for want of load: goals are missed though the forecast says that all is well, or requests
    that nobody has served are too many, whatever it says."""
    targets = policy.targets
    shrinks = target != current and all(target.of(role) <= current.of(role) for role in ROLES)
    if not shrinks or current.gpus(signals.setup) > policy.gpu_budget.max:
        return []
    newest = _measured(signals)
    *shares, both, requests = newest.shares(targets.ttft_ms, targets.tpot_ms)
    late: list[Role] = []
    if requests < MIN_REQUESTS:
        return []
    if newest.missed > (1 - targets.attainment) * requests:  # refused, expired, failed: that names no role
        late = list(ROLES)
    elif outlook.attainment(current) >= targets.attainment:
        least = min(targets.attainment, targets.percentile / 100)
        late = [role for role, share in zip(ROLES, shares, strict=True) if share < least]
        if not late and both < targets.attainment:  # each role has a part in it
            late = list(ROLES)
    return [role for role in late if target.of(role) < current.of(role) <= policy.bounds(role).max_replicas]


def _measured(signals: ClusterSignals) -> JointHistogram:
    """What was missed before the last change of the ratio says nothing of this one: where there is enough, what is newest."""
    newest = signals.recent
    return newest if sum(newest.counts) + newest.missed >= MIN_REQUESTS else signals.latency
