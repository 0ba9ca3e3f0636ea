"""What the two ends of a pull say to each other about their pair group, in the frames' stream (msgpack)."""

from dataclasses import asdict, dataclass
from typing import Any

import msgpack

_MOST_COUNT = 2**63


class MessageError(Exception):
    """Bytes that neither end has said; one line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """From the reader. ``life``: how many groups with this source it has dropped; ``last``: up to which payload it has posted
    receives on the one it has."""

    reader: str
    life: int
    last: int
    backend: str

    def packed(self) -> bytes:
        return bytes(msgpack.packb(asdict(self)))

    @staticmethod
    def unpacked(data: bytes) -> "Wish":
        """Raises MessageError."""
        said = _map(data)
        return Wish(
            reader=_text(said, "reader"),
            life=_count(said, "life"),
            last=_count(said, "last"),
            backend=_text(said, "backend"),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """From the source. ``store``: where the group is built, under the name ``pair``; ``pull``: this pull's number on it;
    ``standing``: what is under way on it."""

    store: tuple[str, int]
    pair: str
    pull: int
    standing: bytes

    def packed(self) -> bytes:
        return bytes(msgpack.packb(asdict(self)))

    @staticmethod
    def unpacked(data: bytes) -> "Answer":
        """Raises MessageError."""
        said = _map(data)
        store, standing = said.get("store"), said.get("standing")
        if not isinstance(store, list) or [type(each) for each in store] != [str, int] or not 0 < store[1] < 65536:
            raise MessageError(f"store is {store!r:.40}")
        if not isinstance(standing, bytes):
            raise MessageError(f"standing is {standing!r:.40}")
        return Answer(
            store=(store[0], store[1]), pair=_text(said, "pair"), pull=_count(said, "pull"), standing=standing
        )


def _map(data: bytes) -> dict[str, Any]:
    try:
        said = msgpack.unpackb(data)
    except (ValueError, msgpack.UnpackException) as error:
        raise MessageError(f"no msgpack: {error}") from None
    if not isinstance(said, dict):
        raise MessageError(f"a {type(said).__name__}, not a map")
    return said


def _text(said: dict[str, Any], name: str) -> str:
    value = said.get(name)
    if not isinstance(value, str):
        raise MessageError(f"{name} is {value!r:.40}")
    return value


def _count(said: dict[str, Any], name: str) -> int:
    value = said.get(name)
    if type(value) is not int or not 0 <= value < _MOST_COUNT:
        raise MessageError(f"{name} is {value!r:.40}")
    return value
