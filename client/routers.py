"""Which router a call goes to when there are several, and where it goes next. No I/O and no clock: time comes in.

Calls go round, so that several routers share the load. One that could not be reached goes to the end of the line for a
while. A request may be sent again only as long as no token of it has come; each router is tried once.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from biphase.protos.errors import BiphaseError, Unavailable

AVOIDED_FOR_S = 5.0

Call = TypeVar("Call")


class Routers:
    """A client's addresses. May be used from several threads."""

    def __init__(self, addresses: Sequence[str]) -> None:
        self.addresses = tuple(addresses)
        self._turns = itertools.count()
        self._failed_s: dict[int, float] = {}

    def order(self, now_s: float) -> list[int]:
        """Indices of the addresses in the order to try them: from the next in turn on, those that failed just now last."""
        count = len(self.addresses)
        first = next(self._turns) % count
        turns = [(first + step) % count for step in range(count)]
        return sorted(turns, key=lambda index: now_s - self._failed_s.get(index, -AVOIDED_FOR_S) < AVOIDED_FOR_S)

    def failed(self, index: int, now_s: float) -> None:
        self._failed_s[index] = now_s

    def worked(self, index: int) -> None:
        self._failed_s.pop(index, None)

    def __repr__(self) -> str:
        return f"<Routers {', '.join(self.addresses)}>"


class Attempts(Generic[Call]):
    """One request's tries. ``start`` makes the call to an address within so many seconds (None: no limit)."""

    def __init__(
        self,
        routers: Routers,
        start: Callable[[int, float | None], Call],
        *,
        sent_at_s: float,
        timeout_s: float | None,
    ) -> None:
        self.timeout_s = timeout_s
        self.sent_at_s = sent_at_s
        self._routers = routers
        self._start = start
        self._left = routers.order(sent_at_s)
        self._index = self._left.pop(0)
        self.call = start(self._index, timeout_s)

    @property
    def address(self) -> str:
        """Of the router that the present call goes to."""
        return self._routers.addresses[self._index]

    def worked(self) -> None:
        """The router has answered."""
        self._routers.worked(self._index)

    def go_on(self, error: BiphaseError, now_s: float, *, has_tokens: bool) -> bool:
        """After a failed call: whether another was made in its place."""
        if not isinstance(error, Unavailable):
            return False
        self._routers.failed(self._index, now_s)
        left_s = None if self.timeout_s is None else self.sent_at_s + self.timeout_s - now_s
        if has_tokens or not self._left or (left_s is not None and left_s <= 0):
            return False
        self._index = self._left.pop(0)
        self.call = self._start(self._index, left_s)
        return True


class Question:
    """One short question's way from router to router; an error of ``elsewhere`` is not the last word."""

    def __init__(self, routers: Routers, elsewhere: tuple[type[BiphaseError], ...]) -> None:
        self._routers = routers
        self._elsewhere = elsewhere
        self._said: BiphaseError | None = None

    def failed(self, index: int, error: BiphaseError, now_s: float) -> None:
        """Raises ``error`` where no other router is to be asked."""
        if not isinstance(error, self._elsewhere):
            raise error from None
        if isinstance(error, Unavailable):
            self._routers.failed(index, now_s)
        if self._said is None or isinstance(self._said, Unavailable):
            self._said = error

    @property
    def said(self) -> BiphaseError:
        """What to tell when none has answered: of the first that could be reached, if any could."""
        assert self._said is not None, "nobody was asked"
        return self._said
