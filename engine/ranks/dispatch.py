"""Who hears a message of which kind: in the asyncio loop, or, where a hop costs too much, in the thread that read it."""

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from biphase.engine.ranks.connection import Message
from biphase.protos.errors import one_line

_log = logging.getLogger(__name__)

MAX_KEPT = 4096
"""Messages of a kind that nobody listens to yet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Handler:
    call: Callable[..., None]
    direct: bool


_NOBODY = _Handler(call=lambda *_: None, direct=True)


class Dispatch:
    """Messages of a kind reach its handler in the order in which they came. Those that come before anybody listens to
    their kind are kept for it. ``on_error``: a handler in the loop has raised."""

    def __init__(self, loop: asyncio.AbstractEventLoop, on_error: Callable[[str], None]) -> None:
        self._loop = loop
        self._on_error = on_error
        self._lock = threading.Lock()
        self._handlers: dict[str, _Handler] = {}
        self._kept: dict[str, deque[tuple[Any, ...]]] = {}

    def subscribe(self, kind: str, handler: Callable[..., None], *, direct: bool) -> None:
        """Raises ValueError when somebody listens to ``kind`` already."""
        with self._lock:
            if self._handlers.get(kind, _NOBODY) is not _NOBODY:
                raise ValueError(f"messages of kind {kind!r} have a handler already")
            found = self._handlers[kind] = _Handler(call=handler, direct=direct)
            for arguments in self._kept.pop(kind, ()):
                self._deliver(found, arguments)

    def unsubscribe(self, kind: str, *, keep: bool = False) -> None:
        """Nobody listens any more: what comes of this kind is dropped, or kept as before, until somebody does again."""
        with self._lock:
            if keep:
                self._handlers.pop(kind, None)
            else:
                self._handlers[kind] = _NOBODY

    def __call__(self, message: Message, *source: int) -> None:
        """In the thread that read it. ``source``: what the handler is told before the message."""
        kind, arguments = str(message["kind"]), (*source, message)
        with self._lock:
            handler = self._handlers.get(kind)
            if handler is None:
                kept = self._kept.setdefault(kind, deque())
                if len(kept) == MAX_KEPT:
                    raise ValueError(f"nobody takes the {MAX_KEPT} messages of kind {kind!r}")
                kept.append(arguments)
                return
            if not handler.direct:
                self._deliver(handler, arguments)
                return
        handler.call(*arguments)

    def _deliver(self, handler: _Handler, arguments: tuple[Any, ...]) -> None:
        if handler.direct:
            handler.call(*arguments)
            return
        try:
            self._loop.call_soon_threadsafe(self._in_loop, handler.call, arguments)
        except RuntimeError:
            pass  # the loop has been closed: the process ends

    def _in_loop(self, call: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        try:
            call(*arguments)
        except Exception as error:  # noqa: BLE001 -- whatever it did not do, this rank does not follow the others any more
            kind = arguments[-1]["kind"]
            _log.exception("a message of kind %s could not be handled", kind)
            self._on_error(f"a message of kind {kind} could not be handled: {type(error).__name__}: {one_line(error)}")
