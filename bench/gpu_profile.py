"""What runs on a GPU and when, from torch's profiler: names of kernels, and the share of the time without any."""

import json
import os
import tempfile
from collections.abc import Awaitable, Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from biphase.kernels.gpu.launch import launching_instead

Event = dict[str, Any]
"""Of Chrome's trace format, which the profiler exports: ph "X" is a span, cat "kernel" one on the GPU, ts and dur us."""


def keep_profiler() -> None:
    """Call it before the first kernel: CUDA graphs do not survive that the profiler is taken down and set up again."""
    os.environ.setdefault("TEARDOWN_CUPTI", "0")
    os.environ.setdefault("DISABLE_CUPTI_LAZY_REINIT", "1")
    if torch.cuda.is_available():
        with _profiler():
            torch.zeros(1, device="cuda").add_(1)
            torch.cuda.synchronize()


def profiled_kernels(run: Callable[[], object]) -> list[str]:
    """Names of the kernels that ``run`` had the GPU execute, copies and fills by the driver not among them."""
    with _profiler() as profiler:
        run()
        torch.cuda.synchronize()
    return [event["name"] for event in _events(profiler, None) if is_kernel(event)]


async def idle_share_of(run: Callable[[], Awaitable[None]], trace: Path | None) -> float | None:
    """Share of the time without a kernel; None where there is no GPU. ``trace``: keep the profiler's there."""
    if not torch.cuda.is_available():
        await run()
        return None
    with _profiler() as profiler:
        await run()
        torch.cuda.synchronize()
    return idle_share(kernel_spans(_events(profiler, trace)))


def is_kernel(event: Event) -> bool:
    return event.get("ph") == "X" and event.get("cat") == "kernel"


def kernel_spans(events: Iterable[Event]) -> list[tuple[float, float]]:
    """(start, end) of each kernel, by start."""
    return sorted((event["ts"], event["ts"] + event["dur"]) for event in events if is_kernel(event))


def idle_share(spans: Sequence[tuple[float, float]]) -> float:
    """Of the time from the first start to the last end, the share that no span covers; ``spans`` sorted by start."""
    if not spans:
        raise RuntimeError("the profiler saw no kernel")
    busy, reached = 0.0, spans[0][0]
    for start, end in spans:
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return 1 - busy / (reached - spans[0][0])


def triton_launches(run: Callable[[], object]) -> list[str]:
    """Names of the Triton kernels that ``run`` would launch; none of them runs."""
    names: list[str] = []
    with launching_instead(
        lambda kernel, grid, args, settings: names.append(kernel.__name__) if 0 not in grid else None
    ):
        run()
    return names


def _profiler() -> Any:
    from torch.profiler import ProfilerActivity, profile

    return profile(activities=[ProfilerActivity.CUDA])


def _events(profiler: Any, keep: Path | None) -> list[Event]:
    with tempfile.TemporaryDirectory() as folder:
        file = keep or Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(file))
        events: list[Event] = json.loads(file.read_text())["traceEvents"]
    return events
