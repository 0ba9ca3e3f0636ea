"""One pair group: rank 0 sends to rank 1, in one order, until the first thing that goes wrong ends it.

Built in a thread, waited for in a thread, used from the event loop: posting does not block, and whatever does not move
within the deadline (a stopped reader, a lost network) ends the group at both ends. Nothing is repaired: the next pull
builds another.
"""

import asyncio
import queue
import threading
import time
from collections.abc import Callable
from typing import Any

from torch.distributed import Store  # type: ignore[attr-defined]

from biphase.kvtransfer.pair_groups.backends import Backend
from biphase.kvtransfer.pair_groups.buffers import Buffers

_HELLO_BYTES = 8
_POLL_S = 0.002


class Pair:
    """What both ends have in common. ``on_broken`` is called once, in the loop, unless ``close`` came first."""

    rank: int

    def __init__(
        self,
        key: str,
        backend: Backend,
        store: Callable[[], Store],
        *,
        buffers: Buffers,
        build_s: float,
        deadline_s: float,
        on_broken: "Callable[[Pair], None]",
    ) -> None:
        self.key = key
        self.users = 0
        self.broken: str | None = None
        self.built: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.built.add_done_callback(seen)
        self._loop = asyncio.get_running_loop()
        self._backend = backend
        self._buffers = buffers
        self._deadline_s = deadline_s
        self._on_broken = on_broken
        self._group: Any = None
        self._posted: queue.SimpleQueue[tuple[Any, Callable[[str | None], None]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._live, args=(store, build_s), name=f"pair {key}", daemon=True)
        self._thread.start()

    @property
    def idle(self) -> bool:
        """Nobody uses it, and it is not being built."""
        return self.users == 0 and self.built.done()

    @property
    def ready(self) -> bool:
        """It is built, and nothing has ended it."""
        return self.broken is None and self.built.done()

    def close(self, reason: str = "the pair group was closed") -> None:
        """Its thread ends within the deadline; whoever waits learns it at once. Idempotent."""
        if self.broken is None:
            self._end(reason)

    @property
    def over(self) -> bool:
        """Its thread has ended, and with it all that the group was."""
        return not self._thread.is_alive()

    def join(self, timeout_s: float) -> bool:
        """Wait for that. Blocks: not for the event loop."""
        self._thread.join(max(0.0, timeout_s))
        return self.over

    def _end(self, reason: str) -> None:
        self.broken = reason
        self._posted.put(None)
        if not self.built.done():
            self.built.set_exception(ConnectionError(reason))

    def check(self) -> None:
        if self.broken is not None:
            raise ConnectionError(self.broken)

    def _post(self, post: Callable[[], Any], done: Callable[[str | None], None]) -> None:
        """``done(error)`` is called in the loop when the operation has ended and its memory is nobody's."""
        try:
            with self._backend.posting():
                work = post()
        except RuntimeError as error:
            self._broke(_first_line(error))
            raise ConnectionError(self.broken) from None
        self._posted.put((work, done))

    def _broke(self, reason: str) -> None:
        if self.broken is None:
            self._end(reason)
            self._on_broken(self)

    # In the pair's thread.

    def _live(self, store: Callable[[], Store], build_s: float) -> None:
        """From building to the end of the last operation."""
        try:
            self._group = self._backend.build(self._meet(store(), build_s), self.rank, build_s)
            self._greet(build_s)
        except (OSError, RuntimeError, ValueError) as error:
            self._tell(self._broke, f"no pair group was built within {build_s:g} s: {_first_line(error)}")
            self._finish(broken=True)
            return
        self._tell(self._is_built)
        error_text: str | None = None
        while (item := self._posted.get()) is not None:
            work, done = item
            try:
                if error_text is None:
                    self._backend.wait(work, self._deadline_s)
            except RuntimeError as error:
                error_text = _first_line(error)
                self._tell(self._broke, error_text)
            del work, item
            self._tell(done, error_text)
        self._finish(broken=error_text is not None or not self._posted.empty())

    def _meet(self, store: Store, build_s: float) -> Store:
        """The store once both ends are there: what waits for the other in gloo or nccl cannot be called off."""
        until_s = time.monotonic() + build_s
        store.set(f"there/{self.rank}", "")
        while not store.check([f"there/{1 - self.rank}"]):
            self.check()
            if time.monotonic() > until_s:
                raise RuntimeError("nobody came")
            time.sleep(_POLL_S)
        return store

    def _greet(self, build_s: float) -> None:
        """Both ways once: the connections are made now, not with the first payload."""
        for sender in (0, 1):
            hello = self._backend.buffer(_HELLO_BYTES)
            post = self._group.send if sender == self.rank else self._group.recv
            with self._backend.posting():
                work = post([hello], 1 - self.rank, 0)
            self._backend.wait(work, build_s)

    def _finish(self, *, broken: bool) -> None:
        group, self._group = self._group, None
        if group is not None:
            try:
                self._backend.end(group, broken=broken)
            except RuntimeError:  # it is gone either way
                pass
        while not self._posted.empty():
            item = self._posted.get()
            if item is not None:
                self._tell(item[1], "the pair group was closed")

    def _is_built(self) -> None:
        if not self.built.done():
            self.built.set_result(None)

    def _tell(self, callback: Callable[..., None], *args: object) -> None:
        try:
            self._loop.call_soon_threadsafe(callback, *args)
        except RuntimeError:  # the loop is closed, and nobody will say that it is over
            self._posted.put(None)


def tag_of(number: int) -> int:
    return number & 0x7FFFFFFF


def _first_line(error: Exception) -> str:
    """torch's errors go on with where in its sources they were raised, and how."""
    lines = str(error).strip().splitlines()
    return lines[0].rpartition("] ")[2] if lines else type(error).__name__


def seen(future: "asyncio.Future[Any]") -> None:
    """A failure that nobody waits for is no unhandled one."""
    if not future.cancelled():
        future.exception()
