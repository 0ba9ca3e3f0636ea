"""The serving end of a pair group: what is sent on it, in its order, and how much may be under way."""

import asyncio
from typing import Any

import torch

from biphase.kvtransfer.pair_groups.pair import Pair, tag_of
from biphase.kvtransfer.pair_groups.window import WINDOW, SentWindow


class SendingPair(Pair):
    """Rank 0. Lives in the event loop, as Pair."""

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
        self._post(lambda: self._group.send([part], 1, tag_of(number)), ended)
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
