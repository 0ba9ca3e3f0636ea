"""What bench/recovery.py makes of its cases: figures of each fault, and goals. Pure."""

import math
import statistics
from collections.abc import Sequence

from fault_outcome import ENDED_WITHIN_S, Outcome, worst
from fault_work import BURST, WORK_ON_VICTIM, work_needed
from report import Report

SEEN_WITHIN_S: dict[str, float] = {"kill": 0.1, "stop": 2.5, "partition": 2.5, "pair": 2.5}
DISPLACED_FEWEST = {"prefill": 1, "decode": WORK_ON_VICTIM}
"""Requests that go on elsewhere: of those aboard a prefill instance some may have been through."""
STOPPED_WITHIN_S = 5.0
"""Of a router: the work of its streams on the instances."""


def per_fault(outcomes: Sequence[Outcome]) -> dict[str, dict[str, float]]:
    """Medians and maxima, as docs/reliability.md has them."""
    found: dict[str, dict[str, float]] = {}
    for label in dict.fromkeys(outcome.fault.label for outcome in outcomes):
        mine = [outcome for outcome in outcomes if outcome.fault.label == label]
        of: dict[str, float] = {"cases": len(mine), "lost": sum(len(one.lost) for one in mine)}
        for name in ("seen_s", "gap_s", "strong_s", "stopped_s"):
            values = [value for one in mine if not math.isnan(value := getattr(one, name))]
            if values:
                of |= {f"{name}_median": statistics.median(values), f"{name}_max": max(values)}
        found[label] = of
    return found


def judge(found: Report, outcomes: Sequence[tuple[Outcome, float]]) -> None:
    """What was not measured, or had nothing to lose, is a goal missed."""
    every = [outcome for outcome, _ in outcomes]
    found.goal("requests_fewest", min(len(one.measured) for one in every), BURST, at_least=True)
    found.goal("on_victim_lacking", max(work_needed(one.fault) - one.on_victim for one in every), 0)
    found.goal("lost_requests", sum(len(one.lost) for one in every), 0)
    found.goal("wrong_tokens", sum(one.wrong for one in every), 0)
    found.goal("leaked", sum(sum(one.left.values()) for one in every), 0)
    found.goal("former_lives_left", sum(len(one.former) for one in every), 0)
    found.goal("others_restarted", sum(len(one.restarted) for one in every), 0)
    found.goal("not_back_at_full_strength", sum(math.isnan(one.strong_s) for one in every), 0)
    for label in dict.fromkeys(one.fault.label for one in every):
        cases = [(one, bound_s) for one, bound_s in outcomes if one.fault.label == label]
        role, kind = cases[0][0].fault.role, cases[0][0].fault.kind
        name = f"{kind}_{role}"
        if role == "router":
            found.goal(f"{name}_streams_ended_worst_s", worst(one.seen_s for one, _ in cases), ENDED_WITHIN_S)
            found.goal(f"{name}_work_stopped_worst_s", worst(one.stopped_s for one, _ in cases), STOPPED_WITHIN_S)
            found.goal(f"{name}_served_after_fewest", min(one.served_after for one, _ in cases), 1, at_least=True)
        elif role != "controller":
            found.goal(f"{name}_seen_worst_s", worst(one.seen_s for one, _ in cases), SEEN_WITHIN_S[kind])
        if kind == "pair":
            fewest = min(one.failed_handoffs for one, _ in cases)
            found.goal(f"{name}_failed_handoffs_fewest", fewest, 1, at_least=True)
        elif role in DISPLACED_FEWEST:
            fewest = min(len(one.displaced) for one, _ in cases)
            found.goal(f"{name}_displaced_fewest", fewest, DISPLACED_FEWEST[role], at_least=True)
        if role == "decode" and kind != "pair":
            found.goal(f"{name}_gap_over_bound_worst_s", worst(one.gap_s - bound_s for one, bound_s in cases), 0.0)
