"""A KV pool in a GPU's memory, read and written by boxes: the KvMemory of GPU engines. Owns its staging, not the pool.

pack: pool -> (kernel) -> device staging -> pinned host memory -> the caller's buffer; unpack the other way. Both work on
a stream of their own and return when that has come to its end, so a call costs what its copies take, not what the
engine's running step takes. On a CPU (kernels interpreted, for tests) the same calls run without streams.
"""

import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, Literal, Protocol, Self

import numpy as np
import torch

from biphase.kernels.kv_layout import KvBox, KvLayout
from biphase.kernels.kv_pack.checksum import MASK
from biphase.kernels.kv_pack.codec import blocks_of, check_box, packed_bytes
from biphase.kernels.kv_pack.triton_gpu import pack, unpack

_ALIGNMENT = 16
_LEAST_STAGING = 2 << 20


class Event(Protocol):
    """A point of a device's work: ``of_device`` is a torch.cuda.Event, or None where nothing is pending."""

    of_device: Any


class GpuKvMemory:
    """Boxes of requests in a pool ``[layers, blocks, 2, kv_heads, block_size, dim]``, contiguous.

    Any thread may call pack and unpack, the event loop's among them; calls of the same direction take turns, the GIL is
    released while they wait. ``after`` is asked at every pack, in that thread, for the event behind which the blocks
    hold what is packed. Return one that lies before the running step where the request's tokens were announced before
    it was launched: the call waits for the event. Blocks given to unpack must not be in use by launched work: the block
    pool gives them out only when that is over.
    """

    content_digest: Literal["sum64"] = "sum64"

    def __init__(
        self,
        pool: torch.Tensor,
        layout: KvLayout,
        *,
        after: Callable[[], Event | torch.cuda.Event | None] | None = None,
    ) -> None:
        if pool.dim() != 6 or tuple(pool.shape) != layout.pool_shape(pool.shape[1]):
            raise ValueError(f"a pool of shape {list(pool.shape)} does not fit {layout}")
        if pool.dtype != getattr(torch, layout.dtype):
            raise ValueError(
                f"the pool's dtype is {str(pool.dtype).removeprefix('torch.')}, the layout's {layout.dtype}"
            )
        if not pool.is_contiguous():
            raise ValueError("the pool is not contiguous")
        self.layout = layout
        self.num_blocks = pool.shape[1]
        self._pool = pool
        self._after = after
        self._outgoing = _Lane(pool.device)
        self._incoming = _Lane(pool.device)

    def pack(self, blocks: Sequence[int], box: KvBox, out: Any, codec: str = "raw") -> int:
        """Write the packed box to ``out``, a writable buffer of that size; returns its sum.

        See KvMemory. ``out`` may be a tensor on the pool's device: then nothing but the sum comes to the host. Staging grows
        to the largest box asked for.
        """
        if isinstance(out, torch.Tensor):
            return self._pack_on_device(blocks, box, out, codec)
        target = self._bytes(blocks, box, out, self.layout, codec)
        if target.size == 0:
            return 0
        table, box = self._own_blocks(blocks, box)
        with self._outgoing as lane:
            lane.reserve(target.size, len(table))
            lane.wait_for(self._after() if self._after is not None else None)
            lane.host_table[:] = table
            lane.send_table()
            pack(self._pool, lane.table, box, lane.data, lane.total, codec=codec)
            lane.fetch()
            target[:] = lane.host_data
            return int(lane.host_total[0]) & MASK

    def unpack(
        self, blocks: Sequence[int], box: KvBox, data: Any, codec: str = "raw", group_size: int | None = None
    ) -> int | None:
        """The inverse of pack: write a packed box into the request's blocks. See KvMemory. Of a tensor on the pool's device
        it returns the sum, which nobody on the host could take first."""
        size = group_size or self.layout.block_size
        if isinstance(data, torch.Tensor):
            return self._unpack_on_device(blocks, box, data, codec, size)
        source = self._bytes(blocks, box, data, replace(self.layout, block_size=size), codec)
        if source.size == 0:
            return None
        table, box = self._own_blocks(blocks, box, size)
        with self._incoming as lane:
            lane.reserve(source.size, len(table))
            lane.host_data[:] = source
            lane.host_table[:] = table
            lane.send()
            unpack(self._pool, lane.table, box, lane.data, lane.total, codec=codec, group_size=size)
            lane.finish()
        return None

    def _pack_on_device(self, blocks: Sequence[int], box: KvBox, out: torch.Tensor, codec: str) -> int:
        self._check_on_device(blocks, box, out, self.layout, codec)
        if out.numel() == 0:
            return 0
        table, box = self._own_blocks(blocks, box)
        with self._outgoing as lane:
            lane.reserve(0, len(table))
            lane.wait_for(self._after() if self._after is not None else None)
            lane.host_table[:] = table
            lane.send_table()
            pack(self._pool, lane.table, box, out, lane.total, codec=codec)
            lane.fetch()
            return int(lane.host_total[0]) & MASK

    def _unpack_on_device(
        self, blocks: Sequence[int], box: KvBox, data: torch.Tensor, codec: str, group_size: int
    ) -> int:
        self._check_on_device(blocks, box, data, replace(self.layout, block_size=group_size), codec)
        if data.numel() == 0:
            return 0
        table, box = self._own_blocks(blocks, box, group_size)
        with self._incoming as lane:
            lane.reserve(0, len(table))
            lane.host_table[:] = table
            lane.send_table()
            unpack(self._pool, lane.table, box, data, lane.total, codec=codec, group_size=group_size)
            lane.fetch()
            return int(lane.host_total[0]) & MASK

    def _check_on_device(
        self, blocks: Sequence[int], box: KvBox, buffer: torch.Tensor, packed: KvLayout, codec: str
    ) -> None:
        check_box(self.layout, box, len(blocks))
        size = packed_bytes(packed, box, codec)
        if buffer.device != self._pool.device:
            raise ValueError(f"a buffer on {buffer.device} for a pool on {self._pool.device}")
        if buffer.numel() != size or buffer.dtype != torch.uint8:
            raise ValueError(f"a buffer of {buffer.numel()} {buffer.dtype} for a box of {size} bytes")

    def _bytes(
        self, blocks: Sequence[int], box: KvBox, buffer: Any, packed: KvLayout, codec: str
    ) -> np.ndarray[Any, np.dtype[np.uint8]]:
        check_box(self.layout, box, len(blocks))
        size = packed_bytes(packed, box, codec)
        flat = np.frombuffer(buffer, dtype=np.uint8) if size else np.empty(0, np.uint8)
        if flat.size != size:
            raise ValueError(f"a buffer of {flat.size} bytes for a box of {size} bytes")
        return flat

    def _own_blocks(self, blocks: Sequence[int], box: KvBox, group_size: int = 1) -> tuple[list[int], KvBox]:
        """Only the blocks that the box touches, and the box as seen from the first of them; where groups are larger
        than blocks, from the beginning of a group, whose earlier blocks are nobody's."""
        touched = blocks_of(self.layout, box)
        before = touched.start % max(1, group_size // self.layout.block_size)
        table = [int(block) for block in blocks[touched.start : touched.stop]]
        for block in table:
            if not 0 <= block < self.num_blocks:
                raise ValueError(f"block {block} is none of the pool's {self.num_blocks}")
        table = [0] * before + table
        start = box.token_start - (touched.start - before) * self.layout.block_size
        moved = KvBox(
            layer_start=box.layer_start,
            layer_end=box.layer_end,
            head_start=box.head_start,
            head_end=box.head_end,
            token_start=start,
            token_end=start + box.num_tokens,
        )
        return table, moved


class _Lane:
    """One direction: a stream, and staging on device and host: data, total (8 bytes, own 16), block table.

    Entered by one thread at a time, with the stream current.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._is_cuda = device.type == "cuda"
        self._lock = threading.Lock()
        # short kernels that somebody waits for, beside the long ones of a step
        self._stream = torch.cuda.Stream(device, priority=-1) if self._is_cuda else None
        self._done = torch.cuda.Event() if self._is_cuda else None
        self._current: AbstractContextManager[Any] = nullcontext()
        self._on_device = self._on_host = torch.empty(0, dtype=torch.uint8)

    def __enter__(self) -> Self:
        self._lock.acquire()
        if self._stream is not None:
            self._current = torch.cuda.stream(self._stream)  # makes its device current too
            self._current.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        try:
            if self._stream is not None:
                if error[0] is not None:
                    self._stream.synchronize()  # nothing of a failed call touches what the next one writes
                self._current.__exit__(None, None, None)
        finally:
            self._lock.release()

    def reserve(self, num_bytes: int, num_blocks: int) -> None:
        """Lay out data, total and table for this call."""
        total_at = -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
        table_at = total_at + _ALIGNMENT
        self._end = table_at + 4 * num_blocks
        if self._end > self._on_device.numel():
            size = max(_LEAST_STAGING, 1 << (self._end - 1).bit_length())
            # the engine makes it under inference mode, the event loop writes it without: a plain tensor serves both
            with torch.inference_mode(False):
                self._on_device = torch.empty(size, dtype=torch.uint8, device=self._device)
                self._on_host = torch.zeros(size, dtype=torch.uint8, pin_memory=self._is_cuda)
        self._fetched = total_at + 8
        self.data = self._on_device[:num_bytes]
        self.total = self._on_device[total_at : self._fetched].view(torch.int64)
        self.table = self._on_device[table_at : self._end].view(torch.int32)
        host = self._on_host.numpy()
        self.host_data = host[:num_bytes]
        self.host_total = host[total_at : self._fetched].view(np.int64)
        self.host_table = host[table_at : self._end].view(np.int32)

    def wait_for(self, event: Event | torch.cuda.Event | None) -> None:
        """Later work of this lane begins behind ``event``."""
        of_device: Any = getattr(event, "of_device", event)
        if of_device is not None and self._stream is not None:
            self._stream.wait_event(of_device)

    def send(self) -> None:
        """Host staging to the device, in one copy."""
        self._on_device[: self._end].copy_(self._on_host[: self._end], non_blocking=True)

    def send_table(self) -> None:
        """The block table alone."""
        start = self._end - self.table.nbytes
        self._on_device[start : self._end].copy_(self._on_host[start : self._end], non_blocking=True)

    def fetch(self) -> None:
        """Data and total to the host, in one copy; returns when they are there."""
        self._on_host[: self._fetched].copy_(self._on_device[: self._fetched], non_blocking=True)
        self.finish()

    def finish(self) -> None:
        """Returns when all work of this lane is over."""
        if self._done is not None:
            self._done.record()
            self._done.synchronize()
