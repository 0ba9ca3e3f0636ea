"""Charts over a common time axis, as an SVG file that any browser shows. Text only: nothing to install.

Pure: panels in, a string out.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Literal

WIDTH, PANEL_HEIGHT, GAP = 900, 110, 34
LEFT, RIGHT, TOP, BOTTOM = 70, 150, 44, 30
COLOURS = ("#1b6ca8", "#d1495b", "#2e8b57", "#8a5a9e", "#8c8c8c")


@dataclass(frozen=True, kw_only=True)
class Series:
    """``points`` as (x, y): joined, in steps (each y holds until the next x), or as dots."""

    name: str
    points: Sequence[tuple[float, float]]
    style: Literal["line", "step", "dots"] = "line"
    colour: str = ""
    dashed: bool = False


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One chart. ``most`` bounds the y axis, where a few far values would hide the others; they sit at its edge."""

    title: str
    series: Sequence[Series]
    least: float = 0.0
    most: float | None = None
    marks: Sequence[float] = field(default_factory=tuple)
    """Vertical lines."""


def svg(title: str, panels: Sequence[Panel], x_label: str = "seconds") -> str:
    """All panels above each other, over the same x."""
    xs = [x for panel in panels for series in panel.series for x, _ in series.points]
    low, high = min(xs, default=0.0), max(xs, default=1.0)
    high = high if high > low else low + 1.0
    height = height_of(len(panels))
    parts = [
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}" '
            'font-family="sans-serif" font-size="11">'
        ),
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        _text(LEFT, 20, title, size=14),
    ]
    for index, panel in enumerate(panels):
        parts += _panel(panel, TOP + index * (PANEL_HEIGHT + GAP), low, high, last=index == len(panels) - 1)
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, height - 6, x_label, anchor="middle"))
    return "\n".join([*parts, "</svg>"]) + "\n"


def height_of(num_panels: int) -> int:
    return TOP + num_panels * (PANEL_HEIGHT + GAP) + BOTTOM


def _panel(panel: Panel, top: float, low: float, high: float, *, last: bool) -> list[str]:
    ys = [y for series in panel.series for _, y in series.points if math.isfinite(y)]
    most = panel.most if panel.most is not None else max(ys, default=1.0) * 1.05
    most = most if most > panel.least else panel.least + 1.0
    right, bottom = WIDTH - RIGHT, top + PANEL_HEIGHT

    def at(x: float, y: float) -> tuple[float, float]:
        y = min(max(y, panel.least), most)
        share = (y - panel.least) / (most - panel.least)
        return LEFT + (x - low) / (high - low) * (right - LEFT), bottom - share * PANEL_HEIGHT

    parts = [_text(LEFT, top - 6, panel.title)]
    for tick in ticks(panel.least, most):
        _, y = at(low, tick)
        parts += [_line(LEFT, y, right, y, "#e4e4e4"), _text(LEFT - 6, y + 4, f"{tick:g}", anchor="end")]
    for tick in ticks(low, high):
        x, _ = at(tick, panel.least)
        parts.append(_line(x, top, x, bottom, "#f2f2f2"))
        if last:
            parts.append(_text(x, bottom + 14, f"{tick:g}", anchor="middle"))
    parts += [_line(at(x, 0)[0], top, at(x, 0)[0], bottom, "#555555", dashed=True) for x in panel.marks]
    for index, series in enumerate(panel.series):
        colour = series.colour or COLOURS[index % len(COLOURS)]
        places = [at(x, y) for x, y in series.points if math.isfinite(y)]
        if series.style == "dots":
            parts += [
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="1.6" fill="{colour}" fill-opacity="0.6"/>' for x, y in places
            ]
        elif places:
            dash = ' stroke-dasharray="4 3"' if series.dashed else ""
            path = _steps(places) if series.style == "step" else places
            joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in path)
            parts.append(f'<polyline points="{joined}" fill="none" stroke="{colour}" stroke-width="1.6"{dash}/>')
        parts.append(_text(right + 10, top + 12 + 15 * index, series.name, colour=colour))
    return [
        *parts,
        f'<rect x="{LEFT}" y="{top}" width="{right - LEFT}" height="{PANEL_HEIGHT}" fill="none" stroke="#999"/>',
    ]


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers from ``low`` to ``high``."""
    step = 10 ** math.floor(math.log10((high - low) / about))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= about)
    first = math.ceil(low / step - 1e-9)
    return [round(step * k, 10) for k in range(first, math.floor(high / step + 1e-9) + 1)]


def _steps(places: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    found = [places[0]]
    for x, y in places[1:]:
        found += [(x, found[-1][1]), (x, y)]
    return found


def _text(x: float, y: float, text: str, *, size: int = 11, anchor: str = "start", colour: str = "#222") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" fill="{colour}">{escape(text)}</text>'
    )


def _line(x: float, y: float, to_x: float, to_y: float, colour: str, *, dashed: bool = False) -> str:
    dash = ' stroke-dasharray="3 3"' if dashed else ""
    return f'<line x1="{x:.1f}" y1="{y:.1f}" x2="{to_x:.1f}" y2="{to_y:.1f}" stroke="{colour}"{dash}/>'
