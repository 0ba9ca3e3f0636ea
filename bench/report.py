"""What every bench prints and writes alike: a table, a JSON file, one line per goal, and the exit code of --check."""

import argparse
import json
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """One figure that has to hold: ``value`` at most (or at least) ``bound``."""

    name: str
    value: float
    bound: float
    at_least: bool = False

    @property
    def met(self) -> bool:
        return self.value >= self.bound if self.at_least else self.value <= self.bound

    def __str__(self) -> str:
        sign = ">=" if self.at_least else "<="
        return f"GOAL {self.name} {self.value:.4g} {sign}{self.bound:g} {'met' if self.met else 'missed'}"


@dataclass
class Report:
    """Collects a bench's rows and goals; ``finish`` prints, writes and gives the exit code."""

    bench: str
    columns: Sequence[str]
    rows: list[Sequence[Any]] = field(default_factory=list)
    goals: list[Goal] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)

    def row(self, *values: Any) -> None:
        self.rows.append(values)

    def goal(self, name: str, value: float, bound: float, *, at_least: bool = False) -> None:
        self.goals.append(Goal(name=name, value=value, bound=bound, at_least=at_least))

    def table(self) -> str:
        cells = [[str(column) for column in self.columns]]
        cells += [[f"{value:.4g}" if isinstance(value, float) else str(value) for value in row] for row in self.rows]
        widths = [max(len(row[index]) for row in cells) for index in range(len(self.columns))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells
        ]
        return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])

    def write(self, arguments: argparse.Namespace) -> None:
        """The JSON file, where one is asked for: with all that is known so far."""
        if not arguments.json:
            return
        document = {
            "bench": self.bench,
            "machine": {"cores": os.cpu_count(), "python": platform.python_version(), "load": os.getloadavg()},
            "columns": list(self.columns),
            "rows": [list(row) for row in self.rows],
            "goals": [{**asdict(goal), "met": goal.met} for goal in self.goals],
            **self.extra,
        }
        Path(arguments.json).parent.mkdir(parents=True, exist_ok=True)
        Path(arguments.json).write_text(json.dumps(document, indent=1) + "\n")

    def finish(self, arguments: argparse.Namespace) -> int:
        print(self.table())
        self.write(arguments)
        for goal in self.goals:
            print(goal, flush=True)
        return 1 if arguments.check and not all(goal.met for goal in self.goals) else 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that every bench has."""
    parser.add_argument("--json", metavar="FILE", help="also write the figures there")
    parser.add_argument("--check", action="store_true", help="exit 1 when a goal is missed")


def run(main: Any) -> None:
    """``if __name__ == "__main__": run(main)``: exit with main's code, quietly on Ctrl-C."""
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
