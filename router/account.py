"""What a router knows of one instance's load: its last Load, and what was sent there since. Pure.

A Load says nothing about legs that are still on their way, so the router keeps what it promised until a Load comes
that can have counted it. Counting too early costs a BUSY answer; counting twice would only leave room unused.
"""

from dataclasses import dataclass

from biphase.protos.ids import RequestId
from biphase.protos.values import Load


@dataclass(slots=True)
class _Promise:
    tokens: int
    blocks: int
    opened: bool


class Account:
    """Owned by one link. Starts anew with each Welcome."""

    def __init__(self, load: Load) -> None:
        self.load = load
        self._promises: dict[RequestId, _Promise] = {}
        self._full_at: tuple[int, int] | None = None  # queued tokens, room blocks: the worst seen since a BUSY
        self._refuses = False

    def promise(self, request_id: RequestId, *, tokens: int, blocks: int) -> None:
        """Room is set aside for a request whose leg is not open yet."""
        self._promises[request_id] = _Promise(tokens, blocks, opened=False)

    def opened(self, request_id: RequestId) -> None:
        """Its leg was opened: the next Load counts it."""
        if request_id in self._promises:
            self._promises[request_id].opened = True

    def has_promise(self, request_id: RequestId) -> bool:
        return request_id in self._promises

    def settle(self, request_id: RequestId) -> bool:
        """The promise is kept or void; whether there was one."""
        return self._promises.pop(request_id, None) is not None

    def on_load(self, load: Load) -> None:
        self.load = load
        self._refuses = False
        self._promises = {key: promise for key, promise in self._promises.items() if not promise.opened}
        if self._full_at is not None:
            queued, room = self._full_at
            if load.queued_tokens < queued or load.room_blocks > room:
                self._full_at = None
            else:
                self._full_at = (max(queued, load.queued_tokens), min(room, load.room_blocks))

    def on_busy(self, queued_tokens: int) -> None:
        """The instance answered BUSY: it counts as full until a Load shows less queue or more room."""
        self._full_at = (max(queued_tokens, self.load.queued_tokens), self.load.room_blocks)

    def on_draining(self) -> None:
        """The instance refused because it drains: nothing more until a Load says otherwise."""
        self._refuses = True

    def ask_again(self) -> None:
        """Stop counting it as full, whatever its load."""
        self._full_at = None

    @property
    def full(self) -> bool:
        return self._full_at is not None

    @property
    def draining(self) -> bool:
        return self._refuses or self.load.draining

    @property
    def queued_tokens(self) -> int:
        return self.load.queued_tokens + sum(promise.tokens for promise in self._promises.values())

    @property
    def requests(self) -> int:
        return self.load.queued + self.load.running + len(self._promises)

    @property
    def room_blocks(self) -> int:
        return self.load.room_blocks - sum(promise.blocks for promise in self._promises.values())

    def __repr__(self) -> str:
        return (
            f"<Account [{self.queued_tokens} tokens queued, {self.requests} requests, {self.room_blocks} blocks of room,"
            f" {len(self._promises)} promised, {'full' if self.full else 'open'}]>"
        )
