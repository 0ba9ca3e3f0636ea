"""The two kinds of pair group behind one interface: raw ProcessGroupGloo and ProcessGroupNCCL objects.

They belong to no default group and to no global state of torch.distributed, so an instance's own groups (tensor and
pipeline parallelism) neither see them nor wait for them. Each call here may block: only threads of ours make them.
"""

import os
import threading
import time
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch.distributed import Store  # type: ignore[attr-defined]

_POLL_S = 0.0002
_FOREVER = timedelta(days=10)
_MAX_CTAS = 4
"""Blocks of a GPU that one pair may occupy: copies between two GPUs need no more, and each has buffers."""

_building = threading.Lock()


class Backend(Protocol):
    """Makes and ends pair groups, and waits for what was posted on them."""

    name: str
    device: torch.device

    def build(self, store: Store, rank: int, timeout_s: float) -> Any:
        """The group, once its other end is there. Raises RuntimeError."""
        ...

    def buffer(self, num_bytes: int) -> torch.Tensor:
        """New memory for what is sent and received."""
        ...

    def posting(self) -> AbstractContextManager[Any]:
        """What sends and receives are posted in."""
        ...

    def wait(self, work: Any, timeout_s: float) -> None:
        """Raises RuntimeError when it failed, or took longer: then the group is of no more use."""
        ...

    def end(self, group: Any, *, broken: bool) -> None:
        """Close its connections and free its memory, whatever is still posted."""
        ...


class Gloo:
    """Host memory over TCP, from the given address only."""

    name = "gloo"

    def __init__(self, host: str) -> None:
        self.device = torch.device("cpu")
        # by address: by host name gloo takes whatever that resolves to, and aborts where that is no interface
        self._link = dist.ProcessGroupGloo.create_device(hostname=host)

    def build(self, store: Store, rank: int, timeout_s: float) -> Any:
        options: Any = vars(dist.ProcessGroupGloo)["_Options"]()
        options._devices = [self._link]
        options._timeout = timedelta(seconds=timeout_s)
        options._threads = 1
        return dist.ProcessGroupGloo(store, rank, 2, options)

    def buffer(self, num_bytes: int) -> torch.Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8)

    def posting(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def wait(self, work: Any, timeout_s: float) -> None:
        work.wait(timedelta(seconds=max(0.001, timeout_s)))

    def end(self, group: Any, *, broken: bool) -> None:
        """Its connections close with the last reference to it, the caller's."""


class Nccl:
    """GPU memory. A lost peer is never noticed by nccl itself: deadlines are ours, and end in an abort."""

    name = "nccl"

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        if not dist.is_nccl_available():
            raise RuntimeError("this torch was built without nccl")
        # nccl waits for what the current stream holds: on the engine's that would be whole steps
        self._stream = torch.cuda.Stream(self.device, priority=-1)

    def build(self, store: Store, rank: int, timeout_s: float) -> Any:
        group_type: Any = vars(dist)["ProcessGroupNCCL"]
        options = group_type.Options()
        options._timeout = _FOREVER
        options.config.max_ctas = _MAX_CTAS
        # torch's watchdog ends the process when an operation outlasts its time, its monitor when the watchdog hangs:
        # a lost reader must cost one pair, not the instance, so both are off for these groups and for no other
        ours = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0", "TORCH_NCCL_ENABLE_MONITORING": "0"}
        with _building:
            before = {name: os.environ.get(name) for name in ours}
            os.environ.update(ours)
            try:
                group = group_type(store, rank, 2, options)
            finally:
                for name, value in before.items():
                    if value is None:
                        del os.environ[name]
                    else:
                        os.environ[name] = value
        return group

    def buffer(self, num_bytes: int) -> torch.Tensor:
        with self.posting():
            return torch.empty(num_bytes, dtype=torch.uint8, device=self.device)

    def posting(self) -> AbstractContextManager[Any]:
        """A stream of their own, whose device it makes current. What is sent has been packed to the end before."""
        context: AbstractContextManager[Any] = torch.cuda.stream(self._stream)
        return context

    def wait(self, work: Any, timeout_s: float) -> None:
        """By asking: nccl's own wait only orders streams. Returns when the bytes are in memory, not when posted."""
        until_s = time.monotonic() + timeout_s
        while not work.is_completed():
            if time.monotonic() > until_s:
                raise RuntimeError(f"nothing moved for {timeout_s:g} s")
            time.sleep(_POLL_S)
        error = work.exception()
        if error is not None:
            raise RuntimeError(str(error))

    def end(self, group: Any, *, broken: bool) -> None:
        if broken:
            group.abort()
        else:
            group.shutdown()


def make_backend(host: str, device: str) -> Backend:
    """nccl for a CUDA device, gloo for the CPU."""
    return Gloo(host) if device == "cpu" else Nccl(device)
