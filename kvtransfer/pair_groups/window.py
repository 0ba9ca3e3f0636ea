"""What is under way on one pair group. Pure: sequence numbers at both ends.

A pair group has one order, and with nccl a receive that is posted out of turn gets another's bytes; but the references to
its payloads travel in the streams of several pulls, which keep no order among each other, and a stream that breaks takes
its references with it. So a reference names all that was sent and not acknowledged, with sizes: whichever arrives first
lets the reader post every receive that is due, in order, also those that nobody will come for.
"""

import struct
from collections import deque

WINDOW = 32
"""Payloads sent and not acknowledged, at most: a reference has 255 bytes."""

_HEAD = struct.Struct("<QB")
_SIZE = struct.Struct("<I")


class WindowError(Exception):
    """A reference that no window made; one line."""


class SentWindow:
    """The sender's end: numbers payloads from 1."""

    def __init__(self) -> None:
        self._last = 0
        self._sizes: deque[int] = deque()
        self._half: set[int] = set()

    @property
    def num_open(self) -> int:
        return len(self._sizes)

    def add(self, num_bytes: int) -> tuple[int, bytes]:
        """The next payload's number and reference. ``num_open`` must be below WINDOW."""
        assert len(self._sizes) < WINDOW
        self._last += 1
        self._sizes.append(num_bytes)
        return self._last, self.reference()

    def reference(self) -> bytes:
        """To the last payload; empty sizes where all are acknowledged."""
        return _HEAD.pack(self._last, len(self._sizes)) + b"".join(map(_SIZE.pack, self._sizes))

    def acknowledge(self, number: int) -> None:
        """The reader has posted receives up to ``number``; an older or a wrong one changes nothing."""
        while self._sizes and self._last - len(self._sizes) < number <= self._last:
            self._sizes.popleft()
        first = self._last - len(self._sizes) + 1
        self._half = {half for half in self._half if half >= first}

    def half(self, number: int) -> None:
        """One of two signs that the receive of ``number`` was posted: our send has ended, and the reader has done with
        it. Neither will do alone: nccl may end a small send early, and a reader may have skipped a payload unread."""
        if number in self._half:
            self.acknowledge(number)
        else:
            self._half.add(number)


class DueWindow:
    """The reader's end."""

    def __init__(self) -> None:
        self.last = 0
        """Receives are posted up to this one."""

    def learn(self, reference: bytes) -> list[tuple[int, int]]:
        """The (number, bytes) to post now, in order. Raises WindowError."""
        number, sizes = _parse(reference)
        first = number - len(sizes) + 1
        if first > self.last + 1:
            raise WindowError(f"payload {self.last + 1} of the pair is due, the reference begins at {first}")
        due = [(first + at, size) for at, size in enumerate(sizes) if first + at > self.last]
        self.last = max(self.last, number)
        return due


def number_of(reference: bytes) -> int:
    """Which payload it means. Raises WindowError."""
    return _parse(reference)[0]


def size_of(reference: bytes) -> int:
    """Bytes of the payload it means. Raises WindowError."""
    sizes = _parse(reference)[1]
    if not sizes:
        raise WindowError("a reference to no payload")
    return sizes[-1]


def _parse(reference: bytes) -> tuple[int, list[int]]:
    if len(reference) >= _HEAD.size:
        number, count = _HEAD.unpack_from(reference)
        if count <= min(number, WINDOW) and len(reference) == _HEAD.size + count * _SIZE.size:
            return number, [size for (size,) in _SIZE.iter_unpack(reference[_HEAD.size :])]
    raise WindowError(f"a reference of {len(reference)} bytes is no reference to a payload of a pair group")
