"""One pair group: rank 0 sends to rank 1, in one order, until the first thing that goes wrong ends it.

Built in a thread, waited for in a thread, used from the event loop: posting does not block, and whatever does not move
within the deadline (a stopped reader, a lost network) ends the group at both ends. Nothing is repaired: the next pull
builds another.
"""

import asyncio
import queue
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed import Store  # type: ignore[attr-defined]

from biphase.kvtransfer.pair_groups.backends import Backend
from biphase.kvtransfer.pair_groups.buffers import Buffers
from biphase.kvtransfer.pair_groups.window import WINDOW, DueWindow, Payload, SentWindow, WindowError

_HELLO_BYTES = 8
_MOST_OVER = 4096
_PATIENCE = 2.0
"""After so many deadlines a payload is given up whose pull has not begun here."""


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
        self.built.add_done_callback(_seen)
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

    def close(self, reason: str = "the pair group was closed") -> None:
        """Its thread ends within the deadline; whoever waits learns it at once. Idempotent."""
        if self.broken is None:
            self._end(reason)

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
            self._group = self._backend.build(store(), self.rank, build_s)
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


class SendingPair(Pair):
    """The serving end."""

    rank = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._window = SentWindow()
        self._pulls = 0
        self._waiting: set[asyncio.Future[None]] = set()
        super().__init__(*args, **kwargs)

    @property
    def full(self) -> bool:
        return self._window.num_open >= WINDOW

    def standing(self) -> bytes:
        """What a reader must know before it uses the pair: what is under way on it."""
        return self._window.reference()

    def new_pull(self) -> int:
        """A number for one more pull."""
        self._pulls += 1
        return self._pulls

    def send(self, buffer: torch.Tensor, num_bytes: int, pull: int) -> tuple[int, bytes]:
        """Post the first bytes of a buffer, which is the pair's from now on; its number and reference."""
        self.check()
        if self.full:
            raise ConnectionError(f"{WINDOW} payloads are under way on the pair group")
        part = buffer[: max(1, num_bytes)]

        def ended(error: str | None) -> None:
            if error is None:
                self._buffers.put(buffer)
                self.half(number)

        number, reference = self._window.add(part.numel(), pull)
        self._post(lambda: self._group.send([part], 1, _tag(number)), ended)
        return number, reference

    def acknowledge(self, number: int) -> None:
        """The reader has said itself that its receives are posted up to ``number``."""
        self._window.acknowledge(number)
        self._wake()

    def half(self, number: int) -> None:
        """The send of ``number`` has ended, or the reader has done with it."""
        self._window.half(number)
        self._wake()

    async def changed(self) -> None:
        """Until something has been acknowledged, or the pair has ended."""
        self.check()
        turn = self._loop.create_future()
        self._waiting.add(turn)
        try:
            await turn
        finally:
            self._waiting.discard(turn)

    def _end(self, reason: str) -> None:
        super()._end(reason)
        self._wake()

    def _wake(self) -> None:
        for turn in self._waiting:
            if not turn.done():
                turn.set_result(None)


@dataclass(slots=True, eq=False)
class _Arrival:
    """A payload that is due or there, until its pull comes for it. ``buffer`` is set when it is there."""

    pull: int
    since_s: float
    ready: "asyncio.Future[None]"
    buffer: torch.Tensor | None = None
    unwanted: bool = False


class ReceivingPair(Pair):
    """The reading end. Receives what is due in the pair's order, and keeps it for its pull."""

    rank = 1

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._window = DueWindow()
        self._arrivals: dict[int, _Arrival] = {}
        self._pulls: set[int] = set()
        self._over: OrderedDict[int, None] = OrderedDict()
        super().__init__(*args, **kwargs)

    @property
    def last(self) -> int:
        return self._window.last

    def begin(self, pull: int) -> None:
        self._pulls.add(pull)

    def end(self, pull: int) -> None:
        """What has come for it and what is still under way is nobody's."""
        self._pulls.discard(pull)
        self._over[pull] = None
        if len(self._over) > _MOST_OVER:
            self._over.popitem(last=False)
        for number in [number for number, arrival in self._arrivals.items() if arrival.pull == pull]:
            self._give_up(number)

    def learn(self, reference: bytes) -> None:
        """Post the receives that a reference (or a sender's standing) says are due."""
        self.check()
        try:
            due = self._window.learn(reference)
        except WindowError as error:
            self._broke(str(error))
            raise ConnectionError(str(error)) from None
        for payload in due:
            self._receive(payload)
        # a pull may break off before it has begun here: nobody will say that it is over
        before_s = self._loop.time() - _PATIENCE * self._deadline_s
        for number, arrival in list(self._arrivals.items()):
            if arrival.since_s > before_s:
                break
            if arrival.pull not in self._pulls:
                self._give_up(number)

    async def fetch(self, number: int) -> torch.Tensor:
        """Its buffer, which is the caller's from now on."""
        arrival = self._arrivals.get(number)
        if arrival is not None:
            await asyncio.shield(arrival.ready)
            arrival = self._arrivals.pop(number, None)
        if arrival is None or arrival.buffer is None:
            raise ConnectionError(f"payload {number} of the pair group has been fetched before")
        return arrival.buffer

    def _receive(self, payload: Payload) -> None:
        buffer = self._buffers.get(payload.num_bytes)
        arrival = _Arrival(payload.pull, self._loop.time(), self._loop.create_future())
        arrival.unwanted = payload.pull in self._over
        arrival.ready.add_done_callback(_seen)
        if not arrival.unwanted:
            self._arrivals[payload.number] = arrival
        part = buffer[: payload.num_bytes]

        def ended(error: str | None) -> None:
            if error is not None:
                if not arrival.ready.done():
                    arrival.ready.set_exception(ConnectionError(error))
            elif arrival.unwanted:
                self._buffers.put(buffer)
            elif not arrival.ready.done():
                arrival.buffer = buffer
                arrival.ready.set_result(None)

        self._post(lambda: self._group.recv([part], 0, _tag(payload.number)), ended)

    def _give_up(self, number: int) -> None:
        arrival = self._arrivals.pop(number)
        arrival.unwanted = True
        if arrival.buffer is not None:
            self._buffers.put(arrival.buffer)
        elif not arrival.ready.done():
            arrival.ready.set_exception(ConnectionError("the pull is closed"))

    def _end(self, reason: str) -> None:
        super()._end(reason)
        for arrival in self._arrivals.values():
            if not arrival.ready.done():
                arrival.ready.set_exception(ConnectionError(reason))


def _tag(number: int) -> int:
    return number & 0x7FFFFFFF


def _first_line(error: Exception) -> str:
    """torch's errors go on with where in its sources they were raised, and how."""
    lines = str(error).strip().splitlines()
    return lines[0].rpartition("] ")[2] if lines else type(error).__name__


def _seen(future: "asyncio.Future[Any]") -> None:
    """A failure that nobody waits for is no unhandled one."""
    if not future.cancelled():
        future.exception()
