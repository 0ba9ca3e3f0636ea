"""A recorded history of signals: one JSON object per line, first the deployment, then a moment each. Pure.

{"setup": {...}} then {"unix_s": ..., "members": [...], "room": {...}, "reports": [...]}, reports as they came, cumulative.
Another {"setup": ...} holds from there on.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from biphase.planner.capacity import RoleShape, Setup
from biphase.planner.reports import Member, Report, Room, RouterReport, instance_from, is_sound, router_from, to_values
from biphase.protos.errors import SetupError, one_line
from biphase.protos.step_time import StepTime


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """What was known at one tick: the instances, the room, and the reports since the tick before. ``setup``: the deployment
    from here on, where it has become another."""

    unix_s: float
    members: tuple[Member, ...] = ()
    room: Room = field(default_factory=Room)
    reports: tuple[Report, ...] = ()
    setup: Setup | None = None


def setup_line(setup: Setup) -> str:
    return json.dumps({"setup": asdict(setup)})


def moment_line(moment: Moment) -> str:
    """Without a line's end and without ``setup``, which has a line of its own; what was left at its default is left out."""
    reports = [
        {"kind": "router" if isinstance(report, RouterReport) else "instance", **_short(to_values(report))}
        for report in moment.reports
    ]
    return json.dumps(
        {
            "unix_s": round(moment.unix_s, 3),
            "members": [_short(to_values(member)) for member in moment.members],
            "room": _short(to_values(moment.room)),
            "reports": reports,
        },
        separators=(",", ":"),
    )


def read_history(lines: Iterable[str], *, source: str) -> tuple[Setup, Iterator[Moment]]:
    """The deployment at first and the moments. Raises SetupError, one line with the line's number, for what is no history."""
    numbered = ((number, line) for number, line in enumerate(lines, 1) if line.strip())
    number, first = next(numbered, (0, ""))
    if not number:
        raise SetupError(f"{source}: an empty file holds no history")
    try:
        setup = _setup(json.loads(first)["setup"])
    except (ValueError, KeyError, TypeError) as error:
        raise SetupError(
            f"{source}:{number}: this is no history of signals, whose first line is {{'setup': ...}} ({one_line(error)})"
        ) from error
    return setup, _moments(numbered, source)


def _moments(numbered: Iterator[tuple[int, str]], source: str) -> Iterator[Moment]:
    last_s = float("-inf")
    setup: Setup | None = None
    for number, line in numbered:
        try:
            values = json.loads(line)
            if "setup" in values:
                setup = _setup(values["setup"])
                continue
            moment = Moment(
                unix_s=float(values["unix_s"]),
                members=tuple(Member(**member) for member in values["members"]),
                room=_room(values.get("room", {})),
                reports=tuple(_report(dict(report)) for report in values["reports"]),
                setup=setup,
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise SetupError(f"{source}:{number}: not a moment of a history: {one_line(error)}") from error
        if moment.unix_s <= last_s:
            raise SetupError(f"{source}:{number}: unix_s is {moment.unix_s:g}, not after {last_s:g} of the line before")
        last_s, setup = moment.unix_s, None
        yield moment


def _report(values: dict[str, Any]) -> Report:
    kind = values.pop("kind")
    if kind not in ("router", "instance"):
        raise ValueError(f"kind is {kind!r}; it is one of router, instance")
    report: Report = router_from(values) if kind == "router" else instance_from(values)
    if not is_sound(report):
        raise ValueError(f"the report of {report.name} holds a negative or infinite number")
    return report


def _setup(values: dict[str, Any]) -> Setup:
    return Setup(**{**values, **{role: _shape(values[role]) for role in ("prefill", "decode")}})


def _shape(values: dict[str, Any]) -> RoleShape:
    return RoleShape(**{**values, "step_time": StepTime(**values.get("step_time", {}))})


def _room(values: dict[str, Any]) -> Room:
    return Room(**{**values, "came": tuple(values.get("came", ()))})


def _short(values: dict[str, Any]) -> dict[str, Any]:
    """Without what is at zero or empty, which the values' defaults give back."""
    inner = {key: _short(value) if isinstance(value, dict) else value for key, value in values.items()}
    return {key: value for key, value in inner.items() if value not in (0, "", {}, (), [], False)}
