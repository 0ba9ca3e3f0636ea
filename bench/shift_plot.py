"""The picture of bench/live_shift.py: rate, ratio, TTFT and TPOT against their goals, and attainment, over time. Pure."""

from collections.abc import Mapping, Sequence
from typing import Protocol

from svg_plot import COLOURS, Panel, Series, svg

from biphase.client.bench.arrivals import Phase, total_s
from biphase.client.bench.goals import Metric
from biphase.client.bench.measured import Measured
from biphase.client.bench.summary import summarize, windows

_RATE_WINDOW_S = 10.0
_GOAL_SHARE = 0.6
"""How high in its chart a goal's line is."""


class Run(Protocol):
    """What bench/live_shift.py knows of one run."""

    name: str
    measured: list[Measured]
    ratios: list[tuple[float, int, int]]


def picture(arms: Sequence[Run], phases: Sequence[Phase], goals: Mapping[Metric, float], window_s: float) -> str:
    """As SVG. The first arm is drawn in full, the others by their attainment."""
    end_s = total_s(phases)
    turns = [sum(phase.seconds for phase in phases[:index]) for index in range(1, len(phases))]
    first = arms[0]
    parts = windows(first.measured, _RATE_WINDOW_S, end_s)
    rates = [
        Series(name="prompt tokens/s", points=_per_window(parts, lambda one: one.input_tokens), style="step"),
        Series(name="output tokens/s", points=_per_window(parts, lambda one: one.asked_tokens), style="step"),
    ]
    ratio = [
        Series(name="prefill", points=_until([(at, p) for at, p, _ in first.ratios], end_s), style="step"),
        Series(name="decode", points=_until([(at, d) for at, _, d in first.ratios], end_s), style="step"),
    ]
    panels = [
        Panel(title="offered load", series=rates, marks=turns),
        Panel(title=f"ready instances ({first.name})", series=ratio, least=0, most=3, marks=turns),
    ]
    for metric in goals:
        dots = [(one.due_s, value) for one in first.measured if (value := one.value(metric)) is not None]
        panels.append(
            Panel(
                title=f"{metric.upper()}, ms ({first.name})",
                series=[
                    Series(name="requests", points=dots, style="dots"),
                    Series(
                        name="goal",
                        points=[(0.0, goals[metric]), (end_s, goals[metric])],
                        colour=COLOURS[1],
                        dashed=True,
                    ),
                ],
                most=goals[metric] / _GOAL_SHARE,
                marks=turns,
            )
        )
    shares = [
        Series(name=arm.name, points=shares_of(arm, goals, window_s, end_s), style="step", dashed=arm is not first)
        for arm in arms
    ]
    panels.append(Panel(title=f"attainment, % of {window_s:g} s", series=shares, most=100, marks=turns))
    return svg("The P:D ratio follows the load", panels)


def _per_window(parts, tokens):  # type: ignore[no-untyped-def]
    return [
        (index * _RATE_WINDOW_S, sum(tokens(one) for one in part) / _RATE_WINDOW_S) for index, part in enumerate(parts)
    ]


def shares_of(arm: Run, goals: Mapping[Metric, float], window_s: float, end_s: float) -> list[tuple[float, float]]:
    """Percent of the requests of each window, as far as the arm has some."""
    until_s = min(end_s, max((one.due_s for one in arm.measured), default=0.0) + window_s)
    found = [
        (index * window_s, 100 * (summarize(window, goals).attainment or 0.0))
        for index, window in enumerate(windows(arm.measured, window_s, end_s))
    ]
    whole_s = window_s * (until_s // window_s)
    return _until([point for point in found if point[0] < whole_s], whole_s)


def _until(points: Sequence[tuple[float, float]], end_s: float) -> list[tuple[float, float]]:
    """The last value holds to the end."""
    return [*points, (end_s, points[-1][1])] if points else []
