"""What the step needs of its device besides kernels: pinned memory, events, graphs. On a CPU (kernels interpreted, for
tests) the same calls do nothing, as every launch is over when it returns."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(slots=True)
class Event:
    """A point of the device's work; ``of_device`` is None where work is never pending."""

    of_device: Any = None

    def wait(self) -> None:
        """Block until the work before it is over; the interpreter's lock is not held. Raises what the work raised."""
        if self.of_device is not None:
            self.of_device.synchronize()

    def ms_since(self, earlier: "Event") -> float:
        """Milliseconds of device time from ``earlier`` to this one; both must be over. 0 without a device."""
        if self.of_device is None:
            return 0.0
        elapsed: float = earlier.of_device.elapsed_time(self.of_device)
        return elapsed


class Accelerator:
    """One device, used by one thread; its work runs in order on the thread's current stream."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.is_cuda = device.type == "cuda"
        self._graph_memory: Any = None

    def enter(self) -> None:
        """Make it the calling thread's device, and a stream that can be captured its stream."""
        if self.is_cuda:
            torch.cuda.set_device(self.device)
            torch.cuda.set_stream(torch.cuda.Stream(self.device))

    def host_buffer(self, num_bytes: int) -> torch.Tensor:
        """Host memory that copies to and from the device need not wait for: uint8, zeros."""
        return torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=self.is_cuda)

    def record(self) -> Event:
        """An event after all work launched so far."""
        if not self.is_cuda:
            return Event()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return Event(event)

    def synchronize(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize(self.device)

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Record ``work``'s launches once; the result launches them again, reading the same addresses.

        All graphs share one pool of memory: only one of them runs at a time. Without a device, ``work`` itself.
        """
        if not self.is_cuda:
            return work
        if self._graph_memory is None:
            self._graph_memory = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # nccl looks at its events in a thread of its own, which the capture of this one may not forbid
        with torch.cuda.graph(
            graph,
            pool=self._graph_memory,
            stream=torch.cuda.current_stream(),
            capture_error_mode="thread_local",
        ):
            work()
        replay: Callable[[], None] = graph.replay
        return replay

    def memory_bytes(self) -> tuple[int, int, int]:
        """Device memory: all of it, what nobody has, what this process's tensors take."""
        if not self.is_cuda:
            raise ValueError("the memory of a CPU is the host's")
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(self.device)
        return total, free, torch.cuda.memory_reserved(self.device)
