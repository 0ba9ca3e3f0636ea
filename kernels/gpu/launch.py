"""The one place where a Triton kernel is launched, so that the same launcher runs it, or compiles it without a GPU."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import triton

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Whether kernels run in Triton's interpreter on the CPU (TRITON_INTERPRET=1 at import)."""

_NOT_IN_INTERPRETER = ("launch_pdl", "maxnreg")
_interpreter = threading.Lock()  # it exchanges parts of triton.language while a kernel runs; threads take turns

Launch = Callable[[Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]], None]
"""Called with kernel, grid, arguments, and constexprs and options by name."""

Compiled = Callable[[Any, Any], None]
"""Called with the kernel and what it was compiled to."""

_instead: Launch | None = None


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **settings: Any) -> None:
    """``kernel[grid](*args, **settings)``; an empty grid launches nothing. Constexprs and num_warps, num_stages by name."""
    if _instead is not None:
        _instead(kernel, grid, args, settings)
        return
    if 0 in grid:
        return
    if INTERPRETED:
        for name in _NOT_IN_INTERPRETER:
            settings.pop(name, None)
        with _interpreter:
            kernel[grid](*args, **settings)
        return
    kernel[grid](*args, **settings)


@contextmanager
def launching_instead(instead: Launch) -> Iterator[None]:
    """Within it nothing runs: what would be launched is handed over."""
    global _instead
    before, _instead = _instead, instead
    try:
        yield
    finally:
        _instead = before


@contextmanager
def compiling_only(on_compiled: Compiled) -> Iterator[None]:
    """Within it nothing runs: ``launch`` compiles as it would for that call and hands over the result."""

    def compile_it(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], settings: dict[str, Any]) -> None:
        on_compiled(kernel, kernel.warmup(*args, grid=grid, **settings))

    with launching_instead(compile_it):
        yield
