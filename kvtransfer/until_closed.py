"""Waiting that ends with the pull it is for."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

_Value = TypeVar("_Value")


class UntilClosed:
    """Of one pull: ``run`` raises ConnectionError from ``close`` on, also where it had begun before."""

    def __init__(self) -> None:
        self._closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def run(self, coroutine: Coroutine[Any, Any, _Value]) -> _Value:
        """What the coroutine gives; it is cancelled where the pull is closed first."""
        task = asyncio.ensure_future(coroutine)
        try:
            await asyncio.wait((task, self._closed), return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise ConnectionError("the pull is closed")
        finally:
            task.cancel()
        return task.result()

    def close(self) -> None:
        """Idempotent."""
        if not self._closed.done():
            self._closed.set_result(None)
