"""A proxy between both sides of a handoff that tampers with the frames of Pull, and ways to tamper."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio
import numpy as np

from biphase.kernels.kv_layout import KvBox, KvLayout
from biphase.kvtransfer import frames
from biphase.kvtransfer.frames import HEADER_BYTES, FrameError, FrameKind
from biphase.kvtransfer.grpc_transport import SERVICE
from biphase.protos.grpc_setup import bind, channel_options, server_options
from biphase.protos.ids import TicketId
from support.kv import LAYOUT

Tamper = Callable[[int, list[bytes]], list[bytes]]
"""From the number of a Pull call (from 0) and its frames to the frames that the reader gets."""


@dataclass
class Proxy:
    """Stands between reader and source, passes Handshake and Release on, and tampers with the frames of Pull."""

    address: str
    tamper: Tamper
    num_pulls: int = 0
    releases: list[bytes] = field(default_factory=list)
    fail_releases: int = 0


@asynccontextmanager
async def tampering_proxy(target: str, tamper: Tamper) -> AsyncIterator[Proxy]:
    server = grpc.aio.server(options=server_options())
    channel = grpc.aio.insecure_channel(target, options=channel_options(bulk=True))
    proxy = Proxy("", tamper)

    async def pull(request: bytes, context: grpc.aio.ServicerContext) -> None:
        number = proxy.num_pulls
        proxy.num_pulls += 1
        received = [frame async for frame in channel.unary_stream(f"/{SERVICE}/Pull")(request)]
        for frame in proxy.tamper(number, received):
            await context.write(frame)

    async def handshake(request: bytes, context: grpc.aio.ServicerContext) -> bytes:
        return bytes(await channel.unary_unary(f"/{SERVICE}/Handshake")(request))

    async def release(request: bytes, context: grpc.aio.ServicerContext) -> bytes:
        proxy.releases.append(request)
        if len(proxy.releases) <= proxy.fail_releases:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "no answer")
        try:
            return bytes(await channel.unary_unary(f"/{SERVICE}/Release")(request))
        except grpc.aio.AioRpcError as error:
            await context.abort(error.code(), error.details() or "")
            raise

    handlers = {
        "Pull": grpc.unary_stream_rpc_method_handler(pull),
        "Handshake": grpc.unary_unary_rpc_method_handler(handshake),
        "Release": grpc.unary_unary_rpc_method_handler(release),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    proxy.address = f"127.0.0.1:{bind(server, '127.0.0.1', 0)}"
    await server.start()
    try:
        yield proxy
    finally:
        await server.stop(None)
        await channel.close()


def is_piece(frame: bytes) -> bool:
    return frame[4] == FrameKind.PIECE


def pieces_at(received: list[bytes]) -> list[int]:
    return [index for index, frame in enumerate(received) if is_piece(frame)]


def flip_bit(frame: bytes, offset: int) -> bytes:
    return frame[:offset] + bytes([frame[offset] ^ 1]) + frame[offset + 1 :]


def box_of(frame: bytes) -> KvBox:
    return frames.parse_header(frame[:HEADER_BYTES], len(frame) - HEADER_BYTES).box


def digest_fits(frame: bytes, ticket: TicketId, digest: str) -> bool:
    header, payload = frames.parse_header(frame[:HEADER_BYTES], len(frame) - HEADER_BYTES), frame[HEADER_BYTES:]
    try:
        frames.check_piece_digest(header, ticket, (payload,), digest)
    except FrameError:
        return False
    return True


def content_of(frame: bytes, layout: KvLayout = LAYOUT) -> tuple[bytes, np.ndarray[Any, Any]]:
    box = box_of(frame)
    shape = (box.num_layers, 2, box.num_heads, box.num_tokens, layout.head_dim)
    return frame[:HEADER_BYTES], np.frombuffer(frame[HEADER_BYTES:], dtype=np.float32).reshape(shape).copy()


def corrupt(received: list[bytes]) -> list[bytes]:
    at = pieces_at(received)[1]
    return [*received[:at], flip_bit(received[at], HEADER_BYTES + 1000), *received[at + 1 :]]


def corrupt_coordinates(received: list[bytes]) -> list[bytes]:
    at = pieces_at(received)[0]
    return [*received[:at], flip_bit(received[at], 12), *received[at + 1 :]]


def corrupt_magic(received: list[bytes]) -> list[bytes]:
    at = pieces_at(received)[0]
    return [*received[:at], flip_bit(received[at], 0), *received[at + 1 :]]


def corrupt_trailer(received: list[bytes]) -> list[bytes]:
    return [*received[:-1], flip_bit(received[-1], HEADER_BYTES)]


def truncate(received: list[bytes]) -> list[bytes]:
    at = pieces_at(received)[2]
    return [*received[:at], received[at][:-256], *received[at + 1 :]]


def lose(received: list[bytes]) -> list[bytes]:
    at = pieces_at(received)[0]
    return received[:at] + received[at + 1 :]


def duplicate_one_for_another(received: list[bytes]) -> list[bytes]:
    first, second = pieces_at(received)[:2]
    return [*received[:second], received[first], *received[second + 1 :]]


def swap_layers(received: list[bytes]) -> list[bytes]:
    """Two layers exchanged: pieces of equal size under each other's header."""
    first, second = pieces_at(received)[:2]
    boxes = [box_of(received[at]) for at in (first, second)]
    assert boxes[0].layer_end == boxes[1].layer_start and boxes[0].token_end == boxes[1].token_end
    swapped = list(received)
    swapped[first] = received[first][:HEADER_BYTES] + received[second][HEADER_BYTES:]
    swapped[second] = received[second][:HEADER_BYTES] + received[first][HEADER_BYTES:]
    return swapped


def swap_inside(axis: int) -> Any:
    def swap(received: list[bytes]) -> list[bytes]:
        at = pieces_at(received)[0]
        header, content = content_of(received[at])
        if axis == 3:
            size = LAYOUT.block_size
            content[:, :, :, : 2 * size] = np.roll(content[:, :, :, : 2 * size], size, axis=3)
        else:
            content = np.roll(content, 1, axis=axis)
        return [*received[:at], header + content.tobytes(), *received[at + 1 :]]

    return swap


TAMPERINGS = {
    "corrupt": corrupt,
    "corrupt-coordinates": corrupt_coordinates,
    "corrupt-magic": corrupt_magic,
    "corrupt-trailer": corrupt_trailer,
    "truncate": truncate,
    "lose": lose,
    "duplicate-one-for-another": duplicate_one_for_another,
    "swap-layers": swap_layers,
    "swap-k-and-v": swap_inside(1),
    "swap-heads": swap_inside(2),
    "swap-blocks": swap_inside(3),
}
"""Each takes the frames of a whole Pull, of which three or more are pieces, and spoils one or two."""
