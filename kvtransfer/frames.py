"""The frames of a Pull stream: a 64 byte header, then the payload. No protobuf, no copies of payload bytes.

    offset  0  magic "BKV1"
            4  kind (u8), 3 bytes zero
            8  epoch (u32)
           12  layer_start, layer_end, head_start, head_end, token_start, token_end (u32 each): request coordinates
           36  payload bytes (u32)
           40  computed tokens (u32): how far the source has computed, in every frame
           44  zero (u32)
           48  digest (16 bytes): xxh3-128 over header bytes 0..47, the ticket and the content
           64  payload

Kinds: a *piece* carries the canonical bytes of its box; a *beat* carries nothing and says that the source lives and
computes; the *trailer* ends the stream and carries token 0. The content of a digest is the payload; of a piece, where
the handshake chose "xxh3-sum64", the payload's position-weighted sum (kernels.kv_pack.checksum, 8 bytes), which the
kernel that packed it has taken. Little-endian throughout.
"""

import ctypes
import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import xxhash

from biphase.kernels.kv_layout import KvBox, KvLayout
from biphase.kernels.kv_pack.checksum import sum64
from biphase.kvtransfer.pieces import contains
from biphase.kvtransfer.signature import BYTES_DIGEST, SUM_DIGEST
from biphase.protos.ids import TicketId

HEADER_BYTES = 64
_DIGEST_AT = 48
_MAGIC = b"BKV1"
_FIELDS = struct.Struct("<4sB3xI6I3I")
_TRAILER = struct.Struct("<IQIf")
_SUM = struct.Struct("<Q")
_NOTHING = KvBox(layer_start=0, layer_end=0, head_start=0, head_end=0, token_start=0, token_end=0)
_PYBUF_WRITE = 0x200

# Bytes objects are filled before anyone else sees them: the one way to let numpy gather straight into what gRPC sends.
_new_bytes = ctypes.pythonapi.PyBytes_FromStringAndSize
_new_bytes.restype, _new_bytes.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_ssize_t]
_bytes_address = ctypes.pythonapi.PyBytes_AsString
_bytes_address.restype, _bytes_address.argtypes = ctypes.c_void_p, [ctypes.py_object]
_view_of_memory = ctypes.pythonapi.PyMemoryView_FromMemory
_view_of_memory.restype = ctypes.py_object
_view_of_memory.argtypes = [ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int]


class FrameKind(IntEnum):
    PIECE = 1
    BEAT = 2
    TRAILER = 3


