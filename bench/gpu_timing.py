"""How GPU figures are taken: device events around graph replays, buffers rotated past the cache, medians; and the
ceilings of the same run that they are fractions of.

On a machine without a GPU the same calls time the host (kernels interpreted), so that a bench can be run, not believed.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

WARM_UP, ROUNDS = 2, 11
_LEAST_US = 1500.0
"""Of one timed run: a graph's own start takes some microseconds, which short work would pay for alone."""
_MOST_CALLS = 256
CACHE_BYTES = 192 << 20
"""More than any GPU's L2 holds: inputs rotate through this much memory."""


def device_of() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def median_us(calls: Sequence[Callable[[], object]], *, graph: bool = True, rounds: int = ROUNDS) -> float:
    """Median time of one call, in microseconds. ``calls``: the same work on different buffers, run in turn.

    With ``graph`` they are captured once, over and over until there is enough to time, and replayed, so that launch
    overhead does not count.
    """
    if not torch.cuda.is_available():
        return _host_us(calls)
    for call in calls:
        call()
    again = times_over(_events_us(lambda: [call() for call in calls], rounds=2), len(calls))
    calls = [call for _ in range(again) for call in calls]
    run = _captured(calls) if graph else (lambda: [call() for call in calls])
    for _ in range(WARM_UP):
        run()
    return _events_us(run, rounds=rounds) / len(calls)


def times_over(all_us: float, num_calls: int) -> int:
    """How often calls that take ``all_us`` together are repeated in one timed run."""
    return max(1, min(-(-int(_LEAST_US) // max(1, int(all_us))), _MOST_CALLS // num_calls))


def _events_us(run: Callable[[], object], *, rounds: int) -> float:
    """Median by the device's clock; nothing waits between the rounds."""
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(rounds)]
    torch.cuda.synchronize()
    for start, end in marks:
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in marks) * 1e3


def _captured(calls: Sequence[Callable[[], object]]) -> Callable[[], object]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()  # the calls' buffers are held by the calls; the graph lives as long as its replay
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    return graph.replay


def _host_us(calls: Sequence[Callable[[], object]]) -> float:
    calls[0]()
    start_s = time.perf_counter()
    for call in calls:
        call()
    return (time.perf_counter() - start_s) * 1e6 / len(calls)


def copies_for(num_bytes: int, most: int = 64) -> int:
    """How many sets of buffers of that size are needed to come around with a cold cache."""
    if not torch.cuda.is_available():
        return 1
    return max(1, min(most, -(-CACHE_BYTES // max(1, num_bytes))))


@dataclass(frozen=True, slots=True, kw_only=True)
class Ceilings:
    """What this device does at best, measured in this run: bytes/s and flop/s."""

    copy: float
    """A large device-to-device copy; bytes read plus bytes written."""
    read: float
    """A read-only stream: the sum of a large tensor."""
    matrix: float
    """An 8192^3 product of random bfloat16."""

    @staticmethod
    def measure() -> "Ceilings":
        copy, read = _memory_rates()
        return Ceilings(copy=copy, read=read, matrix=_matrix_rate())

    def as_rows(self) -> list[tuple[str, float, str]]:
        return [
            ("device copy", self.copy / 1e9, "GB/s"),
            ("read-only stream", self.read / 1e9, "GB/s"),
            ("8192^3 bf16 product", self.matrix / 1e12, "TFLOP/s"),
        ]


def _memory_rates() -> tuple[float, float]:
    device, size = device_of(), (1 << 30) if torch.cuda.is_available() else (1 << 22)
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = 2 * size / median_us([lambda: target.copy_(source)]) * 1e6
    words, total = source.view(torch.float32).nan_to_num_(), torch.zeros((), device=device)
    return copy, size / median_us([lambda: torch.sum(words, dim=0, out=total)]) * 1e6


def _matrix_rate() -> float:
    on_gpu = torch.cuda.is_available()
    n, dtype = (8192, torch.bfloat16) if on_gpu else (128, torch.float32)
    a, b = (torch.randn(n, n, device=device_of()).to(dtype) for _ in range(2))
    c = torch.empty(n, n, dtype=dtype, device=device_of())
    return 2 * n**3 / median_us([lambda: torch.mm(a, b, out=c)]) * 1e6
