"""Cases of the kernels that move memory: norms, the gate, rotation with the cache write, packing, the embedding."""

from collections.abc import Iterator

import torch
from gpu_timing import Ceilings, device_of, median_us
from kernel_case import Result, Sizes, check, rotated

from biphase.kernels.embed.triton_gpu import embed
from biphase.kernels.kv_layout import KvBox
from biphase.kernels.kv_pack.triton_gpu import pack, unpack
from biphase.kernels.rms_norm.triton_gpu import add_rms_norm, rms_norm
from biphase.kernels.rope_and_cache.triton_gpu import rope_and_cache, rotation_table
from biphase.kernels.silu_mul.triton_gpu import silu_mul

LONG = 8192
SMALL = (1, 8, 64)
SHARE, SMALL_US = 0.85, 4.0


def cases(sizes: Sizes, ceilings: Ceilings) -> Iterator[Result]:
    for tokens in (LONG, *SMALL):
        for name, us, num_bytes in (*_norms(sizes, tokens), _gate(sizes, tokens), _rope(sizes, tokens)):
            goal = SHARE if name != "embed" else None
            if tokens == LONG:
                yield Result.moved(f"{name} {tokens}", us, num_bytes, ceilings, goal)
            else:
                yield Result.timed(f"{name} {tokens}", us, SMALL_US)
    yield Result.moved("embed 8192", *_embed(sizes, LONG), ceilings)
    for name, us, num_bytes in _packing(sizes):
        yield Result.moved(name, us, num_bytes, ceilings, SHARE if " raw " in name else None)


def _norms(sizes: Sizes, tokens: int) -> Iterator[tuple[str, float, float]]:
    count = sizes.tokens(tokens)
    row = sizes.hidden * sizes.itemsize
    weight = sizes.randn(sizes.hidden)
    sets = [tuple(sizes.randn(count, sizes.hidden) for _ in range(3)) for _ in rotated(3 * count * row)]
    calls = [lambda x=x, out=out: rms_norm(x, weight, 1e-5, out) for x, _, out in sets]
    us = median_us(calls)
    check("rms_norm", sets[0][2])
    yield "rms_norm", us, 2 * count * row
    us = median_us([lambda s=s: add_rms_norm(s[0], s[1], weight, 1e-5, s[2]) for s in sets])
    yield "add_rms_norm", us, 4 * count * row


def _gate(sizes: Sizes, tokens: int) -> tuple[str, float, float]:
    count = sizes.tokens(tokens)
    num_bytes = 3 * count * sizes.intermediate * sizes.itemsize
    sets = [
        (sizes.randn(count, 2 * sizes.intermediate), sizes.empty(count, sizes.intermediate)) for _ in rotated(num_bytes)
    ]
    us = median_us([lambda x=x, out=out: silu_mul(x, out) for x, out in sets])
    check("silu_mul", sets[0][1])
    return "silu_mul", us, num_bytes


def _rope(sizes: Sizes, tokens: int) -> tuple[str, float, float]:
    count = sizes.tokens(tokens)
    dim, size = sizes.head_dim, sizes.block_size
    width = (sizes.heads + 2 * sizes.kv_heads) * dim
    num_bytes = 2 * count * width * sizes.itemsize  # q in and out, k and v in and out
    table = rotation_table([10000.0 ** (-2 * i / dim) for i in range(dim // 2)], max(count, 16), device_of())
    positions = torch.arange(count, dtype=torch.int32, device=device_of())
    num_blocks = -(-count // size)
    slots = torch.randperm(num_blocks * size, device=device_of())[:count]
    sets = [
        (sizes.randn(count, width), sizes.empty(num_blocks, 2, sizes.kv_heads, size, dim)) for _ in rotated(num_bytes)
    ]
    us = median_us(
        [
            lambda qkv=qkv, pool=pool: rope_and_cache(qkv, positions, slots, table, pool, num_heads=sizes.heads)
            for qkv, pool in sets
        ]
    )
    check("rope_and_cache", sets[0][0])
    return "rope_and_cache", us, num_bytes


def _embed(sizes: Sizes, tokens: int) -> tuple[float, float]:
    count = sizes.tokens(tokens)
    table, out = sizes.randn(sizes.vocab, sizes.hidden), sizes.empty(count, sizes.hidden)
    sources = torch.full((count,), -1, dtype=torch.int32, device=device_of())
    drawn = torch.zeros(1, dtype=torch.int64, device=device_of())
    ids = [torch.randint(sizes.vocab, (count,), device=device_of()) for _ in range(4)]
    us = median_us([lambda ids=ids: embed(ids, sources, drawn, table, out) for ids in ids])
    return us, 2 * count * sizes.hidden * sizes.itemsize


def _packing(sizes: Sizes) -> Iterator[tuple[str, float, float]]:
    """All layers of a prompt of 8k tokens, its blocks shuffled; quantised ones count the bytes that they write."""
    from biphase.kernels.kv_pack.codec import packed_bytes
    from biphase.kernels.kv_pack.torch_pool import layout_of

    count, layers = max(sizes.block_size, sizes.tokens(LONG)), 2 if sizes.smoke else 32
    num_blocks = -(-count // sizes.block_size)
    pool = sizes.randn(layers, num_blocks, 2, sizes.kv_heads, sizes.block_size, sizes.head_dim)
    table = torch.randperm(num_blocks, device=device_of()).to(torch.int32)
    box = KvBox(layer_start=0, layer_end=layers, head_start=0, head_end=sizes.kv_heads, token_start=0, token_end=count)
    total = torch.zeros(1, dtype=torch.int64, device=device_of())
    raw = box.num_bytes(layout_of(pool))
    for codec in ("raw", "fp8", "int8", "int4"):
        buffer = torch.zeros(packed_bytes(layout_of(pool), box, codec), dtype=torch.uint8, device=device_of())
        for name, op in (("kv_pack", pack), ("kv_unpack", unpack)):
            us = median_us([lambda op=op, buffer=buffer, codec=codec: op(pool, table, box, buffer, total, codec=codec)])
            yield f"{name} {codec} {LONG}", us, raw + buffer.numel()