class FrameError(Exception):
    """Bytes that are no frame, or a frame that does not fit its request; one line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trailer:
    """The last word of a whole pull. ``age_ms`` is how long ago, when sent, token 0 had been sampled."""

    first_token: int
    total_bytes: int
    num_pieces: int
    age_ms: float


class NewFrame:
    """A frame being filled: write ``payload``, then ``seal`` once. Not to be touched after that."""

    def __init__(
        self, kind: FrameKind, *, epoch: int, box: KvBox = _NOTHING, payload_bytes: int = 0, computed_tokens: int = 0
    ) -> None:
        size = HEADER_BYTES + payload_bytes
        self._data: bytes = _new_bytes(None, size)
        self._view: memoryview = _view_of_memory(_bytes_address(self._data), size, _PYBUF_WRITE)
        ranges = (box.layer_start, box.layer_end, box.head_start, box.head_end, box.token_start, box.token_end)
        _FIELDS.pack_into(self._view, 0, _MAGIC, kind, epoch, *ranges, payload_bytes, computed_tokens, 0)
        self.payload: memoryview = self._view[HEADER_BYTES:]

    def seal(self, ticket: TicketId, content_sum: int | None = None) -> bytes:
        """Write the digest and give the finished frame away. With ``content_sum`` the digest is over that."""
        content = self.payload if content_sum is None else _SUM.pack(content_sum)
        self._view[_DIGEST_AT:HEADER_BYTES] = _digest(self._view, ticket, content)
        self.payload.release()
        self._view.release()
        return self._data


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """A received frame whose header makes sense in itself. ``payload`` is a view of the received bytes."""

    kind: FrameKind
    epoch: int
    box: KvBox
    computed_tokens: int
    payload: memoryview
    digest_ok: bool


def beat(ticket: TicketId, epoch: int, computed_tokens: int) -> bytes:
    """A sign of life while nothing is due."""
    return NewFrame(FrameKind.BEAT, epoch=epoch, computed_tokens=computed_tokens).seal(ticket)


def trailer(ticket: TicketId, epoch: int, value: Trailer, computed_tokens: int) -> bytes:
    frame = NewFrame(FrameKind.TRAILER, epoch=epoch, payload_bytes=_TRAILER.size, computed_tokens=computed_tokens)
    _TRAILER.pack_into(frame.payload, 0, value.first_token, value.total_bytes, value.num_pieces, value.age_ms)
    return frame.seal(ticket)


def parse(data: bytes, ticket: TicketId, digest: str = BYTES_DIGEST) -> Frame:
    """Read one received frame and check its digest; the payload is not copied. ``digest``: what a piece's is over.

    Raises FrameError for bytes that are no frame, or one cut short or drawn out. A wrong digest is no error here: the
    reader asks for such a piece again, and says so.
    """
    if len(data) < HEADER_BYTES:
        raise FrameError(f"a frame of {len(data)} bytes is shorter than its {HEADER_BYTES} byte header")
    magic, kind, epoch, *ranges, payload_bytes, computed_tokens, _ = _FIELDS.unpack_from(data)
    if magic != _MAGIC:
        raise FrameError(f"a frame begins with {magic.hex()}, not {_MAGIC.hex()}")
    if kind not in FrameKind._value2member_map_:
        raise FrameError(f"a frame of unknown kind {kind}")
    if len(data) - HEADER_BYTES != payload_bytes:
        raise FrameError(f"a frame announces {payload_bytes} payload bytes and has {len(data) - HEADER_BYTES}")
    view = memoryview(data)
    payload = view[HEADER_BYTES:]
    summed = digest == SUM_DIGEST and kind == FrameKind.PIECE
    expected = _digest(view, ticket, _SUM.pack(sum64(payload)) if summed else payload)
    layer_start, layer_end, head_start, head_end, token_start, token_end = ranges
    return Frame(
        kind=FrameKind(kind),
        epoch=epoch,
        box=KvBox(
            layer_start=layer_start,
            layer_end=layer_end,
            head_start=head_start,
            head_end=head_end,
            token_start=token_start,
            token_end=token_end,
        ),
        computed_tokens=computed_tokens,
        payload=payload,
        digest_ok=expected == data[_DIGEST_AT:HEADER_BYTES],
    )


def read_trailer(frame: Frame) -> Trailer:
    """The trailer in a frame of that kind. Raises FrameError."""
    if len(frame.payload) != _TRAILER.size:
        raise FrameError(f"a trailer of {len(frame.payload)} bytes, not {_TRAILER.size}")
    first_token, total_bytes, num_pieces, age_ms = _TRAILER.unpack(frame.payload)
    return Trailer(first_token=first_token, total_bytes=total_bytes, num_pieces=num_pieces, age_ms=age_ms)


def check_piece(frame: Frame, layout: KvLayout, wanted: KvBox) -> None:
    """Raises FrameError unless the piece lies in ``wanted`` and its size is that of its box."""
    box = frame.box
    if not contains(wanted, box):
        raise FrameError(f"a piece at {where(box)} lies outside what was asked for, {where(wanted)}")
    if len(frame.payload) != box.num_bytes(layout):
        raise FrameError(f"a piece at {where(box)} has {len(frame.payload)} bytes, not {box.num_bytes(layout)}")


def where(box: KvBox) -> str:
    """A box in few words."""
    return (
        f"layers {box.layer_start}-{box.layer_end} heads {box.head_start}-{box.head_end} "
        f"tokens {box.token_start}-{box.token_end}"
    )


def _digest(frame: Any, ticket: TicketId, content: Any) -> bytes:
    state = xxhash.xxh3_128(frame[:_DIGEST_AT])
    state.update(ticket)
    state.update(content)
    return bytes(state.digest())
