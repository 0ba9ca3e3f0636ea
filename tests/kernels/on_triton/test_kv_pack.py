"""Packing on Triton is packing in torch, bit for bit: codes, scales, sums, and nothing else written."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.paged_cache import poison

from biphase.kernels.gpu import table_check
from biphase.kernels.gpu.target import AOT_TARGETS, compiling_for
from biphase.kernels.kv_layout import KvBox
from biphase.kernels.kv_pack import torch_pool, triton_gpu
from biphase.kernels.kv_pack.checksum import MASK, sum64
from biphase.kernels.kv_pack.codec import CODECS, LEAST_AMAX, UNITS, packed_bytes

LAYERS, BLOCKS, HEADS = 3, 6, 3
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.float8_e4m3fn}


def box_of(layers: tuple[int, int], heads: tuple[int, int], tokens: tuple[int, int]) -> KvBox:
    return KvBox(
        layer_start=layers[0],
        layer_end=layers[1],
        head_start=heads[0],
        head_end=heads[1],
        token_start=tokens[0],
        token_end=tokens[1],
    )


@dataclass(frozen=True, kw_only=True)
class Case:
    """A request in four of the pool's blocks; the box of it that moves. ``scale``: the size of values."""

    dtype: str = "fp32"
    codec: str = "raw"
    head_dim: int = 16
    block_size: int = 16
    layers: tuple[int, int] = (0, LAYERS)
    heads: tuple[int, int] = (0, HEADS)
    tokens: tuple[int, int] = (0, 40)
    table: tuple[int, ...] = (4, 0, 5, 2)
    scale: float = 3.0

    @property
    def box(self) -> KvBox:
        return box_of(self.layers, self.heads, self.tokens)


def make_pool(case: Case, device: torch.device) -> torch.Tensor:
    """NaN, but in the box."""
    shape = (LAYERS, BLOCKS, 2, HEADS, case.block_size, case.head_dim)
    values = torch.randn(shape, generator=torch.Generator().manual_seed(sum(case.tokens) + case.head_dim)) * case.scale
    pool = poison(torch.empty(shape, dtype=DTYPES[case.dtype]))
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[pool.element_size()]
    filled = values.to(pool.dtype).view(bits)
    box = case.box
    for token in range(box.token_start, box.token_end):
        block, slot = case.table[token // case.block_size], token % case.block_size
        at = (slice(*case.layers), block, slice(None), slice(*case.heads), slot)
        pool.view(bits)[at] = filled[at]
    return pool.to(device)


def run(module: Any, direction: str, case: Case, pool: torch.Tensor, buffer: torch.Tensor) -> int:
    """The sum."""
    table = torch.tensor(case.table, dtype=torch.int32, device=pool.device)
    total = torch.full((1,), 12345, dtype=torch.int64, device=pool.device)
    getattr(module, direction)(pool, table, case.box, buffer, total, codec=case.codec)
    return int(total) & MASK


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    return torch.equal(left.view(torch.uint8), right.view(torch.uint8))


def check(case: Case, device: torch.device) -> None:
    if device.type == "cuda" and case.codec == "fp8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no e4m3 before capability 8.9")
    pool = make_pool(case, device)
    size = packed_bytes(torch_pool.layout_of(pool), case.box, case.codec)
    packed, expected = (torch.full((size,), 0xA5, dtype=torch.uint8, device=device) for _ in range(2))
    total = run(triton_gpu, "pack", case, pool, packed)
    assert total == run(torch_pool, "pack", case, pool, expected)
    assert torch.equal(packed, expected)
    assert total == sum64(packed.cpu().numpy())
    received, wanted = (poison(torch.empty_like(pool)) for _ in range(2))
    assert run(triton_gpu, "unpack", case, received, packed) == total
    assert run(torch_pool, "unpack", case, wanted, packed) == total
    assert same_bits(received, wanted)
    if case.codec == "raw":
        assert same_bits(received, pool)
    else:
        check_error(case, pool, received)
        check_other_blocks(case, packed, total)


