"""A value that changes, and any number of readers that want each newest one. One asyncio loop, no locks."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Broadcast(Generic[T]):
    """``changed()`` wakes every reader of ``follow``; a slow reader skips what came between."""

    def __init__(self, read: Callable[[], T]) -> None:
        self._read = read
        self._change = asyncio.Event()

    def changed(self) -> None:
        self._change.set()
        self._change = asyncio.Event()

    async def wait(self) -> None:
        """Wait for the next change."""
        await self._change.wait()

    async def follow(self, min_interval_s: float = 0.0) -> AsyncIterator[T]:
        """The value now, then again after every change, at most once per ``min_interval_s``."""
        while True:
            change = self._change
            yield self._read()
            if min_interval_s:
                await asyncio.sleep(min_interval_s)
            await change.wait()
