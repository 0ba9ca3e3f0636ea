"""A KV pool in host memory, read and written by boxes. numpy, for codecs torch; the pool is a view of the engine's."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from biphase.kernels.kv_layout import KvBox, KvLayout
from biphase.kernels.kv_pack.codec import check_box, packed_bytes
from biphase.kernels.kv_pack.parts import parts_of


class CpuKvMemory:
    """Boxes of requests in a pool ``[layers, blocks, 2, kv_heads, block_size, dim]``, C-contiguous.

    ``pack`` and ``unpack`` may run in any thread (the copies release the GIL) as long as the blocks are held for
    them. They copy straight between pool and buffer: consecutive blocks move in one strided copy, whose innermost
    contiguous run is one head of one block.
    """

    content_digest: Literal["bytes"] = "bytes"

    def __init__(self, pool: np.ndarray[Any, Any], layout: KvLayout) -> None:
        if pool.ndim != 6 or pool.shape != layout.pool_shape(pool.shape[1]):
            raise ValueError(f"a pool of shape {pool.shape} does not fit {layout}")
        if not pool.flags.c_contiguous:
            raise ValueError("the pool is not C-contiguous")
        if pool.dtype.itemsize != layout.itemsize:
            raise ValueError(f"the pool's items have {pool.dtype.itemsize} bytes, the layout's {layout.itemsize}")
        self.layout = layout
        self.num_blocks = pool.shape[1]
        self._pool = pool

    def pack(self, blocks: Sequence[int], box: KvBox, out: Any, codec: str = "raw") -> None:
        """Write the packed box to ``out``, a writable buffer of ``packed_bytes``; raw: ``[layer][K,V][head][token][dim]``.

        ``blocks`` is the request's block table from token 0 on. Raises ValueError where box, blocks and size disagree.
        """
        if codec != "raw":
            self._encode(blocks, box, out, codec)
            return
        target = self._canonical(blocks, box, out)
        for theirs, ours in self._moves(blocks, box, target):
            theirs[...] = ours

    def unpack(
        self, blocks: Sequence[int], box: KvBox, data: Any, codec: str = "raw", group_size: int | None = None
    ) -> None:
        """The inverse of pack: write a packed box into the request's blocks. ``group_size``: the block size of the pool
        that was packed, where it is not ours."""
        if codec != "raw":
            source = self._decoded(blocks, box, data, codec, group_size or self.layout.block_size)
        else:
            source = self._canonical(blocks, box, data)
        for theirs, ours in self._moves(blocks, box, source):
            ours[...] = theirs

    def parts(self, blocks: Sequence[int], box: KvBox) -> list[memoryview]:
        """Where the box lies in the pool: see parts_of. The blocks are to be held while anyone has these."""
        return parts_of(self._pool, self.layout, blocks, box)

    def _canonical(self, blocks: Sequence[int], box: KvBox, buffer: Any) -> np.ndarray[Any, Any]:
        layout = self.layout
        check_box(layout, box, len(blocks))
        flat = np.frombuffer(buffer, dtype=self._pool.dtype) if box.num_bytes(layout) else np.empty(0, self._pool.dtype)
        if flat.nbytes != box.num_bytes(layout):
            raise ValueError(f"a buffer of {flat.nbytes} bytes for a box of {box.num_bytes(layout)} bytes")
        return flat.reshape(self._shape(box))

    def _encode(self, blocks: Sequence[int], box: KvBox, out: Any, codec: str) -> None:
        import torch  # not for those who move raw bytes only

        from biphase.kernels.kv_pack.quantize import encode

        target = self._packed(blocks, box, out, self.layout, codec)
        if target.size:
            values = np.empty(self._shape(box), self._pool.dtype)
            for theirs, ours in self._moves(blocks, box, values):
                theirs[...] = ours
            source = torch.from_numpy(values).view(getattr(torch, self.layout.dtype))
            encode(source.float(), self.layout, box, codec, torch.from_numpy(target))

    def _decoded(
        self, blocks: Sequence[int], box: KvBox, data: Any, codec: str, group_size: int
    ) -> np.ndarray[Any, Any]:
        import torch

        from biphase.kernels.kv_pack.quantize import decode

        packed = replace(self.layout, block_size=group_size)
        source = self._packed(blocks, box, data, packed, codec)
        if not source.size:
            return np.empty(self._shape(box), self._pool.dtype)
        if not source.flags.writeable:
            source = source.copy()  # torch has no read-only tensors
        values = decode(torch.from_numpy(source), packed, box, codec).to(getattr(torch, self.layout.dtype))
        found: np.ndarray[Any, Any] = values.contiguous().view(torch.uint8).numpy().view(self._pool.dtype)
        return found

    def _packed(
        self, blocks: Sequence[int], box: KvBox, buffer: Any, layout: KvLayout, codec: str
    ) -> np.ndarray[Any, Any]:
        """The bytes of a buffer that must be as long as the packed box."""
        check_box(self.layout, box, len(blocks))
        size = packed_bytes(layout, box, codec)
        flat = np.frombuffer(buffer, dtype=np.uint8) if size else np.empty(0, np.uint8)
        if flat.size != size:
            raise ValueError(f"a buffer of {flat.size} bytes for a box of {size} bytes in {codec}")
        return flat

    def _shape(self, box: KvBox) -> tuple[int, int, int, int, int]:
        return box.num_layers, 2, box.num_heads, box.num_tokens, self.layout.head_dim

    def _moves(
        self, blocks: Sequence[int], box: KvBox, canonical: np.ndarray[Any, Any]
    ) -> Iterator[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]:
        """Pairs of equally shaped views: a part of the canonical array, and where it lies in the pool."""
        size = self.layout.block_size
        pool = self._pool[box.layer_start : box.layer_end, :, :, box.head_start : box.head_end]
        token = box.token_start
        while token < box.token_end:
            index, offset = divmod(token, size)
            block = self._block(blocks[index])
            at = token - box.token_start
            whole = (box.token_end - token) // size if offset == 0 else 0
            if whole:
                count = 1
                while count < whole and blocks[index + count] == block + count:
                    count += 1
                if count == 1:
                    yield canonical[:, :, :, at : at + size], pool[:, block]
                    token += size
                    continue
                self._block(block + count - 1)
                run = canonical[:, :, :, at : at + count * size]
                layers, two, heads, _, dim = run.shape
                run = run.reshape(layers, two, heads, count, size, dim).transpose(0, 3, 1, 2, 4, 5)
                yield run, pool[:, block : block + count]
                token += count * size
            else:
                stop = min(size, offset + box.token_end - token)
                length = stop - offset
                yield canonical[:, :, :, at : at + length], pool[:, block, :, :, offset:stop]
                token += length

    def _block(self, block: int) -> int:
        if not 0 <= block < self.num_blocks:
            raise ValueError(f"block {block} is none of the pool's {self.num_blocks}")
        return block
