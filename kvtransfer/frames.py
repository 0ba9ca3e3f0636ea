"""The frames of a pull: a 64 byte header and a payload. No protobuf, no copies of payload bytes. Pure.

    offset  0  magic "BKV1"
            4  kind (u8), 3 bytes zero
            8  epoch (u32)
           12  layer_start, layer_end, head_start, head_end, token_start, token_end (u32 each): request coordinates
           36  payload bytes (u32)
           40  computed tokens (u32): how far the source has computed, in every frame
           44  sent (u32): when it was sealed, on the source's clock (timing.stamp); 0: it does not say
           48  digest (16 bytes): xxh3-128 over header bytes 0..47, the ticket and the content

The payload follows its header, or travels beside it (see wire.py).

Kinds: a *piece* carries the bytes of its box as the pull's codec packs them, raw the canonical ones; a *beat* carries
nothing and says that the source lives and computes; the *trailer* ends the stream and carries token 0. The content of a
digest is the payload; of a piece, where the handshake chose "xxh3-sum64", the payload's position-weighted sum
(kernels.kv_pack.checksum, 8 bytes), which the kernel that packed it has taken. Little-endian throughout.
"""

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, NamedTuple

import xxhash

from biphase.kernels.kv_layout import KvBox, KvLayout
from biphase.kernels.kv_pack.checksum import sum64
from biphase.kernels.kv_pack.codec import packed_bytes
from biphase.kvtransfer.pieces import contains
from biphase.kvtransfer.signature import HEADER_DIGEST, SUM_DIGEST
from biphase.protos.ids import TicketId

HEADER_BYTES = 64
DIGEST_AT = 48
_MAGIC = b"BKV1"
_FIELDS = struct.Struct("<4sB3xI6I3I")
_TRAILER = struct.Struct("<IQIf")
_SUM = struct.Struct("<Q")
_NOTHING = KvBox(layer_start=0, layer_end=0, head_start=0, head_end=0, token_start=0, token_end=0)


class FrameKind(IntEnum):
    PIECE = 1
    BEAT = 2
    TRAILER = 3


_KINDS = {kind.value: kind for kind in FrameKind}


