"""Where a box lies in a pool in host memory: its runs, in the order of its canonical bytes. numpy only."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from biphase.kernels.kv_layout import KvBox, KvLayout
from biphase.kernels.kv_pack.codec import check_box


def parts_of(pool: np.ndarray[Any, Any], layout: KvLayout, blocks: Sequence[int], box: KvBox) -> list[memoryview]:
    """Writable views of the pool's own memory that, one after the other, are the box's canonical bytes
    ``[layer][K,V][head][token][dim]``. Neighbouring runs are one: a whole block with all heads is one per layer.

    ``pool`` is C-contiguous. Raises ValueError where box, blocks and pool disagree.
    """
    check_box(layout, box, len(blocks))
    if not box.num_bytes(layout):
        return []
    num_blocks = pool.shape[1]
    token = layout.head_dim * layout.itemsize
    head = layout.block_size * token
    kind = layout.num_kv_heads * head
    block = 2 * kind
    first: list[tuple[int, int]] = []  # offset and size of the runs of one layer
    for of_kind in range(2):
        for of_head in range(box.head_start, box.head_end):
            at = box.token_start
            while at < box.token_end:
                index, offset = divmod(at, layout.block_size)
                if not 0 <= blocks[index] < num_blocks:
                    raise ValueError(f"block {blocks[index]} is none of the pool's {num_blocks}")
                count = min(layout.block_size - offset, box.token_end - at)
                start = blocks[index] * block + of_kind * kind + of_head * head + offset * token
                if first and sum(first[-1]) == start:
                    first[-1] = (first[-1][0], first[-1][1] + count * token)
                else:
                    first.append((start, count * token))
                at += count
    layer = num_blocks * block
    flat = memoryview(pool.reshape(-1).view(np.uint8))  # type: ignore[arg-type]
    return [
        flat[start + of_layer * layer : start + of_layer * layer + size]
        for of_layer in range(box.layer_start, box.layer_end)
        for start, size in first
    ]
