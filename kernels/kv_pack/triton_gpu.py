"""Packing a box of one request's KV into one contiguous buffer, and back, in one launch for all layers.

Pool ``[layers, blocks, 2, K, block_size, D]``; buffer and codecs as in kv_pack.codec. Both directions sum what the
buffer holds (kv_pack.checksum) on the way. A copy at heart: each element is read and written once, 16 bytes at a time,
and the arithmetic of the sum hides behind the memory.
"""

from dataclasses import replace

import torch

from biphase.kernels.gpu import table_check
from biphase.kernels.gpu.check import (
    check_contiguous,
    check_dtype,
    check_one_of,
    check_rows,
    check_same_device,
    check_shape,
)
from biphase.kernels.gpu.launch import launch
from biphase.kernels.gpu.target import Target, target_of
from biphase.kernels.gpu.tuning import Settings, tuned
from biphase.kernels.kv_layout import KvBox, KvLayout
from biphase.kernels.kv_pack.checksum import MAX_WORDS
from biphase.kernels.kv_pack.codec import CODECS, blocks_of, check_box, packed_bytes
from biphase.kernels.kv_pack.torch_pool import layout_of
from biphase.kernels.kv_pack.triton_kernel import move_kernel, quantized_kernel

OP = "kv_pack"
_BLOCK_SIZES = (16, 32, 64, 128)
_MOST_DIM = 256
_PROGRAMS_PER_SM = 32
_MOST_PLANES = 16
_MOST_AT_ONCE = 16384


def pack(
    pool: torch.Tensor,
    block_table: torch.Tensor,
    box: KvBox,
    out: torch.Tensor,
    total: torch.Tensor,
    *,
    codec: str = "raw",
    debug: bool = False,
) -> None:
    """Write the box to ``out`` (uint8, of ``packed_bytes``), and its sum to ``total`` (int64 ``[1]``, the bits of mod 2^64).

    ``block_table`` (int32 ``[W]``) is the request's, from token 0 on. ``debug`` reads it back and checks it, as
    debug mode does (kernels.gpu.table_check). Raises ValueError naming the argument; the fp8 codec needs capability 8.9,
    raw packing of an fp8 pool does not.
    """
    _launch(pool, block_table, box, out, total, codec, debug, is_pack=True)


def unpack(
    pool: torch.Tensor,
    block_table: torch.Tensor,
    box: KvBox,
    data: torch.Tensor,
    total: torch.Tensor,
    *,
    codec: str = "raw",
    group_size: int = 0,
    debug: bool = False,
) -> None:
    """The inverse: write packed ``data`` into the request's blocks; ``total`` becomes the sum of what was read.

    ``group_size``: the block size of the pool that was packed, where a codec is not raw and that is not this pool's.
    """
    _launch(pool, block_table, box, data, total, codec, debug, is_pack=False, group_size=group_size)


