"""What a transfer needs to know of a KV pool: boxes of requests as canonical bytes. Pure."""

from collections.abc import Sequence
from typing import Any, Literal, Protocol

from biphase.kernels.kv_layout import KvBox, KvLayout


class KvMemory(Protocol):
    """A pool ``[layers, blocks, 2, kv_heads, block_size, dim]`` on some device, read and written by boxes.

    ``content_digest`` says what ``pack`` learns of the content on its way: nothing (``bytes``: whoever wants a digest
    reads the packed bytes), or the position-weighted sum of kv_pack.checksum (``sum64``).
    """

    @property
    def layout(self) -> KvLayout: ...

    @property
    def num_blocks(self) -> int: ...

    @property
    def content_digest(self) -> Literal["bytes", "sum64"]: ...

    def pack(self, blocks: Sequence[int], box: KvBox, out: Any, codec: str = "raw") -> int | None:
        """Write the packed box (kv_pack.codec) to ``out``, a writable buffer of that size; returns the sum where there is
        one.

        ``blocks`` is the request's block table from token 0 on. When it returns, ``out`` is complete and the blocks are
        no longer read. Raises ValueError where box, blocks, codec and size disagree.
        """

    def unpack(
        self, blocks: Sequence[int], box: KvBox, data: Any, codec: str = "raw", group_size: int | None = None
    ) -> int | None:
        """The inverse: write a packed box into the request's blocks. When it returns, ``data`` is no longer read and
        every later computation on the pool's device sees them. ``group_size``: the block size of the pool that was
        packed, where a codec quantised and that is not this pool's. Returns the sum of ``data`` where that lies on a
        device, None where the host can take it before."""
