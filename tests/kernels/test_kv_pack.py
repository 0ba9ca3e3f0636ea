"""Pack and unpack agree with the reference for any box and any order of blocks."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from biphase.kernels.kv_layout import KvBox, KvLayout
from biphase.kernels.kv_pack import CpuKvMemory, pack_reference, unpack_reference

NUM_BLOCKS = 7


def make_pool(layout: KvLayout, fill: str) -> np.ndarray[Any, Any]:
    """A pool whose every element is different (``count``), or NaN."""
    shape = layout.pool_shape(NUM_BLOCKS)
    if fill == "count":
        return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    return np.full(shape, np.nan, dtype=np.float32)


@st.composite
def cases(draw: st.DrawFn) -> tuple[KvLayout, list[int], KvBox]:
    layout = KvLayout(
        num_layers=draw(st.integers(1, 3)),
        num_kv_heads=draw(st.integers(1, 3)),
        head_dim=draw(st.sampled_from([1, 4, 5])),
        block_size=draw(st.sampled_from([1, 4, 16])),
    )
    blocks = draw(st.permutations(range(NUM_BLOCKS)))[: draw(st.integers(1, NUM_BLOCKS))]
    if draw(st.booleans()):
        blocks = sorted(blocks)
    layers = sorted(draw(st.tuples(*[st.integers(0, layout.num_layers)] * 2)))
    heads = sorted(draw(st.tuples(*[st.integers(0, layout.num_kv_heads)] * 2)))
    tokens = sorted(draw(st.tuples(*[st.integers(0, len(blocks) * layout.block_size)] * 2)))
    box = KvBox(
        layer_start=layers[0],
        layer_end=layers[1],
        head_start=heads[0],
        head_end=heads[1],
        token_start=tokens[0],
        token_end=tokens[1],
    )
    return layout, blocks, box


@given(cases())
@settings(max_examples=300, deadline=None)
def test_pack_is_the_reference(case: tuple[KvLayout, list[int], KvBox]) -> None:
    layout, blocks, box = case
    pool = make_pool(layout, "count")
    out = bytearray(box.num_bytes(layout))
    CpuKvMemory(pool, layout).pack(blocks, box, out)
    assert bytes(out) == pack_reference(pool, layout, blocks, box)


@given(cases())
@settings(max_examples=300, deadline=None)
def test_unpack_writes_the_box_and_nothing_else(case: tuple[KvLayout, list[int], KvBox]) -> None:
    layout, blocks, box = case
    data = np.arange(box.num_bytes(layout) // 4, dtype=np.float32).tobytes()
    ours, expected = make_pool(layout, "nan"), make_pool(layout, "nan")
    CpuKvMemory(ours, layout).unpack(blocks, box, data)
    unpack_reference(expected, layout, blocks, box, data)
    assert ours.tobytes() == expected.tobytes()


def test_unpack_from_the_middle_of_received_bytes() -> None:
    layout = KvLayout(num_layers=1, num_kv_heads=1, head_dim=4, block_size=4)
    box = KvBox(layer_start=0, layer_end=1, head_start=0, head_end=1, token_start=0, token_end=4)
    data = b"head!" + np.arange(32, dtype=np.float32).tobytes()
    pool = make_pool(layout, "nan")
    CpuKvMemory(pool, layout).unpack([3], box, memoryview(data)[5:])
    assert pool[0, 3].ravel().tolist() == list(range(32))


@pytest.mark.parametrize(
    ("blocks", "token_end", "size", "message"),
    [
        ([0], 5, 5, "outside 1 blocks"),
        ([0], 4, 3, "a buffer of 96 bytes for a box of 128"),
        ([7], 4, 4, "block 7 is none of the pool's 7"),
        ([-1], 4, 4, "block -1 is none of the pool's 7"),
        ([6, 7], 8, 8, "block 7 is none of the pool's 7"),
    ],
)
def test_what_does_not_fit_is_refused(blocks: list[int], token_end: int, size: int, message: str) -> None:
    layout = KvLayout(num_layers=1, num_kv_heads=1, head_dim=4, block_size=4)
    box = KvBox(layer_start=0, layer_end=1, head_start=0, head_end=1, token_start=0, token_end=token_end)
    memory = CpuKvMemory(make_pool(layout, "count"), layout)
    with pytest.raises(ValueError, match=message):
        memory.pack(blocks, box, bytearray(size * 2 * 4 * 4))


def test_a_pool_that_is_not_the_layouts_is_refused() -> None:
    layout = KvLayout(num_layers=2, num_kv_heads=1, head_dim=4, block_size=4)
    pool = make_pool(layout, "count")
    for wrong in (pool[:1], pool.astype(np.float16), pool.transpose(0, 1, 2, 3, 4, 5)[:, ::2]):
        with pytest.raises(ValueError):
            CpuKvMemory(wrong, layout)
