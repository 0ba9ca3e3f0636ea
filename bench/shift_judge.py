"""What bench/live_shift.py makes of its runs: attainment, windows, turns of instances, and its goals. Pure."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from fault_outcome import worst
from report import Report

from biphase.client.bench.arrivals import Arrival, Phase
from biphase.client.bench.goals import Metric
from biphase.client.bench.measured import Measured
from biphase.client.bench.summary import spread_of, summarize, windows

INSTANCES = 3
PHASE_S, SETTLE_S, WINDOW_S, COOLDOWN_S = 150.0, 60.0, 30.0, 30.0
FEWEST_IN_WINDOW = 40
ATTAINED, WINDOW_ATTAINED, WRONG_ATTAINED, HEADROOM = 0.9, 0.75, 0.5, 0.25
FLIP_GRACE_S, TURN_S = 10.0, 1.0
DRAIN_SLACK_S = 1.0
"""What is left at the end of the grace ends within one step, here of an instance with half a core."""
RIGHT = {"prefill-heavy": "2P1D", "decode-heavy": "1P2D"}
AUTO = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """What the router said of an instance when it was asked."""

    asked_unix_s: float
    role: str
    state: str
    since_unix_s: float
    legs: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One flip: seconds from the order to drained, and from there to serving in the new role; infinite where it has not."""

    name: str
    drain_s: float
    turn_s: float


def turn_of(name: str, ordered_unix_s: float, looks: Sequence[Look]) -> Turn:
    """``looks`` at the instance, the last one before the order and those after it, as far as the next order.

    Drained is when it was last asked about while it had requests, so that the time between two looks counts as turning;
    serving is since when the router has it as ready in another role.
    """
    before = [look for look in looks if look.asked_unix_s <= ordered_unix_s]
    after = [look for look in looks if look.asked_unix_s > ordered_unix_s]
    if not before:
        return Turn(name=name, drain_s=math.inf, turn_s=math.inf)
    role = before[-1].role
    serving = next((look for look in after if look.role != role and look.state == "ready"), None)
    busy = [look.asked_unix_s for look in after if look.role == role and look.legs]
    drained_unix_s = max(busy, default=ordered_unix_s)
    if serving is None:
        return Turn(name=name, drain_s=math.inf, turn_s=math.inf)
    return Turn(name=name, drain_s=drained_unix_s - ordered_unix_s, turn_s=serving.since_unix_s - drained_unix_s)


@dataclass(kw_only=True)
class Arm:
    """One run over the whole load."""

    name: str
    headroom: float = math.nan
    """Of a fixed ratio, in the phase that it suits: the share of its measured capacity that the load leaves."""
    measured: list[Measured] = field(default_factory=list)
    ratios: list[tuple[float, int, int]] = field(default_factory=list)
    """(seconds, ready prefill instances, ready decode instances), at every change."""
    decisions: list[str] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)


def fewest_in_window(due: Sequence[Arrival], until_s: float) -> int:
    """Requests in the emptiest window of the load, as it is due."""
    counts = [0] * math.ceil(until_s / WINDOW_S)
    for one in due:
        counts[int(one.at_s / WINDOW_S)] += 1
    return min(counts, default=0)


def phases_run(name: str, phases: Sequence[Phase]) -> list[int]:
    """Those that an arm runs. A fixed ratio begins each of them empty, so that one that comes again would show nothing new."""
    names = [phase.name for phase in phases]
    return [index for index in range(len(names)) if name == AUTO or names[index] not in names[:index]]


def parts_of(name: str, due: Sequence[Arrival], phases: Sequence[Phase]) -> list[tuple[float, list[Arrival]]]:
    """What an arm sends without a pause: (when it begins in the load, its requests, due from there on).

    The autoscaler has the whole load at once. A fixed ratio ends the work of a phase before the next: what the one that it is
    wrong for has left behind says nothing of the one that it is right for.
    """
    if name == AUTO:
        return [(0.0, list(due))]
    begins = {index: sum(phase.seconds for phase in phases[:index]) for index in phases_run(name, phases)}
    return [
        (begin_s, [replace(one, at_s=one.at_s - begin_s) for one in due if one.phase == index])
        for index, begin_s in begins.items()
    ]


