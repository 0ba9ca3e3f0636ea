"""Where a reader's copies land: registered slots of its own, lent for as long as anything writes or reads them."""

import asyncio
import weakref
from collections import deque
from typing import Any

import numpy as np

from biphase.kvtransfer.nixl.memory import SKEW_BYTES, WORD_BYTES, RegisteredMemory, slot_stride


class Landing:
    """A reader's own slots, each with a word for the generation. Lent until nothing writes or reads them any more."""

    def __init__(self, agent: Any, backend: Any, num_slots: int, slot_bytes: int) -> None:
        self.slot_bytes = slot_bytes
        self._loop = asyncio.get_running_loop()
        self._stride = slot_stride(slot_bytes)
        self._memory = RegisteredMemory(agent, backend, num_slots * self._stride)
        self._free = deque(range(num_slots))
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def lend(self, timeout_s: float) -> int:
        try:
            async with asyncio.timeout(timeout_s):
                while not self._free:
                    turn = asyncio.get_running_loop().create_future()
                    self._waiting.append(turn)
                    await turn
        except asyncio.CancelledError:
            self._wake()  # it may have been our turn
            raise
        except TimeoutError:
            self._wake()
            raise ConnectionError(f"none of our slots for nixl came free within {timeout_s:g} s") from None
        return self._free.popleft()

    def give_back(self, index: int) -> None:
        self._free.append(index)
        self._wake()

    def _wake(self) -> None:
        while self._free and self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                return

    def payload_at(self, index: int) -> int:
        return self._memory.address + self._start(index)

    def word_at(self, index: int) -> int:
        return self._memory.address + self._start(index) - WORD_BYTES

    def payload(self, index: int, num_bytes: int) -> memoryview:
        """The slot is given back when nobody has a view of it: an unpack in a thread outlives a pull that is broken off."""
        start = self._start(index)
        part = self._memory.bytes[start : start + num_bytes]
        weakref.finalize(part, self._last_view_is_gone, index).atexit = False
        return part.data

    def _last_view_is_gone(self, index: int) -> None:
        """In whatever thread."""
        try:
            self._loop.call_soon_threadsafe(self.give_back, index)
        except RuntimeError:  # the loop is closed, and the slots with it
            pass

    def _start(self, index: int) -> int:
        """The word lies before the payload."""
        return index * self._stride + SKEW_BYTES

    def word(self, index: int) -> int:
        start = self._start(index)
        return int(self._memory.bytes[start - WORD_BYTES : start].view(np.uint64)[0])

    def close(self) -> None:
        self._memory.close()
