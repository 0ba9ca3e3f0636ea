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
    # asked for every piece of a transfer: slices of a view of the layer cost half of slices at sums of offsets
    runs = [slice(start, start + size) for start, size in _runs_of_a_layer(layout, blocks, box, num_blocks)]
    layer = num_blocks * 2 * layout.num_kv_heads * layout.block_size * layout.head_dim * layout.itemsize
    flat = memoryview(pool.reshape(-1).view(np.uint8))  # type: ignore[arg-type]
    layers = [flat[start : start + layer] for start in range(box.layer_start * layer, box.layer_end * layer, layer)]
    return [of_layer[run] for of_layer in layers for run in runs]


def _runs_of_a_layer(layout: KvLayout, blocks: Sequence[int], box: KvBox, num_blocks: int) -> list[tuple[int, int]]:
    """Offset in the layer and size of each, in bytes.

    Runs meet only where the tokens are one whole block: its heads lie one after the other, and K before V.
    """
    block_size, token_start, token_end = layout.block_size, box.token_start, box.token_end
    token = layout.head_dim * layout.itemsize
    head = block_size * token
    kind = layout.num_kv_heads * head
    of_head = []  # the runs of the first head's K
    for index in range(token_start // block_size, -(-token_end // block_size)):
        block = blocks[index]
        if not 0 <= block < num_blocks:
            raise ValueError(f"block {block} is none of the pool's {num_blocks}")
        first = max(token_start - index * block_size, 0)
        last = min(token_end - index * block_size, block_size)
        of_head.append((block * 2 * kind + box.head_start * head + first * token, (last - first) * token))
    heads = (box.head_end - box.head_start) * head
    if len(of_head) == 1 and of_head[0][1] == head:
        start = of_head[0][0]
        return [(start, 2 * kind)] if heads == kind else [(start, heads), (start + kind, heads)]
    return [
        (offset + start, size)
        for of_kind in (0, kind)
        for offset in range(of_kind, of_kind + heads, head)
        for start, size in of_head
    ]
