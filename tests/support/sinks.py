"""Sinks for a service without a wire."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

from biphase.kvtransfer.frames import FrameKind, parse_header
from biphase.kvtransfer.wire import Room


@dataclass
class MemoryRoom:
    """Plain memory for one payload."""

    payload: memoryview


@dataclass
class KindsSink:
    """Takes everything at once and notes what it was; ``sent`` is set after each frame, ``layers`` is how many of them
    have come for the last tokens."""

    kinds: list[FrameKind] = field(default_factory=list)
    sent: asyncio.Event = field(default_factory=asyncio.Event)
    layers: int = 0
    gathers: bool = False

    def piece_bytes(self, message_bytes: int) -> int:
        return message_bytes

    async def room(self, num_bytes: int) -> MemoryRoom:
        return MemoryRoom(memoryview(bytearray(num_bytes)))

    async def send(self, header: bytes, payload: Room | Sequence[memoryview] | bytes) -> None:
        num_bytes = len(payload.payload) if isinstance(payload, MemoryRoom) else 0
        kind = FrameKind(header[4])
        self.kinds.append(kind)
        if kind is FrameKind.PIECE:
            self.layers = max(self.layers, parse_header(header, num_bytes).box.layer_end)
        self.sent.set()

    async def abort(self, header: bytes, payload: Room | Sequence[memoryview] | bytes, share: float) -> None:
        raise ConnectionError("broken on purpose")

    def close(self) -> None:
        pass