def check_other_blocks(case: Case, packed: torch.Tensor, total: int) -> None:
    """A pool of other blocks reads what torch reads, and that is what one of the same blocks reads."""
    size = 16 if case.block_size > 16 else 32
    count = 4 * case.block_size // size
    table = torch.tensor([*range(count, 0, -1)], dtype=torch.int32, device=packed.device)
    shape = (LAYERS, count + 2, 2, HEADS, size, case.head_dim)
    received, wanted = (poison(torch.empty(shape, dtype=DTYPES[case.dtype], device=packed.device)) for _ in range(2))
    for module, pool in ((triton_gpu, received), (torch_pool, wanted)):
        found = torch.zeros(1, dtype=torch.int64, device=packed.device)
        module.unpack(pool, table, case.box, packed, found, codec=case.codec, group_size=case.block_size)
        assert int(found) & MASK == total
    assert same_bits(received, wanted)
    same = replace(case, table=(0, 1, 2, 3))
    pool = poison(torch.empty(LAYERS, 4, 2, HEADS, case.block_size, case.head_dim, dtype=DTYPES[case.dtype]))
    pool = pool.to(packed.device)
    run(torch_pool, "unpack", same, pool, packed)
    one = pool.transpose(2, 3).transpose(1, 2).transpose(2, 3)  # [layer, head, K/V, block, ...]
    other = received[:, table.long()].transpose(2, 3).transpose(1, 2).transpose(2, 3)
    assert torch.equal(*(tokens.flatten(3, 4).contiguous().nan_to_num(0.5) for tokens in (one, other)))


def check_error(case: Case, pool: torch.Tensor, received: torch.Tensor) -> None:
    """Each value within half a step of its group's codes, and the rounding of its dtype."""
    groups, sent = received.float().nan_to_num(), pool.float().nan_to_num()
    amax = sent.abs().amax(dim=(-2, -1), keepdim=True).clamp(min=LEAST_AMAX)
    limit = CODECS[case.codec].limit
    step = amax / limit if case.codec != "fp8" else (sent.abs() / 16).maximum(amax / limit * 2.0**-9)
    rounding = {"fp32": 2.0**-22, "bf16": 2.0**-8, "fp16": 2.0**-10}[case.dtype] * amax
    if case.codec == "int4":  # at most one unit more to a step than what remains of a dim asks for
        step = (step + amax / UNITS).expand_as(sent)
    assert bool(((groups - sent).abs() <= step * (0.501 if case.codec != "fp8" else 1.001) + rounding).all())


QUICK = {
    "raw fp32": Case(),
    "raw bf16, from inside a block to inside another, dim 96": Case(
        dtype="bf16", head_dim=96, tokens=(5, 39), layers=(1, 3), heads=(1, 2)
    ),
    "raw fp8": Case(dtype="fp8", head_dim=64, tokens=(15, 17), heads=(1, 3)),
    "raw, one token": Case(dtype="fp16", tokens=(31, 32)),
    "int8 bf16": Case(codec="int8", dtype="bf16", head_dim=32, tokens=(3, 35), layers=(1, 2)),
    "int4 fp32, dim 48, from inside a block": Case(codec="int4", head_dim=48, tokens=(3, 33), heads=(1, 3)),
    "fp8 bf16": Case(codec="fp8", dtype="bf16", tokens=(7, 20), layers=(2, 3)),
}


@pytest.mark.parametrize("name", QUICK)
def test_it_is_torchs(name: str, device: torch.device) -> None:
    check(QUICK[name], device)


LONG = [
    *(
        Case(dtype=dtype, head_dim=dim, block_size=size, tokens=tokens)
        for dtype, dim, size, tokens in (
            ("bf16", 128, 64, (1, 200)),
            ("fp8", 96, 32, (31, 97)),
            ("fp32", 256, 128, (100, 300)),
            ("fp16", 64, 16, (16, 48)),
            ("bf16", 256, 16, (0, 64)),
        )
    ),
    *(
        Case(codec=codec, dtype=dtype, head_dim=dim, block_size=size, tokens=tokens, scale=scale)
        for codec in CODECS
        for dtype, dim, size, tokens, scale in (
            ("fp32", 64, 32, (31, 97), 1.0),
            ("bf16", 96, 16, (15, 64), 1e-3),
            ("fp16", 128, 64, (1, 200), 1e3),
            ("bf16", 256, 128, (100, 300), 1.0),
            ("fp32", 48, 16, (0, 1), 1e-37),
            ("fp32", 16, 16, (0, 64), 0.0),
        )
    ),
]


@pytest.mark.long
@pytest.mark.parametrize("case", LONG, ids=lambda case: f"{case.codec}-{case.dtype}-{case.head_dim}-{case.block_size}")
def test_it_is_torchs_for_every_shape(case: Case, device: torch.device) -> None:
    check(case, device)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    def span(size: int) -> tuple[int, int]:
        start, end = sorted(draw(st.tuples(*[st.integers(0, size)] * 2)))
        return start, end

    codec = draw(st.sampled_from(["raw", *CODECS]))
    block_size = draw(st.sampled_from([16, 32]))
    return Case(
        dtype=draw(st.sampled_from(["fp32", "bf16", "fp16"] + ["fp8"] * (codec == "raw"))),
        codec=codec,
        head_dim=draw(st.sampled_from([16, 48, 80])),
        block_size=block_size,
        layers=span(LAYERS),
        heads=span(HEADS),
        tokens=span(4 * block_size),
        table=tuple(draw(st.permutations(range(BLOCKS)))[:4]),
        scale=draw(st.sampled_from([1e-30, 0.1, 100.0])),
    )


