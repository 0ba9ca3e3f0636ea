"""What pack and unpack mean, one token of one head at a time."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from biphase.kernels.kv_layout import KvBox, KvLayout


def pack_reference(pool: np.ndarray[Any, Any], layout: KvLayout, blocks: Sequence[int], box: KvBox) -> bytes:
    """The canonical bytes ``[layer][K,V][head][token][dim]`` of a box; pool ``[layers, blocks, 2, heads, size, dim]``."""
    rows = []
    for layer in range(box.layer_start, box.layer_end):
        for k_or_v in (0, 1):
            for head in range(box.head_start, box.head_end):
                for token in range(box.token_start, box.token_end):
                    block, slot = blocks[token // layout.block_size], token % layout.block_size
                    rows.append(pool[layer, block, k_or_v, head, slot].tobytes())
    return b"".join(rows)


def unpack_reference(
    pool: np.ndarray[Any, Any], layout: KvLayout, blocks: Sequence[int], box: KvBox, data: bytes
) -> None:
    """Write canonical bytes back, row by row."""
    row_bytes = layout.head_dim * layout.itemsize
    at = 0
    for layer in range(box.layer_start, box.layer_end):
        for k_or_v in (0, 1):
            for head in range(box.head_start, box.head_end):
                for token in range(box.token_start, box.token_end):
                    block, slot = blocks[token // layout.block_size], token % layout.block_size
                    row = np.frombuffer(data[at : at + row_bytes], dtype=pool.dtype)
                    pool[layer, block, k_or_v, head, slot] = row
                    at += row_bytes
