"""What a person sees while the load runs: one line with a bar, on stderr, where that is a terminal."""

import asyncio
import math
import sys

from biphase.client.bench.runner import Runner

_EVERY_S = 0.25


async def show(runner: Runner, *, planned_s: float, num_prompts: int | None) -> None:
    """Follow ``runner`` until cancelled."""
    if not sys.stderr.isatty():
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    total = float(num_prompts) if num_prompts is not None else planned_s
    columns = (TextColumn("bench"), BarColumn(bar_width=30), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("", total=None if math.isinf(total) else total)
        while True:
            ended, live = len(runner.measured), len(runner.live)
            failed = sum(not one.done for one in runner.measured)
            wrong = sum(one.wrong for one in runner.measured)
            words = f"{ended} ended, {live} running, {failed} failed" + (f", {wrong} WRONG" if wrong else "")
            progress.update(bar, completed=ended if num_prompts is not None else runner.now_s(), description=words)
            await asyncio.sleep(_EVERY_S)
