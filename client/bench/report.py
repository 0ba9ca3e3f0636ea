"""The figures for people, as a table of text, and for programs, as JSON. No I/O."""

import math
from collections.abc import Sequence
from typing import Any

from biphase.client.bench.arrivals import Phase
from biphase.client.bench.goals import Goals
from biphase.client.bench.measured import Measured
from biphase.client.bench.settings import Settings
from biphase.client.bench.summary import PERCENTILES, Summary, summarize

_NAMES = {"ttft": "TTFT", "tpot": "TPOT", "itl": "ITL", "e2e": "E2E"}


def lines(summary: Summary, goals: Goals) -> list[str]:
    """The table."""
    per_second = summary.per_second
    failed = summary.offered - summary.done
    found = [
        f"requests       {summary.offered} offered, {summary.done} done, {failed} not, in {summary.seconds:.1f} s",
        f"rate           {summary.offered_per_second:.2f} requests/s offered, {per_second(summary.done):.2f} done",
        f"tokens         {per_second(summary.input_tokens):.1f}/s in, {per_second(summary.output_tokens):.1f}/s out",
    ]
    head = f"{'ms':<14}" + "".join(f"{column:>10}" for column in ("mean", *(f"p{p}" for p in PERCENTILES), "max"))
    found += ["", head]
    for metric, spread in summary.spreads.items():
        values = (spread.mean, *spread.percentiles.values(), spread.maximum)
        found.append(f"{_NAMES[metric]:<14}" + "".join(f"{value:>10.1f}" for value in values))
    found.append("")
    if summary.attainment is not None:
        words = ", ".join(f"{_NAMES[metric]} <= {bound:g} ms" for metric, bound in goals.items())
        found.append(f"attainment     {100 * summary.attainment:.1f} % of all requests ({words})")
        found.append(f"goodput        {summary.goodput:.2f} requests/s")
    if summary.checked:
        found.append(f"tokens checked {summary.checked} answers, {summary.wrong} wrong")
    if summary.replays:
        found.append(f"replays        {summary.replays}")
    for kind, count in summary.errors.items():
        found.append(f"{count:>6} {kind}: {summary.examples[kind]}")
    if summary.late_ms > 100:
        found.append(f"the generator itself was up to {summary.late_ms:.0f} ms late: its machine is too busy")
    while not found[-1]:
        found.pop()
    return found


def phase_lines(settings: Settings, measured: Sequence[Measured]) -> list[str]:
    """A row for each phase, by when its requests were due; none where there is one phase alone."""
    if len(settings.phases) == 1:
        return []
    head = f"{'phase':<20}{'requests/s':>12}{'done':>12}{'TTFT p50':>10}{'p90':>8}{'TPOT p50':>10}{'p90':>8}"
    rows = [head + (f"{'attainment':>12}" if settings.goals else "")]
    for phase, summary in by_phase(settings, measured):
        row = f"{phase.name[:19]:<20}{summary.offered_per_second:>12.2f}{f'{summary.done}/{summary.offered}':>12}"
        for spread in (summary.spreads.get("ttft"), summary.spreads.get("tpot")):
            median, high = ("-", "-") if spread is None else (f"{spread.percentiles[p]:.1f}" for p in (50, 90))
            row += f"{median:>10}{high:>8}"
        if summary.attainment is not None:
            row += f"{100 * summary.attainment:>10.1f} %"
        rows.append(row)
    return ["", *rows]


def by_phase(settings: Settings, measured: Sequence[Measured]) -> list[tuple[Phase, Summary]]:
    found, began_s = [], 0.0
    for index, phase in enumerate(settings.phases):
        mine = [one for one in measured if one.phase == index]
        found.append((phase, summarize(mine, settings.goals, began_s)))
        began_s += phase.seconds
    return found


def document(settings: Settings, measured: Sequence[Measured], model: str) -> dict[str, Any]:
    """Everything, every request too, as JSON takes it."""
    ordered = sorted(measured, key=lambda one: one.index)
    parts = []
    for phase, summary in by_phase(settings, ordered):
        part = {
            "name": phase.name,
            "seconds": _finite(phase.seconds),
            "rate": [_finite(phase.rate), _finite(phase.rate_end)],
        }
        part |= {"input_len": str(phase.input_tokens), "output_len": str(phase.output_tokens)}
        parts.append({**part, **summary_values(summary)})
    return {
        "bench": "load",
        "model": model,
        "addresses": list(settings.addresses),
        "seed": settings.seed,
        "salt": settings.salt,
        "goals": dict(settings.goals),
        "all": summary_values(summarize(ordered, settings.goals)),
        "phases": parts,
        "requests": [request_values(one) for one in ordered],
    }


def summary_values(summary: Summary) -> dict[str, Any]:
    return {
        "seconds": summary.seconds,
        "offered": summary.offered,
        "done": summary.done,
        "errors": dict(summary.errors),
        "examples": dict(summary.examples),
        "input_tokens": summary.input_tokens,
        "output_tokens": summary.output_tokens,
        "offered_per_s": _finite(summary.offered_per_second),
        "requests_per_s": summary.per_second(summary.done),
        "output_tokens_per_s": summary.per_second(summary.output_tokens),
        "attainment": summary.attainment,
        "goodput": summary.goodput,
        "checked": summary.checked,
        "wrong": summary.wrong,
        "replays": summary.replays,
        "late_ms": summary.late_ms,
        **{
            f"{metric}_ms": {
                "mean": spread.mean,
                **{f"p{percent}": value for percent, value in spread.percentiles.items()},
                "max": spread.maximum,
                "count": spread.count,
            }
            for metric, spread in summary.spreads.items()
        },
    }


def request_values(one: Measured) -> dict[str, Any]:
    return {
        "index": one.index,
        "phase": one.phase,
        "due_s": one.due_s,
        "sent_s": one.sent_s,
        "ended_s": one.ended_s,
        "ttft_ms": one.ttft_ms,
        "tpot_ms": one.tpot_ms,
        "longest_gap_ms": max(one.itl_ms, default=None),
        "input_tokens": one.input_tokens,
        "output_tokens": one.output_tokens,
        "kind": one.kind,
        "detail": one.detail,
        "wrong": one.wrong,
        "replays": one.replays,
        "decision": one.decision,
        "prefill_instance": one.prefill_instance,
        "decode_instance": one.decode_instance,
        "address": one.address,
    }


def _finite(value: float) -> float | None:
    """JSON has no infinity."""
    return value if math.isfinite(value) else None
