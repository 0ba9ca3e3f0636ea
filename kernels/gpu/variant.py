"""A kernel launch as production makes it, to be compiled ahead of time. Each op lists its own in ``variants.py``."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """``run`` calls the op's launcher with tensors on ``meta`` (shapes of real models, no memory needed).

    ``min_capability``: GPUs below are refused with ValueError. ``quick``: compiled in every test run, else only in the
    long one. ``traits``: what its machine code must show, checked by the tests: ``wide_loads`` (16-byte global loads),
    ``async_loads`` (those, and cp.async or TMA), ``mma_wide`` (mma.sync, wgmma or tcgen05, by architecture),
    ``mma_sync`` (everywhere). ``other_step``: the same launch in another step, with other numbers of tokens, rows,
    sequences and blocks (1, a multiple of 16, an odd one); checked to compile nothing that ``run`` had not.
    """

    name: str
    run: Callable[[], None]
    min_capability: int = 80
    quick: bool = False
    traits: frozenset[str] = frozenset()
    other_step: Callable[[], None] | None = None
