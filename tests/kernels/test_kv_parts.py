"""The runs of a box in a pool are its canonical bytes, in order, and few where blocks are whole."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from biphase.kernels.kv_layout import KvBox, KvLayout
from biphase.kernels.kv_pack import CpuKvMemory
from biphase.kernels.kv_pack.parts import parts_of

LAYOUT = KvLayout(num_layers=3, num_kv_heads=2, head_dim=4, block_size=4)
BLOCKS = [4, 5, 0, 3]


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_parts_are_the_canonical_bytes(data: st.DataObject) -> None:
    pool = np.random.default_rng(1).standard_normal(LAYOUT.pool_shape(6), dtype=np.float32)
    starts = [data.draw(st.integers(0, top - 1)) for top in (3, 2, 16)]
    ends = [data.draw(st.integers(start + 1, top)) for start, top in zip(starts, (3, 2, 16), strict=True)]
    box = KvBox(
        layer_start=starts[0],
        layer_end=ends[0],
        head_start=starts[1],
        head_end=ends[1],
        token_start=starts[2],
        token_end=ends[2],
    )
    packed = bytearray(box.num_bytes(LAYOUT))
    CpuKvMemory(pool, LAYOUT).pack(BLOCKS, box, packed)
    parts = parts_of(pool, LAYOUT, BLOCKS, box)
    assert b"".join(parts) == packed
    for part in parts:
        part[:] = bytes(len(part))
    CpuKvMemory(pool, LAYOUT).pack(BLOCKS, box, packed)
    assert not any(packed)
    assert np.count_nonzero(pool) == pool.size - len(packed) // 4


def test_a_whole_block_is_one_part_per_layer_and_a_foreign_block_is_refused() -> None:
    pool = np.zeros(LAYOUT.pool_shape(6), dtype=np.float32)
    head = 4 * 4 * 4
    whole = LAYOUT.box(4)
    assert [len(part) for part in parts_of(pool, LAYOUT, BLOCKS, whole)] == [2 * 2 * head] * 3
    assert [len(part) for part in parts_of(pool, LAYOUT, BLOCKS, replace(whole, head_end=1))] == [head] * 2 * 3
    assert [len(part) for part in parts_of(pool, LAYOUT, BLOCKS, LAYOUT.box(8))] == [head] * 2 * 2 * 2 * 3
    with pytest.raises(ValueError, match="block 6 is none of the pool's 6"):
        parts_of(pool, LAYOUT, [6], LAYOUT.box(4))
