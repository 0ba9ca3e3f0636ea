"""What a kernel bench's case is, and the sizes it runs at."""

from dataclasses import dataclass
from typing import Literal

import torch
from gpu_timing import Ceilings, copies_for, device_of

Kind = Literal["copy", "matrix", "us", "ratio"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """``us`` of one call. ``value``: share of the copy bandwidth, share of the matrix rate, microseconds, or a ratio to
    something else, as ``kind`` says; ``bound``: what it is to reach (at most, for us), None where it is only shown."""

    name: str
    us: float
    kind: Kind
    value: float
    bound: float | None = None
    note: str = ""

    @staticmethod
    def moved(
        name: str, us: float, num_bytes: float, ceilings: Ceilings, bound: float | None = None, note: str = ""
    ) -> "Result":
        """A kernel bound by memory: each input and output counted once."""
        share = num_bytes / (us * 1e-6) / ceilings.copy
        return Result(name=name, us=us, kind="copy", value=share, bound=bound, note=note)

    @staticmethod
    def multiplied(
        name: str, us: float, flops: float, ceilings: Ceilings, bound: float | None = None, note: str = ""
    ) -> "Result":
        """A kernel bound by the tensor cores."""
        share = flops / (us * 1e-6) / ceilings.matrix
        return Result(name=name, us=us, kind="matrix", value=share, bound=bound, note=note)

    @staticmethod
    def timed(name: str, us: float, bound: float | None = None, note: str = "") -> "Result":
        return Result(name=name, us=us, kind="us", value=us, bound=bound, note=note)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Llama-3-8B's shape, or a tiny one of the same form. ``scale``: what token counts are divided by."""

    hidden: int = 4096
    intermediate: int = 14336
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    block_size: int = 64
    vocab: int = 128_256
    experts: int = 8
    taken: int = 2
    scale: int = 1
    dtype: torch.dtype = torch.bfloat16
    smoke: bool = False

    @staticmethod
    def tiny() -> "Sizes":
        return Sizes(
            hidden=64,
            intermediate=96,
            heads=2,
            kv_heads=1,
            head_dim=64,
            block_size=16,
            vocab=320,
            experts=2,
            taken=1,
            scale=512,
            dtype=torch.float32,
            smoke=True,
        )

    def tokens(self, count: int) -> int:
        """``count`` tokens, or the few that the interpreter can do."""
        return max(1, count // self.scale)

    def sequences(self, count: int) -> int:
        return min(count, 3) if self.smoke else count

    @property
    def itemsize(self) -> int:
        return self.dtype.itemsize

    def randn(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device_of(), dtype=torch.float32).to(self.dtype)

    def empty(self, *shape: int) -> torch.Tensor:
        return torch.empty(shape, device=device_of(), dtype=self.dtype)


def rotated(num_bytes: float) -> range:
    """As many sets of buffers as it takes for a cold cache."""
    return range(copies_for(int(num_bytes)))


def check(name: str, *outputs: torch.Tensor) -> None:
    """A kernel that leaves NaN is not worth timing."""
    for output in outputs:
        if output.is_floating_point() and not output.float().isfinite().all():
            raise RuntimeError(f"{name} wrote something that is not finite")
