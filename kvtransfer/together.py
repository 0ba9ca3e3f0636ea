"""Several things at once that end together: the first failure ends the others, and nobody leaves before the last."""

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

T = TypeVar("T")


async def together(parts: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """All results in their order. Raises what failed first, or CancelledError, and only when every part has ended: however
    often the caller is cancelled meanwhile. Each is cancelled once at most."""
    if len(parts) == 1:
        return [await parts[0]]
    tasks = [asyncio.ensure_future(part) for part in parts]
    cancelled = ending = False
    pending = set(tasks)
    failed: asyncio.Future[T] | None = None
    while pending:
        try:
            done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            cancelled = True
            done = set()
        broken = [task for task in tasks if task in done and _broke(task)]  # whoever is not asked complains of it later
        if failed is None and broken:
            failed = broken[0]
        if (cancelled or failed is not None) and not ending:
            ending = True
            for task in pending:
                task.cancel()
    if cancelled:
        raise asyncio.CancelledError
    if failed is not None:
        failed.result()
    return [task.result() for task in tasks]


def _broke(task: "asyncio.Future[Any]") -> bool:
    return task.cancelled() or task.exception() is not None
