"""All blocking Ray calls of one backend, outside the loop and one at a time; some of them bounded in time.

While the cluster's head is away Ray holds a call for a minute and more. What the controller's loop must not wait for that
long is given up on and not taken back: it is made once its turn has come.
"""

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from biphase.protos.errors import one_line

ANSWER_S = 5.0
logger = logging.getLogger("biphase.cluster.ray")
T = TypeVar("T")


class RayCalls:
    """One thread, which lives as long as the backend: Ray's own processes are told by the kernel when the thread that
    started them ends."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="biphase-ray")
        self._late: set[asyncio.Future[Any]] = set()
        """Those that were given up on and have not returned."""

    async def __call__(self, function: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function)

    async def within(self, function: Callable[[], T], timeout_s: float = ANSWER_S) -> T:
        """Raises OSError after ``timeout_s``, and at once while an earlier one is late; the call is made all the same."""
        call = asyncio.get_running_loop().run_in_executor(self._thread, function)
        try:
            await asyncio.wait([call], timeout=0.0 if self._late else timeout_s)
        finally:
            if not call.done():
                self._late.add(call)
                call.add_done_callback(self._returned)
        if call.done():
            return call.result()
        raise OSError(f"Ray does not answer within {timeout_s:g} s")

    def _returned(self, call: "asyncio.Future[Any]") -> None:
        self._late.discard(call)
        if not call.cancelled() and (error := call.exception()) is not None:
            logger.warning("a call that was late has failed: %s", one_line(error))

    def close(self) -> None:
        """Waits for those that are under way."""
        self._thread.shutdown(wait=True)
