"""What is under way on one pair group. Pure: sequence numbers at both ends.

A pair group has one order, and with nccl a receive that is posted out of turn gets another's bytes; but the references to
its payloads travel in the streams of several pulls, which keep no order among each other, and a stream that breaks takes
its references with it. So a reference names all that was sent and not acknowledged, with sizes and pulls: whichever
arrives first lets the reader post every receive that is due, in order, also those that nobody will come for.
"""

import struct
from collections import deque
from dataclasses import dataclass

WINDOW = 30
"""Payloads sent and not acknowledged, at most: a reference has 255 bytes."""

_HEAD = struct.Struct("<QB")
_ENTRY = struct.Struct("<II")


@dataclass(frozen=True, slots=True)
class Payload:
    """One that is under way. ``pull``: the number of its pull on the pair."""

    number: int
    num_bytes: int
    pull: int


class WindowError(Exception):
    """A reference that no window made; one line."""


class SentWindow:
    """The sender's end: numbers payloads from 1."""

    def __init__(self) -> None:
        self._last = 0
        self._open: deque[Payload] = deque()
        self._half: set[int] = set()

    @property
    def num_open(self) -> int:
        return len(self._open)

    def add(self, num_bytes: int, pull: int) -> tuple[int, bytes]:
        """The next payload's number and reference. ``num_open`` must be below WINDOW."""
        assert len(self._open) < WINDOW
        self._last += 1
        self._open.append(Payload(self._last, num_bytes, pull))
        return self._last, self.reference()

    def reference(self) -> bytes:
        """To the last payload; to none where all are acknowledged."""
        entries = (_ENTRY.pack(payload.num_bytes, payload.pull) for payload in self._open)
        return _HEAD.pack(self._last, len(self._open)) + b"".join(entries)

    def acknowledge(self, number: int) -> None:
        """The reader has posted receives up to ``number``; an older or a wrong one changes nothing."""
        while self._open and self._open[0].number <= number <= self._last:
            self._open.popleft()
        first = self._last - len(self._open) + 1
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

    def learn(self, reference: bytes) -> list[Payload]:
        """What to post receives for now, in order. Raises WindowError."""
        number, payloads = _parse(reference)
        first = number - len(payloads) + 1
        if first > self.last + 1:
            raise WindowError(f"payload {self.last + 1} of the pair is due, the reference begins at {first}")
        due = [payload for payload in payloads if payload.number > self.last]
        self.last = max(self.last, number)
        return due


def payload_of(reference: bytes) -> Payload:
    """Which payload it means. Raises WindowError."""
    payloads = _parse(reference)[1]
    if not payloads:
        raise WindowError("a reference to no payload")
    return payloads[-1]


def _parse(reference: bytes) -> tuple[int, list[Payload]]:
    if len(reference) >= _HEAD.size:
        last, count = _HEAD.unpack_from(reference)
        if count <= min(last, WINDOW) and len(reference) == _HEAD.size + count * _ENTRY.size:
            entries = enumerate(_ENTRY.iter_unpack(reference[_HEAD.size :]), last - count + 1)
            return last, [Payload(number, num_bytes, pull) for number, (num_bytes, pull) in entries]
    raise WindowError(f"a reference of {len(reference)} bytes is no reference to a payload of a pair group")