@given(case=cases())
@settings(max_examples=5, deadline=None, derandomize=True)
def test_any_box(case: Case, device: torch.device) -> None:
    check(case, device)


@pytest.mark.long
@given(case=cases())
@settings(max_examples=60, deadline=None)
def test_any_box_at_length(case: Case, device: torch.device) -> None:
    check(case, device)


def test_many_planes_to_a_program(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a long prompt has them: 18 planes, 4 to a program, the last program with fewer."""
    monkeypatch.setattr(triton_gpu, "_planes_per_program", lambda *_: 4)
    check(Case(dtype="bf16", tokens=(3, 30)), device)
    check(Case(dtype="bf16", codec="int8", tokens=(3, 20)), device)


def test_a_large_group_goes_in_two_halves(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest value of all may lie in the other half, which has fewer dims here; the scale is written once."""
    monkeypatch.setattr(triton_gpu, "_MOST_AT_ONCE", 256)
    for codec in ("int4", "int8"):
        check(Case(codec=codec, dtype="bf16", head_dim=48, tokens=(3, 33), heads=(1, 3)), device)


@pytest.mark.parametrize("codec", ["raw", *CODECS])
def test_ties_go_to_even_and_zeros_stay(codec: str, device: torch.device) -> None:
    case = Case(codec=codec, tokens=(0, 16), layers=(0, 1), heads=(0, 1))
    pool = torch.zeros(LAYERS, BLOCKS, 2, HEADS, 16, 16, device=device)
    limit = CODECS[codec].limit if codec in CODECS else 1.0
    halves = torch.arange(256, device=device).view(16, 16).float() / 2 - 64  # code = value: ties between two codes
    pool[0, case.table[0], 0, 0] = halves.clamp(-limit, limit)
    pool[0, case.table[0], 0, 0, 0, 0] = limit
    size = packed_bytes(torch_pool.layout_of(pool), case.box, codec)
    packed, expected = (torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2))
    assert run(triton_gpu, "pack", case, pool, packed) == run(torch_pool, "pack", case, pool, expected)
    assert torch.equal(packed, expected)
    received = poison(torch.empty_like(pool))
    run(triton_gpu, "unpack", case, received, packed)
    written = received[0, case.table[0], :, 0]
    if codec == "int8":
        assert torch.equal(written, pool[0, case.table[0], :, 0].round())
    assert not written[1].any()


