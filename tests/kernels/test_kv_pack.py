"""Pack and unpack agree with the reference for any box and any order of blocks."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from biphase.kernels.kv_layout import KvBox, KvLayout
from biphase.kernels.kv_pack import CpuKvMemory, pack_reference, unpack_reference
from biphase.kernels.kv_pack.codec import CODECS, packed_bytes
from biphase.kernels.kv_pack.reference import e4m3_codes, e4m3_values, encode_reference

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


# Codecs.


def random_pool(layout: KvLayout, spread: float = 1.0) -> np.ndarray[Any, Any]:
    """As keys are: every dim has an offset of its own, larger than what tokens add."""
    rng = np.random.default_rng(5)
    offsets = rng.standard_normal((1, 1, 2, layout.num_kv_heads, 1, layout.head_dim)) * 4
    pool = offsets + rng.standard_normal(layout.pool_shape(NUM_BLOCKS)) * spread
    return pool.astype(np.float32)


def canonical(pool: np.ndarray[Any, Any], layout: KvLayout, blocks: list[int], box: KvBox) -> np.ndarray[Any, Any]:
    flat = np.frombuffer(pack_reference(pool, layout, blocks, box), dtype=np.float32)
    return flat.reshape(box.num_layers, 2, box.num_heads, box.num_tokens, layout.head_dim)


def packed(pool: np.ndarray[Any, Any], layout: KvLayout, blocks: list[int], box: KvBox, codec: str) -> bytes:
    out = bytearray(b"\xa5") * packed_bytes(layout, box, codec)
    CpuKvMemory(pool, layout).pack(blocks, box, out, codec)
    return bytes(out)


@pytest.mark.parametrize("codec", CODECS)
@given(case=cases())
@settings(max_examples=60, deadline=None)
def test_codecs_have_the_references_bits(codec: str, case: tuple[KvLayout, list[int], KvBox]) -> None:
    layout, blocks, box = case
    pool = random_pool(layout)
    assert packed(pool, layout, blocks, box, codec) == (
        encode_reference(canonical(pool, layout, blocks, box), layout, box, codec) if box.num_bytes(layout) else b""
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("codec", CODECS)
def test_what_was_packed_comes_back_nearly_and_nothing_else_is_written(codec: str, dtype: str) -> None:
    layout = KvLayout(num_layers=2, num_kv_heads=2, head_dim=16, block_size=16, dtype=dtype)
    box = KvBox(layer_start=0, layer_end=2, head_start=1, head_end=2, token_start=5, token_end=41)
    kind = getattr(torch, dtype)
    sent = torch.from_numpy(random_pool(layout)).to(kind)
    received = torch.zeros_like(sent)
    views = [tensor.view(torch.uint8).numpy().view(f"u{layout.itemsize}") for tensor in (sent, received)]
    out = bytearray(packed_bytes(layout, box, codec))
    CpuKvMemory(views[0], layout).pack([3, 1, 6], box, out, codec)
    CpuKvMemory(views[1], layout).unpack([2, 4, 0], box, bytes(out), codec)
    outside = received.clone()
    for token in range(5, 41):
        theirs = sent[:, [3, 1, 6][token // 16], :, 1, token % 16].float()
        ours = received[:, [2, 4, 0][token // 16], :, 1, token % 16].float()
        step = {"fp8": theirs.abs().max() / 8, "int8": 16 / 127, "int4": 1.0}[codec]
        assert float((theirs - ours).abs().max()) <= step / 2 + 0.07
        outside[:, [2, 4, 0][token // 16], :, 1, token % 16] = 0
    assert not outside.any()


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("group_size", [4, 16, 64])
def test_pools_of_other_block_sizes_read_the_same_values(codec: str, group_size: int) -> None:
    layout = KvLayout(num_layers=1, num_kv_heads=2, head_dim=16, block_size=group_size)
    box = KvBox(layer_start=0, layer_end=1, head_start=0, head_end=2, token_start=3, token_end=27)
    order = [6, 1, 0, 5, 2, 4, 3]
    data = packed(random_pool(layout), layout, order, box, codec)
    contents = []
    for size in (4, 16, 64):
        target = replace(layout, block_size=size)
        pool = np.zeros(target.pool_shape(NUM_BLOCKS), np.float32)
        CpuKvMemory(pool, target).unpack(order, box, data, codec, group_size=group_size)
        contents.append(canonical(pool, target, order, box))
    assert np.array_equal(contents[0], contents[1]) and np.array_equal(contents[0], contents[2])
    assert contents[0].any()


def test_the_residual_of_int4_lowers_the_error() -> None:
    """Against four bits of the whole value with the group's one scale, at least by half where dims have offsets; and not
    above it where they have none."""
    layout = KvLayout(num_layers=2, num_kv_heads=3, head_dim=64, block_size=32)
    box = layout.box(100)
    for spread, at_most in ((1.0, 0.5), (100.0, 1.01)):
        pool = random_pool(layout, spread)
        values = canonical(pool, layout, [4, 0, 5, 2], box)
        received = np.zeros_like(pool)
        data = packed(pool, layout, [4, 0, 5, 2], box, "int4")
        CpuKvMemory(received, layout).unpack([4, 0, 5, 2], box, data, "int4")
        error = canonical(received, layout, [4, 0, 5, 2], box) - values
        plain = np.empty_like(values)
        for start in range(0, 100, 32):
            group = values[..., start : start + 32, :]
            scale = np.abs(group).max(axis=(-2, -1), keepdims=True) / 7
            plain[..., start : start + 32, :] = np.rint(group / scale) * scale - group
        assert np.sqrt((error**2).mean()) <= at_most * np.sqrt((plain**2).mean())


@pytest.mark.parametrize("codec", CODECS)
def test_zeros_and_tiny_values_pack(codec: str) -> None:
    layout = KvLayout(num_layers=1, num_kv_heads=1, head_dim=4, block_size=4)
    for scale in (0.0, 1e-37, 1e-42):
        pool = random_pool(layout) * np.float32(scale)
        data = packed(pool, layout, [1], layout.box(4), codec)
        assert data == encode_reference(canonical(pool, layout, [1], layout.box(4)), layout, layout.box(4), codec)
        received = np.full_like(pool, np.nan)
        CpuKvMemory(received, layout).unpack([1], layout.box(4), data, codec)
        assert float(np.abs(received[0, 1]).max()) <= 2.0**-100


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("codec", CODECS)
def test_the_largest_values_stay_finite(codec: str, dtype: str) -> None:
    """A scale that was rounded upwards, and a code that was, must not carry them out of their dtype."""
    layout = KvLayout(num_layers=1, num_kv_heads=1, head_dim=4, block_size=4, dtype=dtype)
    kind = getattr(torch, dtype)
    units = torch.tensor(  # dim 1: rest of +-40 above 960, so a step of 6 and a largest of 1018
        [[1016, 1016, -1016, 0], [936, 900, 1016, 0], [950, 930, -1016, 0], [1000, 1000, 1016, 0]], dtype=torch.float64
    )
    for below in range(100):  # scales of every rounding
        largest = torch.finfo(kind).max * (1 - below * torch.finfo(kind).eps)
        sent = torch.zeros(layout.pool_shape(2), dtype=kind)
        sent[0, 0, :, 0] = (units * (largest / 1016)).to(kind)
        assert sent.isfinite().all()
        received = torch.zeros_like(sent)
        views = [tensor.view(torch.uint8).numpy().view(f"u{layout.itemsize}") for tensor in (sent, received)]
        data = bytearray(packed_bytes(layout, layout.box(4), codec))
        CpuKvMemory(views[0], layout).pack([0], layout.box(4), data, codec)
        values = sent[0, :1].float().numpy().reshape(1, 2, 1, 4, 4)
        assert data == encode_reference(values, layout, layout.box(4), codec)
        CpuKvMemory(views[1], layout).unpack([0], layout.box(4), data, codec)
        assert received.isfinite().all()
        assert float(received.double().abs().max() / sent.double().abs().max()) <= 1 + 2 * torch.finfo(kind).eps


@pytest.mark.parametrize("codec", CODECS)
def test_a_block_that_is_not_finite_does_not_become_so(codec: str) -> None:
    layout = KvLayout(num_layers=1, num_kv_heads=1, head_dim=4, block_size=4)
    for bad in (np.inf, -np.inf, np.nan):
        pool = random_pool(layout)
        pool[0, 1, 0, 0, 1, 1] = bad
        received = np.zeros_like(pool)
        CpuKvMemory(received, layout).unpack([1], layout.box(4), packed(pool, layout, [1], layout.box(4), codec), codec)
        assert not np.isfinite(received[0, 1, 0]).any() and np.isfinite(received[0, 1, 1]).all()


def test_the_references_e4m3_is_torchs() -> None:
    codes = torch.arange(127, dtype=torch.uint8)
    assert np.array_equal(codes.view(torch.float8_e4m3fn).float().numpy(), e4m3_values())
    values = np.concatenate([np.linspace(-448, 448, 20001), np.arange(-40, 41) * 2.0**-10]).astype(np.float32)
    assert np.array_equal(
        torch.from_numpy(values).to(torch.float8_e4m3fn).view(torch.uint8).numpy(), e4m3_codes(values)
    )


@pytest.mark.parametrize(
    ("codec", "size", "message"),
    [
        ("zip", 0, "codec is 'zip', supported: raw, fp8"),
        ("int8", -1, "a buffer of 79 bytes for a box of 80 bytes in int8"),
    ],
)
def test_codecs_refuse_what_does_not_fit(codec: str, size: int, message: str) -> None:
    layout = KvLayout(num_layers=1, num_kv_heads=1, head_dim=4, block_size=4)
    memory = CpuKvMemory(make_pool(layout, "count"), layout)
    box = replace(layout.box(8), head_end=1)
    for call in (memory.pack, memory.unpack):
        with pytest.raises(ValueError, match=message):
            call([0, 1], box, bytearray(80 + size), codec)
    fp8 = replace(layout, dtype="float8_e4m3fn", itemsize=0, kv_scales=(((1.0,),) * 2,))
    with pytest.raises(
        ValueError, match="codec int8 packs pools of float32, bfloat16, float16, this one is float8_e4m3fn"
    ):
        CpuKvMemory(np.zeros(fp8.pool_shape(2), np.uint8), fp8).pack([0], fp8.box(1), bytearray(1), "int8")
