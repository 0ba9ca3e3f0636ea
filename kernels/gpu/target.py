"""The GPU that a kernel is made for, in the numbers that choose a launch. Known without a GPU too: for compiling ahead
of time (tensors on ``meta``) and for the interpreter (tensors on ``cpu``)."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """``capability``: 90 for sm_90. ``shared_bytes``: shared memory of one program at most."""

    name: str
    capability: int
    num_sms: int
    shared_bytes: int

    def require_fp8(self, what: str) -> None:
        """Raises ValueError where the GPU has no e4m3 arithmetic."""
        if self.capability < 89:
            major, minor = divmod(self.capability, 10)
            raise ValueError(f"{what} needs a GPU of capability 8.9 or newer, {self.name} has {major}.{minor}")


_SHARED_KIB = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99}

AOT_TARGETS = {
    80: Target(name="A100", capability=80, num_sms=108, shared_bytes=163 << 10),
    89: Target(name="L40S", capability=89, num_sms=142, shared_bytes=99 << 10),
    90: Target(name="H100", capability=90, num_sms=132, shared_bytes=227 << 10),
    100: Target(name="B200", capability=100, num_sms=148, shared_bytes=227 << 10),
}
"""One GPU per architecture that kernels are compiled for without one."""

INTERPRETER = Target(name="interpreter", capability=90, num_sms=4, shared_bytes=227 << 10)
"""Few multiprocessors, so that fixed grids stay small in the interpreter."""

_aot: Target | None = None


@contextmanager
def compiling_for(target: Target) -> Iterator[None]:
    """Within it, tensors on ``meta`` belong to ``target``."""
    global _aot
    before, _aot = _aot, target
    try:
        yield
    finally:
        _aot = before


def target_of(device: torch.device) -> Target:
    """Raises ValueError for a device that no kernel is made for."""
    if device.type == "cuda":
        return _cuda_target(torch.cuda.current_device() if device.index is None else device.index)
    if device.type == "cpu":
        return INTERPRETER
    if device.type == "meta" and _aot is not None:
        return _aot
    raise ValueError(f"no Triton kernel runs on device {str(device)!r}")


@functools.cache
def _cuda_target(index: int) -> Target:
    properties = torch.cuda.get_device_properties(index)
    capability = 10 * properties.major + properties.minor
    if capability < 80:
        raise ValueError(f"{properties.name} has capability {properties.major}.{properties.minor}, kernels need 8.0")
    return Target(
        name=properties.name,
        capability=capability,
        num_sms=properties.multi_processor_count,
        shared_bytes=_SHARED_KIB.get(capability, 99) << 10,
    )