def test_int4_has_a_coarse_value_and_a_step_for_each_dim(device: torch.device) -> None:
    """In units: the group's largest value is 1016. Ties of both roundings go to even."""
    case = Case(codec="int4", tokens=(0, 16), layers=(0, 1), heads=(0, 1))
    pool = torch.zeros(LAYERS, BLOCKS, 2, HEADS, 16, 16, device=device)
    values = pool[0, case.table[0], 0, 0]
    values[:, 0] = -1016.0
    values[:, 1] = torch.tensor([-13.0, 13.0, 1.0, 3.0, -5.0, -7.0, 12.0, 0.0] * 2, device=device)  # step 2
    values[:, 2] = 20.0  # 40 / 16: coarse 2, so 4 remain
    values[:, 3] = 12.0  # 24 / 16: coarse 2, so -4 remain
    values[:, 4] = torch.tensor([500.0, 507.0] * 8, device=device)  # coarse 63
    values[:, 5] = torch.tensor([-1016.0, 1016.0] * 8, device=device)  # step 146
    values[:, 6] = torch.tensor([-20.0, 12.0] * 8, device=device)  # -8 / 16: coarse 0, so -20 remain: step 3
    size = packed_bytes(torch_pool.layout_of(pool), case.box, "int4")
    packed = torch.zeros(size, dtype=torch.uint8, device=device)
    run(triton_gpu, "pack", case, pool, packed)
    coarse, step = packed[16 * 16 :][:32].view(2, 16).cpu()
    assert coarse.view(torch.int8)[:7].tolist() == [-127, 0, 2, 2, 63, 0, 0]
    assert step[:7].tolist() == [1, 2, 1, 1, 1, 146, 3]
    received = poison(torch.empty_like(pool))
    run(triton_gpu, "unpack", case, received, packed)
    written = received[0, case.table[0], 0, 0].cpu()
    assert written[:8, 1].tolist() == [-12.0, 12.0, 0.0, 4.0, -4.0, -8.0, 12.0, 0.0]
    assert torch.equal(written[:, [0, 2, 3, 4]], values[:, [0, 2, 3, 4]].cpu())
    assert written[:2, 5].tolist() == [-1016.0, 1016.0]  # 7 * 146 is more than the largest that was sent


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_what_is_finite_stays_finite(codec: str, dtype: str, device: torch.device) -> None:
    """Blocks whose largest value is the largest of their dtype, or a little less, and all about it."""
    case = Case(codec=codec, dtype=dtype, tokens=(0, 32), layers=(0, 1), heads=(0, 1))
    pool = torch.zeros(LAYERS, BLOCKS, 2, HEADS, 16, 16, dtype=DTYPES[dtype], device=device)
    largest = torch.finfo(pool.dtype).max
    shares = torch.rand(2, 2, 16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 0.2 + 0.8
    shares *= torch.where(torch.arange(16) % 2 == 0, 1.0, -1.0)
    shares[:, :, ::2, 3] *= -1.0  # both signs in one dim
    shares[:, :, 0, 0] = torch.tensor([[1.0, 1.0 - 2.0**-20], [1.0 - 2.0**-22, 1.0]])
    for nth in range(2):
        pool[0, case.table[nth], :, 0] = (shares[nth] * largest).to(pool.dtype).to(device)
    size = packed_bytes(torch_pool.layout_of(pool), case.box, codec)
    packed, expected = (torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2))
    assert run(triton_gpu, "pack", case, pool, packed) == run(torch_pool, "pack", case, pool, expected)
    assert torch.equal(packed, expected)
    received, wanted = (torch.zeros_like(pool) for _ in range(2))
    run(triton_gpu, "unpack", case, received, packed)
    run(torch_pool, "unpack", case, wanted, packed)
    assert same_bits(received, wanted)
    assert received.isfinite().all() and received[0, case.table[0], 0, 0, 0, 0] >= 0.99 * largest


@pytest.mark.parametrize("axis", ["blocks", "heads", "layers", "K and V", "tokens"])
def test_a_swap_changes_the_sum(axis: str, device: torch.device) -> None:
    case = Case(dtype="bf16", tokens=(0, 48))
    pool = make_pool(case, device)
    size = packed_bytes(torch_pool.layout_of(pool), case.box)
    buffer = torch.empty(size, dtype=torch.uint8, device=device)
    before = run(triton_gpu, "pack", case, pool, buffer)
    if axis == "blocks":
        swapped = replace(case, table=(0, 4, 5, 2))
    else:
        dim = {"layers": 0, "K and V": 2, "heads": 3, "tokens": 4}[axis]
        pool, swapped = pool.roll(1, dims=dim), case
    assert run(triton_gpu, "pack", swapped, pool, buffer) != before


@pytest.mark.parametrize(("codec", "layers"), [("raw", 1), ("int4", 1), ("int4", 3)])
def test_a_pool_past_2_to_the_31(codec: str, layers: int, device: torch.device) -> None:
    """By its block, or by its layer. Raw packing counts words of 4 bytes: 8 GiB reserved, two blocks ever touched."""
    size, dim = 128, 256
    per_block = 2 * size * dim
    least = 2**32 if codec == "raw" else 2**31
    blocks = least // max(1, layers - 1) // per_block + 2
    pool = torch.empty(layers, blocks, 2, 1, size, dim, dtype=torch.bfloat16, device=device)
    last = layers - 1
    used = [blocks - 1, 0]
    pool[last, used] = torch.randn(2, 2, 1, size, dim, generator=torch.Generator().manual_seed(1)).bfloat16().to(device)
    case = Case(dtype="bf16", codec=codec, layers=(last, layers), heads=(0, 1), tokens=(100, 140), table=tuple(used))
    count = packed_bytes(torch_pool.layout_of(pool), case.box, codec)
    packed, expected = (torch.empty(count, dtype=torch.uint8, device=device) for _ in range(2))
    assert run(triton_gpu, "pack", case, pool, packed) == run(torch_pool, "pack", case, pool, expected)
    assert torch.equal(packed, expected)
    before = pool[last, used].clone()
    pool[last, used] = 0
    run(triton_gpu, "unpack", case, pool, packed)
    after = pool[last, used]
    moved = torch.zeros(256, dtype=torch.bool, device=device)
    moved[100:140] = True
    difference = (
        (after - before).float().abs().transpose(1, 2).reshape(2, 1, 2, size, dim).amax(dim=(1, 2, 4)).flatten()
    )
    assert float(difference[moved].max()) <= (0 if codec == "raw" else 0.4)
    assert not after.transpose(1, 3).flatten(0, 1)[~moved].any()


