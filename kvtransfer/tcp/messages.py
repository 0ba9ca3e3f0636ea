"""What goes over a connection of the tcp wire.

Every message begins with eight bytes: kind (u8), reference bytes (u8), two bytes zero, size (u32), little-endian.

    CALL    reader to source  ``size`` bytes of msgpack: handshake, release, pull or prepare
    REPLY   source to reader  ``size`` bytes of msgpack: the answer, or why there is none; in a pull the latter ends it
    FRAME   source to reader  64 byte frame header, then ``size`` bytes of payload
    SHOWN   source to reader  64 byte frame header, then a reference to ``size`` bytes of payload out of band
    TAKEN   reader to source  a reference whose payload the reader has done with
    END     source to reader  the pull has come to its end in good order

One connection carries one call at a time, any number one after the other.
"""

import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, NamedTuple

import msgpack

from biphase.kernels.kv_layout import KvBox
from biphase.kvtransfer.wire import PullOrder
from biphase.protos.ids import TicketId

PREFIX_BYTES = 8
MOST_CALL_BYTES = 256 * 1024
"""Of msgpack in a call or reply; a signature of many ranks is the largest there is."""

MOST_REFERENCE_BYTES = 255
_PREFIX = struct.Struct("<BBxxI")
_BOX = ("layer_start", "layer_end", "head_start", "head_end", "token_start", "token_end")
_TICKET_BYTES = 16


class Kind(IntEnum):
    CALL = 1
    REPLY = 2
    FRAME = 3
    SHOWN = 4
    TAKEN = 5
    END = 6


_KINDS = {kind.value: kind for kind in Kind}


class WireError(ConnectionError):
    """Bytes that are none of ours; one line. The connection they came over is of no further use."""


class Prefix(NamedTuple):
    kind: Kind
    reference_bytes: int
    size: int


@dataclass(frozen=True, slots=True)
class PullCall:
    """``plane`` is empty where the payloads come behind their headers."""

    order: PullOrder
    plane: str = ""
    hello: bytes = b""


def prefix(kind: Kind, size: int = 0, reference_bytes: int = 0) -> bytes:
    return _PREFIX.pack(kind, reference_bytes, size)


def read_prefix(data: Any, at: int = 0) -> Prefix:
    """Raises WireError."""
    number, reference_bytes, size = _PREFIX.unpack_from(data, at)
    kind = _KINDS.get(number)
    if kind is None:
        raise WireError(f"a message of unknown kind {number}")
    if size > MOST_CALL_BYTES and (kind is Kind.CALL or kind is Kind.REPLY):
        raise WireError(f"a call of {size} bytes, {MOST_CALL_BYTES} are the most")
    return Prefix(kind, reference_bytes, size)


def message(kind: Kind, body: dict[str, Any]) -> bytes:
    """A call or a reply."""
    packed: bytes = msgpack.packb(body)
    return prefix(kind, len(packed)) + packed


def read_body(data: Any) -> dict[str, Any]:
    """Raises WireError."""
    try:
        body = msgpack.unpackb(data)
    except (ValueError, msgpack.UnpackException) as error:
        raise WireError(f"a call that is no msgpack: {error}") from None
    if not isinstance(body, dict):
        raise WireError(f"a call that is a {type(body).__name__}, not a map")
    return body


def pull_body(call: PullCall) -> dict[str, Any]:
    order = call.order
    return {
        "call": "pull",
        "ticket": order.ticket,
        "epoch": order.epoch,
        "incarnation": order.incarnation,
        "box": [getattr(order.box, name) for name in _BOX],
        "codec": order.codec,
        "digest": order.digest,
        "pieces_only": order.pieces_only,
        "plane": call.plane,
        "hello": call.hello,
    }


def read_pull(body: dict[str, Any]) -> PullCall:
    """Raises WireError."""
    bounds = body.get("box")
    if not isinstance(bounds, list) or len(bounds) != len(_BOX) or not all(_is_count(each) for each in bounds):
        raise WireError(f"a pull of box {bounds!r}")
    order = PullOrder(
        ticket=read_ticket(body),
        epoch=read_epoch(body),
        incarnation=read_count(body, "incarnation"),
        box=KvBox(**dict(zip(_BOX, bounds, strict=True))),
        codec=_read(body, "codec", str),
        digest=_read(body, "digest", str),
        pieces_only=_read(body, "pieces_only", bool),
    )
    return PullCall(order, _read(body, "plane", str), _read(body, "hello", bytes))


def read_ticket(body: dict[str, Any]) -> TicketId:
    ticket = _read(body, "ticket", bytes)
    if len(ticket) != _TICKET_BYTES:
        raise WireError(f"a ticket of {len(ticket)} bytes, not {_TICKET_BYTES}")
    return TicketId(ticket)


def read_epoch(body: dict[str, Any]) -> int:
    """As wide as in a frame's header: a wider one would end every other reader of its ticket and then fit into no frame."""
    epoch = read_count(body, "epoch")
    if epoch >= 2**32:
        raise WireError(f"a call whose epoch is {epoch}, {2**32 - 1} is the most")
    return epoch


def read_count(body: dict[str, Any], name: str) -> int:
    if not _is_count(body.get(name)):
        raise WireError(f"a call whose {name} is {body.get(name)!r}")
    return int(body[name])


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**64


def _read(body: dict[str, Any], name: str, kind: type) -> Any:
    value = body.get(name)
    if not isinstance(value, kind):
        raise WireError(f"a call whose {name} is {value!r:.40}, not {kind.__name__}")
    return value
