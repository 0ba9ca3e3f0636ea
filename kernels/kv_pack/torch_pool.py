"""Packing in torch, on any device: what the Triton launchers of kv_pack compute, bit for bit, and with their arguments.

Pool ``[layers, blocks, 2, K, block_size, D]``; buffer and codecs as in kv_pack.codec.
"""

from dataclasses import replace

import torch

from biphase.kernels.gpu.check import check_dtype, check_shape
from biphase.kernels.kv_layout import KvBox, KvLayout, uniform_scales
from biphase.kernels.kv_pack.checksum import sum64
from biphase.kernels.kv_pack.codec import blocks_of, check_box, packed_bytes
from biphase.kernels.kv_pack.quantize import decode, encode

POOL_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn)


def pack(
    pool: torch.Tensor,
    block_table: torch.Tensor,
    box: KvBox,
    out: torch.Tensor,
    total: torch.Tensor,
    *,
    codec: str = "raw",
) -> None:
    """See triton_gpu.pack."""
    layout = layout_of(pool)
    check_box(layout, box, block_table.shape[0])
    check_shape("out", out, packed_bytes(layout, box, codec))
    if out.numel():
        values = _canonical(_blocks(pool, layout, block_table, box), layout, box)
        if codec == "raw":
            out.copy_(values.contiguous().view(torch.uint8).view(-1))
        else:
            encode(values.float(), layout, box, codec, out)
    total.fill_(_signed(sum64(out.cpu().numpy())))


def unpack(
    pool: torch.Tensor,
    block_table: torch.Tensor,
    box: KvBox,
    data: torch.Tensor,
    total: torch.Tensor,
    *,
    codec: str = "raw",
    group_size: int = 0,
) -> None:
    """See triton_gpu.unpack."""
    layout = layout_of(pool)
    packed = replace(layout, block_size=group_size or layout.block_size)
    check_box(layout, box, block_table.shape[0])
    check_shape("data", data, packed_bytes(packed, box, codec))
    total.fill_(_signed(sum64(data.cpu().numpy())))
    if data.numel() == 0:
        return
    shape = (box.num_layers, 2, box.num_heads, box.num_tokens, layout.head_dim)
    if codec == "raw":
        values = data.clone().view(pool.dtype).view(shape)
    else:
        values = decode(data, packed, box, codec).to(pool.dtype)
    blocks = _blocks(pool, layout, block_table, box)
    _canonical(blocks, layout, box).copy_(values)
    table = _table(layout, block_table, box)
    part = pool.view(_plain(pool))[box.layer_start : box.layer_end, :, :, box.head_start : box.head_end]
    part[:, table] = blocks.view(_plain(pool)).permute(0, 3, 1, 2, 4, 5)


def layout_of(pool: torch.Tensor) -> KvLayout:
    """The layout of a pool as far as packing goes: fp8 codes move as they are, whatever their scales."""
    check_dtype("pool", pool, *POOL_DTYPES)
    check_shape("pool", pool, None, None, 2, None, None, None)
    num_layers, _, _, num_heads, block_size, head_dim = pool.shape
    return KvLayout(
        num_layers=num_layers,
        num_kv_heads=num_heads,
        block_size=block_size,
        head_dim=head_dim,
        dtype=str(pool.dtype).removeprefix("torch."),
        kv_scales=uniform_scales(num_layers, num_heads) if pool.dtype == torch.float8_e4m3fn else None,
    )


def _plain(pool: torch.Tensor) -> torch.dtype:
    """A dtype of the pool's width that torch can index on every device."""
    return torch.uint8 if pool.dtype == torch.float8_e4m3fn else pool.dtype


def _table(layout: KvLayout, block_table: torch.Tensor, box: KvBox) -> torch.Tensor:
    spanned = blocks_of(layout, box)
    return block_table[spanned.start : spanned.stop].long()


def _blocks(pool: torch.Tensor, layout: KvLayout, block_table: torch.Tensor, box: KvBox) -> torch.Tensor:
    """A copy ``[layer, K/V, head, block, slot, D]`` of the blocks that the box touches."""
    part = pool.view(_plain(pool))[box.layer_start : box.layer_end, :, :, box.head_start : box.head_end]
    return part[:, _table(layout, block_table, box)].permute(0, 2, 3, 1, 4, 5).contiguous().view(pool.dtype)


def _canonical(blocks: torch.Tensor, layout: KvLayout, box: KvBox) -> torch.Tensor:
    """The box's view ``[layer, K/V, head, token, D]`` of its blocks."""
    before = box.token_start % layout.block_size
    return blocks.flatten(3, 4)[:, :, :, before : before + box.num_tokens]


def _signed(total: int) -> int:
    """The int64 of the same 64 bits."""
    return total - (total >> 63 << 64)
