"""The memory layout that kernels read and write and transfers move: per layer ``[block][K,V][kv head][token][dim]``.

One head of one block is one contiguous run of block_size x head_dim elements. Plain dataclasses, no torch.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class KvLayout:
    """Shape of a KV pool: ``[num_layers, num_blocks, 2, num_kv_heads, block_size, head_dim]`` of ``itemsize`` bytes."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: str = "float32"
    itemsize: int = 4

    def pool_shape(self, num_blocks: int) -> tuple[int, int, int, int, int, int]:
        return (self.num_layers, num_blocks, 2, self.num_kv_heads, self.block_size, self.head_dim)

    @property
    def token_bytes(self) -> int:
        """Bytes of K and V of one token over all layers and heads."""
        return self.num_layers * 2 * self.num_kv_heads * self.head_dim * self.itemsize

    @property
    def block_bytes(self) -> int:
        return self.token_bytes * self.block_size

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold ``num_tokens`` tokens."""
        return -(-num_tokens // self.block_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class KvBox:
    """A box of one request's KV in request coordinates: half-open layer, head and token ranges.

    Its bytes in canonical order are ``[layer][K,V][head][token][dim]``, whatever the block size at either end.
    """

    layer_start: int
    layer_end: int
    head_start: int
    head_end: int
    token_start: int
    token_end: int

    @property
    def num_layers(self) -> int:
        return self.layer_end - self.layer_start

    @property
    def num_heads(self) -> int:
        return self.head_end - self.head_start

    @property
    def num_tokens(self) -> int:
        return self.token_end - self.token_start

    def num_bytes(self, layout: KvLayout) -> int:
        return self.num_layers * 2 * self.num_heads * self.num_tokens * layout.head_dim * layout.itemsize
