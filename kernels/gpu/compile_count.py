"""How many kernels this process has compiled: none may be once it serves."""

import logging
from typing import Any

import triton

_log = logging.getLogger(__name__)

_count = 0
_sealed_at: int | None = None


def install() -> None:
    """Count from now on; a second call changes nothing."""
    if triton.knobs.runtime.jit_post_compile_hook is not _compiled:
        triton.knobs.runtime.jit_post_compile_hook = _compiled


def num_compiled() -> int:
    return _count


def seal() -> None:
    """All that serving needs has been compiled: more is logged as a warning and counted by ``num_since_sealed``."""
    global _sealed_at
    _sealed_at = _count


def num_since_sealed() -> int:
    """0 before ``seal``."""
    return 0 if _sealed_at is None else _count - _sealed_at


def _compiled(*args: Any, **kwargs: Any) -> None:
    global _count
    _count += 1
    if _sealed_at is not None:
        name = getattr(kwargs.get("fn"), "name", "a kernel")
        _log.warning("%s was compiled while serving; requests waited for it", name)
