"""The two ends of one pull over a pair group."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import torch

from biphase.kvtransfer.frames import HEADER_BYTES
from biphase.kvtransfer.pair_groups.buffers import Buffers, view
from biphase.kvtransfer.pair_groups.receiving import ReceivingPair
from biphase.kvtransfer.pair_groups.sending import SendingPair
from biphase.kvtransfer.pair_groups.window import WindowError, payload_of
from biphase.kvtransfer.until_closed import UntilClosed
from biphase.kvtransfer.wire import Room

Join = Callable[[str, bytes], Awaitable[tuple[ReceivingPair, int]]]
"""From a peer and its answer to the group that names, built if it must be, and the pull's number on it."""

Leave = Callable[[ReceivingPair, int], None]

_UNTAKEN = 6
"""Payloads that one pull may have sent and not heard of, so that a slow reader leaves room for others."""

_LARGER = 4
"""Pieces of four messages: each wakes three threads at either end, which costs as much CPU time as copying 1 MiB."""


@dataclass(slots=True, eq=False)
class _DistRoom:
    payload: Any
    buffer: torch.Tensor
    num_bytes: int


class DistSender:
    """A PayloadSender (wire.py)."""

    def __init__(self, pair: SendingPair, pull: int, buffers: Buffers, answer: bytes, *, wait_s: float) -> None:
        self.answer = answer
        self._pair = pair
        self._pull = pull
        self._buffers = buffers
        self._wait_s = wait_s
        self._untaken: set[int] = set()
        self._closed = False
        pair.users += 1

    def piece_bytes(self, message_bytes: int) -> int:
        return _LARGER * (message_bytes + HEADER_BYTES)

    async def room(self, num_bytes: int) -> _DistRoom:
        self._check()
        await self._until(lambda: not self._pair.full and len(self._untaken) < _UNTAKEN)
        buffer = self._buffers.get(num_bytes)
        return _DistRoom(view(buffer, num_bytes), buffer, num_bytes)

    async def send(self, room: Room) -> bytes:
        assert isinstance(room, _DistRoom)
        self._check()
        await self._until(lambda: not self._pair.full)  # others may have filled it since
        number, reference = self._pair.send(room.buffer, room.num_bytes, self._pull)
        self._untaken.add(number)
        return reference

    def taken(self, reference: bytes) -> None:
        try:
            number = payload_of(reference).number
        except WindowError as error:
            raise ConnectionError(str(error)) from None
        if number in self._untaken:
            self._untaken.discard(number)
            self._pair.half(number)

    def close(self) -> None:
        """What it has sent stays under way: the reader receives it in its turn and drops it."""
        if not self._closed:
            self._closed = True
            self._pair.users -= 1

    async def _until(self, true: Callable[[], bool]) -> None:
        """Raises ConnectionError where it does not come true in time, or never will."""
        if true() and self._pair.built.done():
            return
        try:
            async with asyncio.timeout(self._wait_s):
                await asyncio.shield(self._pair.built)
                while not true():
                    await self._pair.changed()
                    self._check()
        except TimeoutError:
            raise ConnectionError(f"the reader has taken nothing for {self._wait_s:g} s") from None

    def _check(self) -> None:
        if self._closed:
            raise ConnectionError("the pull is closed")
        self._pair.check()


class DistReceiver:
    """A PayloadReceiver (wire.py)."""

    def __init__(self, join: Join, leave: Leave, buffers: Buffers, peer: str, hello: bytes) -> None:
        self.hello = hello
        self._join = join
        self._leave = leave
        self._buffers = buffers
        self._peer = peer
        self._pair: ReceivingPair | None = None
        self._pull = 0
        self._fetched: dict[bytes, torch.Tensor] = {}
        self._until_closed = UntilClosed()

    async def start(self, answer: bytes) -> None:
        assert self._pair is None
        self._pair, self._pull = await self._join(self._peer, answer)

    def expect(self, reference: bytes) -> None:
        """Receive it while an earlier one is used: a payload travels only when somebody is there to receive it."""
        if self._pair is not None:
            self._pair.learn(reference)

    async def fetch(self, reference: bytes, num_bytes: int) -> Any:
        if self._pair is None:
            raise ConnectionError("the pull is closed, or was not started")
        try:
            meant = payload_of(reference)
        except WindowError as error:
            raise ConnectionError(str(error)) from None
        if meant.num_bytes != max(1, num_bytes):
            raise ConnectionError(f"a payload of {num_bytes} bytes whose reference says {meant.num_bytes}")
        self._pair.learn(reference)
        buffer = self._fetched[reference] = await self._until_closed.run(self._pair.fetch(meant.number))
        return view(buffer, num_bytes)

    def intact(self, reference: bytes) -> bool:
        """The buffer is ours until it is given back."""
        return True

    def done(self, reference: bytes) -> None:
        buffer = self._fetched.pop(reference, None)
        if buffer is not None:
            self._buffers.put(buffer)

    def close(self) -> None:
        """What was fetched and not given back may still be read, by a thread that no cancellation stops: it is dropped."""
        self._fetched.clear()
        self._until_closed.close()
        if self._pair is not None:
            self._leave(self._pair, self._pull)
            self._pair = None
