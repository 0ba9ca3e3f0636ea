"""How many kernels this process has compiled: none may be once it serves."""

from typing import Any

import triton

_count = 0


def install() -> None:
    """Count from now on; a second call changes nothing."""
    if triton.knobs.runtime.jit_post_compile_hook is not _compiled:
        triton.knobs.runtime.jit_post_compile_hook = _compiled


def num_compiled() -> int:
    return _count


def _compiled(*args: Any, **kwargs: Any) -> None:
    global _count
    _count += 1
