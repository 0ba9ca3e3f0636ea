"""What a person sees while a deployment loads and lives: bars on a terminal, plain lines elsewhere. On stderr."""

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress

from biphase.cluster.run_dir import ProcessLine, ServeRecord

_LOADING_SHARE = 0.95
"""How much of a bar loading fills; the rest is the link."""
_ENDING = ("stopping", "stopped", "failed")


class Progress:
    """Shows each new ServeRecord. One bar per process while loading, one line per change afterwards."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._bars: RichProgress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._states: dict[str, tuple[int, str]] = {}
        self._loading = True

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            columns = (
                TextColumn("{task.description:<12}"),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[detail]}"),
            )
            self._bars = RichProgress(*columns, TimeElapsedColumn(), console=self._console, transient=True)
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.end_loading()

    def show(self, record: ServeRecord) -> None:
        """Take in the newest record."""
        if self._loading and not record.processes:
            done = record.stages[-1][0] if record.stages else "starting"
            self._bar("cluster", 0.0, f"{done}")
        for line in record.processes:
            if self._loading:
                self._bar(line.name, _share(line), _words(line))
            if record.state not in _ENDING:
                self._note(line)
        if self._loading and record.processes:
            self._bar("cluster", 1.0, record.stages[-1][0] if record.stages else "")

    def say(self, text: str) -> None:
        """A line of its own, above the bars."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=not self._console.is_terminal)

    def end_loading(self) -> None:
        """Take the bars away."""
        self._loading = False
        if self._bars is not None:
            self._bars.stop()
            self._bars = None

    def _bar(self, name: str, share: float, detail: str) -> None:
        if self._bars is None:
            return
        if name not in self._tasks:
            self._tasks[name] = self._bars.add_task(name, total=1.0, detail=detail)
        self._bars.update(self._tasks[name], completed=share, detail=detail)

    def _note(self, line: ProcessLine) -> None:
        """A changed state as a line: always after loading; while loading only where there are no bars."""
        before, now = self._states.get(line.name), (line.incarnation, line.state)
        self._states[line.name] = now
        if before == now:
            return
        if self._loading and self._bars is None and line.state in ("loading", "ready", "lost"):
            self.say(f"{line.name}: {_words(line)}")
        elif not self._loading and line.state in ("waiting", "lost", "ready"):
            life = f" (incarnation {line.incarnation}, pid {line.pid})" if line.state == "ready" else ""
            self.say(f"{line.name}: {_words(line)}{life}")


def _share(line: ProcessLine) -> float:
    if line.state == "ready":
        return 1.0
    return _LOADING_SHARE * min(max(line.progress, 0.0), 1.0) if line.state == "loading" else 0.0


def _words(line: ProcessLine) -> str:
    match line.state:
        case "waiting":
            return f"{line.detail}; starting it again" if line.detail else "waiting"
        case "lost":
            return f"lost: {line.detail}"
        case "loading":
            return line.detail or "loading"
        case _:
            return line.state