def default_settings(target: Target, key: str) -> Settings:
    if key == "raw":
        return {"TILE": 2048, "num_warps": 4}
    elements = int(key.removeprefix("quantized"))
    return {"num_warps": min(32, max(4, elements // 1024))}


def candidates(target: Target, key: str) -> list[Settings]:
    if key == "raw":
        return [{"TILE": tile, "num_warps": warps} for tile in (1024, 2048, 4096, 8192) for warps in (4, 8, 16, 32)]
    return [{"num_warps": warps} for warps in (4, 8, 16, 32)]


def key_of(codec: str, block_size: int, head_dim: int) -> str:
    """Shape class of a launch: raw copies are alike, quantised ones differ by the size of a group."""
    return "raw" if codec == "raw" else f"quantized{block_size * _power_of_two(head_dim)}"


def _launch(
    pool: torch.Tensor,
    block_table: torch.Tensor,
    box: KvBox,
    buffer: torch.Tensor,
    total: torch.Tensor,
    codec: str,
    debug: bool,
    *,
    is_pack: bool,
    group_size: int = 0,
) -> None:
    layout, name = layout_of(pool), "out" if is_pack else "data"
    packed = replace(layout, block_size=group_size or layout.block_size)
    num_bytes = _check(layout, packed, pool, block_table, box, buffer, total, codec, debug, name)
    target = target_of(pool.device)
    if codec == "fp8":
        target.require_fp8("codec fp8")
    total.zero_()
    if num_bytes == 0:
        return
    dim, parts = _power_of_two(layout.head_dim), 1
    if is_pack and codec != "raw" and CODECS[codec].residual and packed.block_size * dim > _MOST_AT_ONCE:
        parts = 2  # it keeps two values of each dim beside the group's own
    key = key_of(codec, packed.block_size, dim // parts)
    settings = dict(tuned(OP, target, key) or default_settings(target, key))
    words = buffer.view(torch.int32)
    planes = box.num_layers * 2 * box.num_heads
    sizes = {"PACK": is_pack, "POOL_HEADS": layout.num_kv_heads, "BLOCK_SIZE": layout.block_size}
    where = (box.token_start, box.num_tokens, box.layer_start, box.head_start, box.num_heads, planes)
    if codec == "raw":
        row_words = layout.head_dim * layout.itemsize // 4
        tiles = -(-box.num_tokens * row_words // settings["TILE"])
        each = _planes_per_program(target, tiles, planes)
        launch(
            move_kernel,
            (tiles, -(-planes // each)),
            pool.view(torch.int32),
            block_table,
            words,
            total,
            *where,
            each,
            pool.shape[1],
            **sizes,
            WORDS=row_words,
            CHUNK=row_words & -row_words,
            **settings,
        )
        return
    spanned = len(blocks_of(packed, box))
    each = _planes_per_program(target, spanned, planes)
    launch(
        quantized_kernel,
        (spanned, -(-planes // each), parts),
        pool,
        block_table,
        words,
        total,
        *where,
        each,
        pool.shape[1],
        spanned,
        **sizes,
        GROUP=packed.block_size,
        FP8=codec == "fp8",
        RESIDUAL=CODECS[codec].residual,
        BITS=CODECS[codec].bits,
        LIMIT=CODECS[codec].limit,
        MOST_SCALE=CODECS[codec].most_scale,
        HEAD_DIM=layout.head_dim,
        DIM=dim // parts,
        PARTS=parts,
        **settings,
    )


def _check(
    layout: KvLayout,
    packed: KvLayout,
    pool: torch.Tensor,
    block_table: torch.Tensor,
    box: KvBox,
    buffer: torch.Tensor,
    total: torch.Tensor,
    codec: str,
    debug: bool,
    name: str,
) -> int:
    """Bytes of the packed box."""
    if layout.head_dim % 16 or not 0 < layout.head_dim <= _MOST_DIM:
        raise ValueError(f"head_dim is {layout.head_dim}, supported: multiples of 16 up to {_MOST_DIM}")
    check_one_of("block_size", layout.block_size, _BLOCK_SIZES)
    check_one_of("group_size", packed.block_size, _BLOCK_SIZES)
    check_contiguous("pool", pool)
    check_dtype("block_table", block_table, torch.int32)
    check_shape("block_table", block_table, None)
    check_contiguous("block_table", block_table)
    check_box(layout, box, block_table.shape[0])
    num_bytes = packed_bytes(packed, box, codec)
    if num_bytes // 4 >= MAX_WORDS:
        raise ValueError(f"box has {num_bytes} bytes, a packed buffer at most {MAX_WORDS * 4}")
    check_dtype(name, buffer, torch.uint8)
    check_shape(name, buffer, num_bytes)
    check_contiguous(name, buffer)
    check_dtype("total", total, torch.int64)
    check_shape("total", total, 1)
    check_same_device(pool=pool, block_table=block_table, total=total, **{name: buffer})
    for aligned, tensor in (("pool", pool), (name, buffer)):
        check_rows(aligned, tensor.view(-1))
    if block_table.numel() and table_check.may_check(block_table, asked=debug):
        used = block_table[blocks_of(layout, box).start : layout.blocks_for(box.token_end)].tolist()
        for block in used:
            if not 0 <= block < pool.shape[1]:
                raise ValueError(f"block_table names block {block}, the pool has {pool.shape[1]}")
    return num_bytes


def _planes_per_program(target: Target, tiles: int, planes: int) -> int:
    """Enough programs to fill the GPU many times over; beyond that, fewer look-ups of blocks and fewer atomics."""
    return max(1, min(_MOST_PLANES, tiles * planes // (target.num_sms * _PROGRAMS_PER_SM)))


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()
