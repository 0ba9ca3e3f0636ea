"""The reading end of a pair group: what is due on it, received in its order and kept for the pull that it is of."""

import asyncio
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch

from biphase.kvtransfer.pair_groups.pair import Pair, seen, tag_of
from biphase.kvtransfer.pair_groups.window import DueWindow, Payload, WindowError

_MOST_OVER = 4096
_PATIENCE = 2.0
"""After so many deadlines a payload is given up whose pull has not begun here."""


@dataclass(slots=True, eq=False)
class _Arrival:
    """A payload that is due or there, until its pull comes for it. ``buffer`` is set when it is there."""

    pull: int
    since_s: float
    ready: "asyncio.Future[None]"
    buffer: torch.Tensor | None = None
    unwanted: bool = False


class ReceivingPair(Pair):
    """Rank 1. Lives in the event loop, as Pair."""

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
        arrival.ready.add_done_callback(seen)
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

        self._post(lambda: self._group.recv([part], 0, tag_of(payload.number)), ended)

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
