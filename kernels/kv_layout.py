"""The memory layout that kernels read and write and transfers move: per layer ``[block][K,V][kv head][token][dim]``.

One head of one block is one contiguous run of block_size x head_dim elements. Plain dataclasses, no torch.
"""

import math
from dataclasses import dataclass

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1}
"""What a pool may hold, by torch's names."""

KvScales = tuple[tuple[tuple[float, ...], ...], ...]
"""``[layer][K,V][kv head]``: value = code * scale."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KvLayout:
    """Shape of a KV pool: ``[num_layers, num_blocks, 2, num_kv_heads, block_size, head_dim]`` of ``itemsize`` bytes.

    ``itemsize`` follows from ``dtype``. An fp8 pool has one fixed scale per layer, K or V and head: an append cannot
    rescale a block that is half full. Raises ValueError where these do not fit each other.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: str = "float32"
    itemsize: int = 0
    kv_scales: KvScales | None = None

    def __post_init__(self) -> None:
        if self.dtype not in ITEM_BYTES:
            raise ValueError(f"KV dtype {self.dtype!r} is none of {', '.join(ITEM_BYTES)}")
        if self.itemsize not in (0, ITEM_BYTES[self.dtype]):
            raise ValueError(f"itemsize is {self.itemsize}, {self.dtype} has {ITEM_BYTES[self.dtype]}")
        object.__setattr__(self, "itemsize", ITEM_BYTES[self.dtype])
        self._check_scales()

    def _check_scales(self) -> None:
        scales = self.kv_scales
        if (scales is not None) != (self.dtype == "float8_e4m3fn"):
            raise ValueError(f"kv_scales {'given for' if scales else 'missing for'} a pool of {self.dtype}")
        if scales is None:
            return
        shape = (self.num_layers, 2, self.num_kv_heads)
        if len(scales) != shape[0] or any(
            len(layer) != 2 or any(len(heads) != shape[2] for heads in layer) for layer in scales
        ):
            raise ValueError(f"kv_scales are not of shape {list(shape)}: layers, K and V, heads")
        for layer in scales:
            for heads in layer:
                for scale in heads:
                    if not (scale > 0 and math.isfinite(scale)):
                        raise ValueError(f"a KV scale is {scale}, it must be finite and above 0")

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

    def box(self, num_tokens: int) -> "KvBox":
        """All layers and heads of a request's first ``num_tokens`` tokens."""
        return KvBox(
            layer_start=0,
            layer_end=self.num_layers,
            head_start=0,
            head_end=self.num_kv_heads,
            token_start=0,
            token_end=num_tokens,
        )


def uniform_scales(num_layers: int, num_kv_heads: int, scale: float = 1.0) -> KvScales:
    """The same scale everywhere: what a model without calibrated ones gets."""
    return (((scale,) * num_kv_heads,) * 2,) * num_layers


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
        # not by the properties above: this is asked several times for every piece of a handoff
        elements = (self.layer_end - self.layer_start) * (self.head_end - self.head_start)
        elements *= (self.token_end - self.token_start) * layout.head_dim
        return 2 * elements * layout.itemsize
