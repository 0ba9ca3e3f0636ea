"""Reading other processes' memory into ours: NIXL reads as coroutines, and memory that is never given back too early."""

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from biphase.kvtransfer.nixl.library import bindings, errors

_log = logging.getLogger(__name__)

_TRIES_AT_ONCE = 8
_POLL_S = 0.0005
_DRAIN_POLL_S = 0.05
DRAIN_S = 60.0
"""After so long a read that was given up is taken for one that the library will never end."""


class Reader:
    """Reads by one agent, in its event loop."""

    def __init__(self, agent: Any, backend: Any, *, drain_s: float = DRAIN_S) -> None:
        self._agent = agent
        self._drain_s = drain_s
        self.num_lost = 0
        """Reads whose memory may be written for ever: nobody gets it back."""
        self._backend = backend
        self._library = bindings()
        self._draining: set[asyncio.Task[None]] = set()

    @property
    def num_unfinished(self) -> int:
        """Reads that were given up and may still write."""
        return len(self._draining)

    async def read(
        self, source: str, at: int, into: int, num_bytes: int, *, timeout_s: float, given_up: Callable[[], None]
    ) -> None:
        """Copy ``num_bytes`` at address ``at`` of the agent ``source`` to our address ``into``.

        Raises ConnectionError. Where it raises or is cancelled, ``given_up`` is called when nothing writes to ``into`` any
        more, which may be later: the library has no abort that can be relied on.
        """
        library = self._library
        try:
            mine = library.nixlXferDList(library.DRAM_SEG, [(into, num_bytes, 0)])
            theirs = library.nixlXferDList(library.DRAM_SEG, [(at, num_bytes, 0)])
            request = self._agent.createXferReq(library.NIXL_READ, mine, theirs, source, "", [self._backend])
        except errors() as error:
            given_up()
            raise ConnectionError(f"nixl cannot read from the source: {_text(error)}") from None
        try:
            async with asyncio.timeout(timeout_s):
                done = self._ask(self._agent.postXferReq, request, "")
                tries = 0
                while not done:
                    tries += 1
                    await asyncio.sleep(0 if tries < _TRIES_AT_ONCE else _POLL_S)
                    done = self._ask(self._agent.getXferStatus, request)
        except ConnectionError:
            self._release(request)
            given_up()
            raise
        except TimeoutError:
            self._drain(request, given_up)
            raise ConnectionError(f"a nixl read of {num_bytes} bytes took more than {timeout_s:g} s") from None
        except BaseException:
            self._drain(request, given_up)
            raise
        self._release(request)

    async def close(self) -> None:
        for task in self._draining:
            task.cancel()
        if self._draining:
            await asyncio.wait(self._draining)

    def _ask(self, call: Callable[..., Any], *args: Any) -> bool:
        """Whether the read is complete. Raises ConnectionError where it never will be."""
        try:
            status = call(*args)
        except errors() as error:
            raise ConnectionError(f"a nixl read failed: {_text(error)}") from None
        if status == self._library.NIXL_SUCCESS:
            return True
        if status == self._library.NIXL_IN_PROG:
            return False
        raise ConnectionError(f"a nixl read failed: {status}")

    def _release(self, request: Any) -> None:
        with suppress(*errors()):
            self._agent.releaseXferReq(request)

    def _drain(self, request: Any, given_up: Callable[[], None]) -> None:
        task = asyncio.get_running_loop().create_task(self._until_ended(request, given_up))
        self._draining.add(task)
        task.add_done_callback(self._draining.discard)

    async def _until_ended(self, request: Any, given_up: Callable[[], None]) -> None:
        """``given_up`` is not called where the library has not ended it in time."""
        until_s = time.monotonic() + self._drain_s
        with suppress(ConnectionError):
            while not self._ask(self._agent.getXferStatus, request):
                if time.monotonic() > until_s:
                    self.num_lost += 1
                    _log.warning("nixl has not ended a read in %g s: its memory is left to it", self._drain_s)
                    return
                await asyncio.sleep(_DRAIN_POLL_S)
        self._release(request)
        given_up()


def _text(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
