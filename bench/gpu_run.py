"""Runs the parts of scripts/gpu_check.sh: each in processes of its own, cut at its limit, its result written as it ends.
Knows nothing of GPUs: parts are handed in."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CUT = 124
"""Exit code of what was stopped at its limit."""


@dataclass
class Outcome:
    """How a part went, in Markdown. ``compiled``: kernels that it was the first to need."""

    ok: bool
    lines: list[str] = field(default_factory=list)
    part: str = ""
    seconds: float = 0.0
    cut: bool = False
    compiled: int = 0

    @property
    def result(self) -> str:
        said = "ok" if self.ok else "**failed**"
        return f"{said}, cut at its limit" if self.cut else said


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """``run`` leaves its file in ``Check.out`` and returns how it went; what it raises is a failure of this part alone."""

    limit_s: float
    run: Callable[["Check"], Outcome]


class Check:
    """One run: where results go, an environment for its processes, deadlines."""

    def __init__(
        self, out: Path, *, seconds: float, environment: Mapping[str, str], smoke: bool = False, capability: int = 0
    ) -> None:
        self.out = out
        self.smoke = smoke
        self.capability = capability
        self.environment = dict(environment)
        self.cut = False
        self._ends_s = self._part_ends_s = time.monotonic() + seconds
        self._running: set[int] = set()

    @contextmanager
    def until(self, part_ends_s: float) -> Iterator[None]:
        """Within it no process outlives that time."""
        self.cut = False
        self._part_ends_s = min(part_ends_s, self._ends_s)
        try:
            yield
        finally:
            self._part_ends_s = self._ends_s

    @property
    def left_s(self) -> float:
        return self._part_ends_s - time.monotonic()

    def run(
        self, command: Sequence[str], *, limit_s: float = float("inf"), environment: Mapping[str, str] | None = None
    ) -> tuple[int, str]:
        """Exit code (CUT at the limit) and all output. Threads may call it at once."""
        left_s = min(limit_s, self.left_s)
        if left_s <= 1:
            self.cut = True
            return CUT, "no time left"
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=self.environment | dict(environment or {}),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self._running.add(process.pid)
        try:
            output, _ = process.communicate(timeout=left_s)
        except subprocess.TimeoutExpired:
            self.cut = True
            _kill(process.pid)
            output, _ = process.communicate()
            return CUT, output + f"\nstopped after {left_s:.0f} s"
        finally:
            self._running.discard(process.pid)
        return process.returncode, output

    def stop(self) -> None:
        """Ends what is still running, children of it too."""
        for pid in list(self._running):
            _kill(pid)

    def bench(
        self, name: str, *arguments: str, limit_s: float = float("inf"), environment: Mapping[str, str] | None = None
    ) -> tuple[int, dict[str, Any], list[str]]:
        """Exit code, its JSON (what there was of it when it was stopped), and its last lines if it failed."""
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "out.json"
            command = [sys.executable, f"bench/{name}", "--json", str(file), *arguments]
            code, output = self.run(
                command + (["--smoke"] if self.smoke else []), limit_s=limit_s, environment=environment
            )
            found = _json(file)
        if code == 0 and not found:
            code, output = 1, f"{output}\n{name} wrote no JSON"
        return code, found, [f"{name}: exit code {code}", "```", *output.splitlines()[-25:], "```"] if code else []


def run_parts(
    check: Check,
    parts: Mapping[str, Part],
    names: Sequence[str],
    *,
    title: str,
    cache: Path,
    say: Callable[[str], None],
) -> list[Outcome]:
    """In the order of ``names``. A part may take what those before it have left over of their limits."""
    outcomes: list[Outcome] = []
    ends_s = time.monotonic()
    for name in names:
        ends_s += parts[name].limit_s
        began_s, before = time.monotonic(), num_compiled(cache)
        with check.until(ends_s):
            try:
                outcome = parts[name].run(check)
            except Exception as error:  # noqa: BLE001 -- the other parts go on
                outcome = Outcome(ok=False, lines=[f"{type(error).__name__}: {error}"])
            outcome.cut = check.cut
        outcome.part, outcome.seconds = name, time.monotonic() - began_s
        outcome.compiled = num_compiled(cache) - before
        outcomes.append(outcome)
        (check.out / "summary.md").write_text(summary(title, outcomes))
        say(f"{name}: {outcome.result.replace('*', '')} in {outcome.seconds:.0f} s")
        for line in outcome.lines:
            say(f"  {line}")
    return outcomes


def num_compiled(cache: Path) -> int:
    """Kernels in Triton's cache folder."""
    return sum(1 for _ in cache.glob("*/*.cubin"))


def summary(title: str, outcomes: Sequence[Outcome]) -> str:
    lines = [title, "", "| part | result | s | kernels compiled |", "| --- | --- | --- | --- |"]
    lines += [f"| {o.part} | {o.result} | {o.seconds:.0f} | {o.compiled} |" for o in outcomes]
    for outcome in outcomes:
        lines += ["", f"## {outcome.part}", "", *outcome.lines]
    return "\n".join(lines) + "\n"


def tables(found: Mapping[str, dict[str, Any]]) -> list[str]:
    """Markdown of the JSON that benches write: rows, goals, groups that failed or were not reached."""
    lines: list[str] = []
    for name, document in found.items():
        if not document:
            continue
        columns = document["columns"]
        lines += ["", f"**{name}**", "", _row(columns), _row(["---"] * len(columns))]
        lines += [_row([_shown(value) for value in row]) for row in document["rows"]]
        lines.append("")
        for goal in document["goals"]:
            sign = ">=" if goal["at_least"] else "<="
            verdict = "met" if goal["met"] else "**missed**"
            lines.append(f"- {goal['name']}: {goal['value']:.4g} ({sign} {goal['bound']:g}) {verdict}")
        lines += [f"- **failed** {group}: {error}" for group, error in document.get("failed", {}).items()]
        if document.get("left"):
            lines.append(f"- not measured: {', '.join(document['left'])}")
    return lines


def _row(cells: Sequence[Any]) -> str:
    return f"| {' | '.join(str(cell).replace('|', '/') for cell in cells)} |"


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _json(file: Path) -> dict[str, Any]:
    """Empty where there is none, or half of one."""
    try:
        found: dict[str, Any] = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return found


def _kill(pid: int) -> None:
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