def _good(device: torch.device) -> dict[str, Any]:
    return {
        "pool": torch.zeros(1, 4, 2, 2, 16, 16, device=device),
        "block_table": torch.tensor([1, 2], dtype=torch.int32, device=device),
        "box": box_of((0, 1), (0, 2), (0, 20)),
        "buffer": torch.zeros(2 * 2 * 20 * 16 * 4, dtype=torch.uint8, device=device),
        "total": torch.zeros(1, dtype=torch.int64, device=device),
        "codec": "raw",
        "debug": False,
    }


BAD = {
    "pool has dtype int32": lambda good: {"pool": good["pool"].int()},
    "pool with shape .* is not contiguous": lambda good: {"pool": good["pool"].repeat(1, 1, 1, 1, 1, 2)[..., :16]},
    r"pool has shape \[4, 2": lambda good: {"pool": good["pool"][0]},
    "pool starts 4 bytes past": lambda good: {
        "pool": torch.zeros(good["pool"].numel() + 1, device=good["pool"].device)[1:].view(good["pool"].shape)
    },
    "head_dim is 24": lambda good: {"pool": good["pool"].new_zeros(1, 4, 2, 2, 16, 24)},
    "block_size is 8": lambda good: {"pool": good["pool"].new_zeros(1, 4, 2, 2, 8, 16)},
    "block_table has dtype int64": lambda good: {"block_table": good["block_table"].long()},
    "block_table has shape": lambda good: {"block_table": good["block_table"][None]},
    "block_table with shape .* is not contiguous": lambda good: {
        "block_table": torch.zeros(4, dtype=torch.int32, device=good["pool"].device)[::2]
    },
    "lies outside 1 blocks": lambda good: {"block_table": good["block_table"][:1]},
    r"(out|data) has shape \[5116\]": lambda good: {"buffer": good["buffer"][:-4]},
    "(out|data) starts 4 bytes past a multiple of 16": lambda good: {
        "buffer": torch.cat([good["buffer"], good["buffer"]])[4 : 4 + good["buffer"].numel()]
    },
    "(out|data) has dtype float32": lambda good: {"buffer": good["buffer"].float()},
    "(out|data) with shape .* is not contiguous": lambda good: {"buffer": good["buffer"].repeat(2)[::2]},
    "total has shape": lambda good: {"total": good["total"].repeat(2)},
    "tensors on several devices": lambda good: {"total": good["total"].to("meta")},
    "total has dtype float32": lambda good: {"total": good["total"].float()},
    "codec is 'zip'": lambda _: {"codec": "zip"},
    "codec int8 packs pools of": lambda good: {
        "codec": "int8",
        "pool": torch.zeros(1, 4, 2, 2, 16, 16, device=good["pool"].device).to(torch.float8_e4m3fn),
    },
    "block_table names block 4, the pool has 4": lambda good: {
        "block_table": torch.tensor([1, 4], dtype=torch.int32, device=good["pool"].device),
        "debug": True,
    },
}


@pytest.mark.parametrize("message", BAD)
@pytest.mark.parametrize("direction", ["pack", "unpack"])
def test_bad_input_is_named(message: str, direction: str, device: torch.device) -> None:
    arguments = _good(device)
    arguments |= BAD[message](arguments)
    order = [arguments.pop(name) for name in ("pool", "block_table", "box", "buffer", "total")]
    with pytest.raises(ValueError, match=message) as caught:
        getattr(triton_gpu, direction)(*order, **arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("direction", ["pack", "unpack"])
def test_debug_mode_checks_the_block_table(
    direction: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table_check, "DEBUG", True)
    arguments = _good(device)
    arguments["block_table"] = torch.tensor([-1, 2], dtype=torch.int32, device=device)
    order = [arguments[name] for name in ("pool", "block_table", "box", "buffer", "total")]
    with pytest.raises(ValueError, match="^block_table names block -1, the pool has 4"):
        getattr(triton_gpu, direction)(*order)


def test_fp8_is_refused_on_sm_80() -> None:
    good = _good(torch.device("meta"))
    good["buffer"] = good["buffer"].new_empty(packed_bytes(torch_pool.layout_of(good["pool"]), good["box"], "fp8"))
    with compiling_for(AOT_TARGETS[80]), pytest.raises(ValueError, match="capability 8.9 or newer, A100 has 8.0"):
        triton_gpu.pack(good["pool"], good["block_table"], good["box"], good["buffer"], good["total"], codec="fp8")