class FrameError(Exception):
    """Bytes that are no frame, or a frame that does not fit its request; one line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trailer:
    """The last word of a whole pull. ``age_ms`` is how long ago, when sealed, token 0 had been sampled."""

    first_token: int
    total_bytes: int
    num_pieces: int
    age_ms: float


class Header(NamedTuple):
    """A received header that makes sense in itself; nothing of it is to be believed before ``digest_fits``."""

    kind: FrameKind
    epoch: int
    box: KvBox
    payload_bytes: int
    computed_tokens: int
    sent: int
    data: bytes


def seal(
    ticket: TicketId,
    kind: FrameKind,
    *,
    epoch: int,
    box: KvBox = _NOTHING,
    payload_bytes: int = 0,
    computed_tokens: int = 0,
    sent: int = 0,
    contents: Iterable[Any] = (),
    content_sum: int | None = None,
) -> bytes:
    """The header of a frame whose payload is ``contents``, buffers in their order. With ``content_sum`` the digest is
    over that, and the payload is not read."""
    ranges = (box.layer_start, box.layer_end, box.head_start, box.head_end, box.token_start, box.token_end)
    fields = _FIELDS.pack(_MAGIC, kind, epoch, *ranges, payload_bytes, computed_tokens, sent)
    return fields + _digest(fields, ticket, contents if content_sum is None else (_SUM.pack(content_sum),))


def beat(ticket: TicketId, epoch: int, computed_tokens: int, sent: int = 0) -> bytes:
    """A sign of life while nothing is due: a header without payload."""
    return seal(ticket, FrameKind.BEAT, epoch=epoch, computed_tokens=computed_tokens, sent=sent)


def trailer(ticket: TicketId, epoch: int, value: Trailer, computed_tokens: int, sent: int = 0) -> tuple[bytes, bytes]:
    """Its header and its payload."""
    payload = _TRAILER.pack(value.first_token, value.total_bytes, value.num_pieces, value.age_ms)
    header = seal(
        ticket,
        FrameKind.TRAILER,
        epoch=epoch,
        payload_bytes=len(payload),
        computed_tokens=computed_tokens,
        sent=sent,
        contents=(payload,),
    )
    return header, payload


def parse_header(data: bytes, num_bytes: int) -> Header:
    """Read the header of a frame that came with ``num_bytes`` of payload.

    Raises FrameError for bytes that are no header, or a frame cut short or drawn out.
    """
    if len(data) != HEADER_BYTES:
        raise FrameError(f"a frame of {len(data)} bytes is shorter than its {HEADER_BYTES} byte header")
    magic, kind, epoch, *ranges, payload_bytes, computed_tokens, sent = _FIELDS.unpack_from(data)
    if magic != _MAGIC:
        raise FrameError(f"a frame begins with {magic.hex()}, not {_MAGIC.hex()}")
    known = _KINDS.get(kind)
    if known is None:
        raise FrameError(f"a frame of unknown kind {kind}")
    if num_bytes != payload_bytes:
        raise FrameError(f"a frame announces {payload_bytes} payload bytes and has {num_bytes}")
    layer_start, layer_end, head_start, head_end, token_start, token_end = ranges
    return Header(
        kind=known,
        epoch=epoch,
        box=KvBox(
            layer_start=layer_start,
            layer_end=layer_end,
            head_start=head_start,
            head_end=head_end,
            token_start=token_start,
            token_end=token_end,
        ),
        payload_bytes=payload_bytes,
        computed_tokens=computed_tokens,
        sent=sent,
        data=bytes(data),
    )


def check_digest(header: Header, ticket: TicketId, contents: Iterable[Any], content_sum: int | None = None) -> None:
    """Raises FrameError where header, payload (``contents``, or its sum) and ticket do not belong together."""
    if content_sum is not None:
        contents = (_SUM.pack(content_sum),)
    if _digest(header.data[: _FIELDS.size], ticket, contents) != header.data[DIGEST_AT:]:
        raise FrameError(f"the digest of a {header.kind.name.lower()} at {where(header.box)} is wrong")


def check_piece_digest(header: Header, ticket: TicketId, contents: Sequence[Any], digest: str) -> None:
    """The same for a piece, whose digest is over what the handshake chose."""
    if digest == SUM_DIGEST:
        data = contents[0] if len(contents) == 1 else b"".join(contents)
        check_digest(header, ticket, (), sum64(data))
    else:
        check_digest(header, ticket, () if digest == HEADER_DIGEST else contents)


def read_trailer(payload: Any) -> Trailer:
    """The trailer in a frame of that kind. Raises FrameError."""
    if len(payload) != _TRAILER.size:
        raise FrameError(f"a trailer of {len(payload)} bytes, not {_TRAILER.size}")
    first_token, total_bytes, num_pieces, age_ms = _TRAILER.unpack(payload)
    return Trailer(first_token=first_token, total_bytes=total_bytes, num_pieces=num_pieces, age_ms=age_ms)


def check_piece(header: Header, layout: KvLayout, wanted: KvBox, codec: str = "raw") -> None:
    """Raises FrameError unless the piece lies in ``wanted`` and its size is that of its box."""
    box = header.box
    if not contains(wanted, box):
        raise FrameError(f"a piece at {where(box)} lies outside what was asked for, {where(wanted)}")
    size = packed_bytes(layout, box, codec)
    if header.payload_bytes != size:
        raise FrameError(f"a piece at {where(box)} has {header.payload_bytes} bytes, not {size}")


def where(box: KvBox) -> str:
    """A box in few words."""
    return (
        f"layers {box.layer_start}-{box.layer_end} heads {box.head_start}-{box.head_end} "
        f"tokens {box.token_start}-{box.token_end}"
    )


def _digest(fields: bytes, ticket: TicketId, contents: Iterable[Any]) -> bytes:
    state = xxhash.xxh3_128(fields)
    state.update(ticket)
    for content in contents:
        state.update(content)
    return bytes(state.digest())