def attained(measured: Sequence[Measured], goals: dict[Metric, float]) -> float:
    share = summarize(measured, goals).attainment if measured else None
    return math.nan if share is None else share


def judge(found: Report, arms: Sequence[Arm], goals: dict[Metric, float], phases: Sequence[Phase]) -> None:
    """Rows and goals. What was not measured is a goal missed."""
    found.goal("ratios_in_the_table", len({arm.name for arm in arms}), 3, at_least=True)
    found.goal("phase_s", min(phase.seconds for phase in phases), PHASE_S, at_least=True)
    for arm in arms:
        for index in phases_run(arm.name, phases):
            _judge_phase(found, arm, goals, index, phases)
        if arm.name == AUTO:
            _judge_policy(found, arm)
        else:
            found.goal(f"{arm.name}_headroom_where_right", arm.headroom, HEADROOM, at_least=True)


def _judge_phase(found: Report, arm: Arm, goals: dict[Metric, float], index: int, phases: Sequence[Phase]) -> None:
    phase, turn_s = phases[index], sum(one.seconds for one in phases[:index])
    until_s = turn_s + phase.seconds
    mine = [one for one in arm.measured if turn_s + SETTLE_S <= one.due_s < until_s]
    settled = attained(mine, goals)
    whole = windows(mine, WINDOW_S, until_s)[math.ceil((turn_s + SETTLE_S) / WINDOW_S) :]
    shares = [attained(window, goals) for window in whole]
    lowest = min((-1.0 if math.isnan(share) else share for share in shares), default=math.nan)
    ttft = spread_of([one.ttft_ms for one in mine if one.ttft_ms is not None])
    tpot = spread_of([one.tpot_ms for one in mine if one.tpot_ms is not None])
    found.row(
        arm.name,
        phase.name,
        len(mine),
        settled,
        lowest,
        ttft.percentiles[90] if ttft else math.nan,
        tpot.percentiles[90] if tpot else math.nan,
        sum(not one.done for one in arm.measured if turn_s <= one.due_s < until_s),
    )
    name = f"{arm.name}_{index}_{phase.name}"
    found.goal(f"{name}_fewest_in_window", min(map(len, whole), default=0), FEWEST_IN_WINDOW, at_least=True)
    if arm.name == AUTO:
        found.goal(f"{name}_attainment", settled, ATTAINED, at_least=True)
        found.goal(f"{name}_worst_window", lowest, WINDOW_ATTAINED, at_least=True)
    elif arm.name == RIGHT[phase.name]:
        found.goal(f"{name}_attainment_right", settled, ATTAINED, at_least=True)
    else:
        found.goal(f"{name}_attainment_wrong", settled, WRONG_ATTAINED)


def _judge_policy(found: Report, arm: Arm) -> None:
    found.goal("auto_failed", sum(not one.done for one in arm.measured), 0)
    found.goal("auto_reversals_within_cooldown", reversals(arm.ratios), 0)
    found.goal("auto_changes_of_ratio", len(settled_ratios(arm.ratios)) - 1, 2, at_least=True)
    found.goal("auto_flips", len(arm.turns), 2, at_least=True)
    found.goal("flip_drain_worst_s", worst(turn.drain_s for turn in arm.turns), FLIP_GRACE_S + DRAIN_SLACK_S)
    found.goal("flip_turn_worst_s", worst(turn.turn_s for turn in arm.turns), TURN_S)


def settled_ratios(ratios: Sequence[tuple[float, int, int]]) -> list[tuple[float, int, int]]:
    """Those with every instance ready: an instance that turns is away for a moment."""
    found: list[tuple[float, int, int]] = []
    for one in ratios:
        if sum(one[1:]) == INSTANCES and (not found or found[-1][1:] != one[1:]):
            found.append(one)
    return found


def reversals(ratios: Sequence[tuple[float, int, int]]) -> int:
    """Changes that take back the one before within the cooldown."""
    found = settled_ratios(ratios)
    return sum(
        later[1:] == earlier[1:] and later[0] - between[0] < COOLDOWN_S
        for earlier, between, later in zip(found, found[1:], found[2:], strict=False)
    )
