"""What one request has for its client and the client has not taken yet: bounded, and never in another's way.

The request puts pieces in as tokens come; the client's handler takes them. What came between two takes is taken as
one piece, so a slow client gets several tokens per message.
"""

import asyncio
from collections.abc import Callable

from biphase.protos.errors import BiphaseError
from biphase.router.output import Piece
from biphase.router.record import Summary


class ReplyStream:
    """One writer (the request), one taker (the handler), both in the loop.

    ``clock`` gives seconds. ``writing_since_s`` is when the taker last took something it has not come back from: how
    long the client has kept us waiting.
    """

    def __init__(self, clock: Callable[[], float], max_buffered_tokens: int) -> None:
        self._clock = clock
        self.max_buffered_tokens = max_buffered_tokens
        self._first_index = 0
        self._token_ids: list[int] = []
        self._text: list[str] = []
        self._summary: Summary | None = None
        self._error: BiphaseError | None = None
        self._changed = asyncio.Event()
        self.writing_since_s: float | None = None

    @property
    def overfull(self) -> bool:
        return len(self._token_ids) > self.max_buffered_tokens

    @property
    def num_buffered_tokens(self) -> int:
        return len(self._token_ids)

    def put(self, piece: Piece) -> None:
        if not self._token_ids and not self._text:
            self._first_index = piece.first_index
        self._token_ids.extend(piece.token_ids)
        if piece.text:
            self._text.append(piece.text)
        self._changed.set()

    def finish(self, summary: Summary) -> None:
        self._summary = summary
        self._changed.set()

    def fail(self, error: BiphaseError, *, drop_pending: bool = False) -> None:
        """The taker gets what is pending, unless dropped, then the error."""
        self._error = error
        if drop_pending:
            self._token_ids, self._text = [], []
        self._changed.set()

    def started_writing(self) -> None:
        """The taker is about to write something of its own."""
        self.writing_since_s = self._clock()

    async def take(self) -> Piece | Summary:
        """The next piece, or the summary, which is the last. Raises the error that ended the request."""
        self.writing_since_s = None
        while True:
            self._changed.clear()
            if self._token_ids or self._text:
                piece = Piece(first_index=self._first_index, token_ids=tuple(self._token_ids), text="".join(self._text))
                self._token_ids, self._text = [], []
                self.writing_since_s = self._clock()
                return piece
            if self._error is not None:
                raise self._error
            if self._summary is not None:
                self.writing_since_s = self._clock()
                return self._summary
            await self._changed.wait()

    def __repr__(self) -> str:
        return f"<ReplyStream [{len(self._token_ids)} tokens waiting]>"
