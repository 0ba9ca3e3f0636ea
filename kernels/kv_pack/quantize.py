"""The codecs in torch, on any device: canonical float32 values to packed bytes and back. See kv_pack.codec.

Values ``[layer, K/V, head, token, D]``; groups ``[layer, K/V, head, block, slot, D]``, S slots to a block.
"""

import torch

from biphase.kernels.kv_layout import KvBox, KvLayout
from biphase.kernels.kv_pack.codec import (
    COARSE_STEP,
    CODECS,
    LEAST_AMAX,
    MOST_STEP,
    UNITS,
    Codec,
    code_bytes,
    scales_at,
)


def encode(values: torch.Tensor, layout: KvLayout, box: KvBox, codec: str, out: torch.Tensor) -> None:
    """Pack float32 values into ``out``, uint8 of ``packed_bytes``."""
    kind = CODECS[codec]
    groups = _grouped(values, layout, box)
    amax = torch.maximum(groups.amax(dim=(-2, -1)), -groups.amin(dim=(-2, -1))).clamp_(min=LEAST_AMAX)
    codes_end, scales_start = code_bytes(layout, box, codec), scales_at(layout, box, codec)
    largest = torch.tensor(float(UNITS) if kind.residual else kind.limit, device=values.device)
    scaled = (groups * (largest / amax)[..., None, None]).clamp_(-largest, largest)
    if kind.residual:
        _put(_leave_rest(scaled, kind.limit, layout, box), out[codes_end:scales_start])
    codes = _canonical(scaled, layout, box)
    _put(codes.to(torch.float8_e4m3fn).view(torch.uint8) if codec == "fp8" else _integers(codes, kind), out[:codes_end])
    scales = amax / largest
    scales.masked_fill_((scales > kind.most_scale) & scales.isfinite(), kind.most_scale)
    out[scales_start:].copy_(scales.view(-1).view(torch.uint8))


def decode(data: torch.Tensor, layout: KvLayout, box: KvBox, codec: str) -> torch.Tensor:
    """The float32 values of packed bytes; ``layout`` has the block size of the pool that was packed."""
    kind = CODECS[codec]
    shape = (box.num_layers, 2, box.num_heads, box.num_tokens, layout.head_dim)
    codes_end, scales_start = code_bytes(layout, box, codec), scales_at(layout, box, codec)
    count = torch.Size(shape).numel()
    codes = data[:codes_end]
    if codec == "fp8":
        values = codes[:count].clone().view(torch.float8_e4m3fn).float()
    elif kind.bits == 4:
        # sign of a half byte: to the top of an int8 and back
        low, high = (codes << 4).view(torch.int8) >> 4, codes.view(torch.int8) >> 4
        values = torch.stack((low, high), dim=1).view(-1)[:count].float()
    else:
        values = codes[:count].view(torch.int8).float()
    groups = _grouped(values.view(shape), layout, box)
    per_group = groups.shape[:4]
    if kind.residual:
        end = codes_end + 2 * torch.Size(per_group).numel() * layout.head_dim
        per_dim = data[codes_end:end].view(*per_group, 2, layout.head_dim)
        coarse = per_dim[..., 0, :].contiguous().view(torch.int8).float()
        groups.mul_(per_dim[..., 1:, :].float()).add_(coarse.mul_(COARSE_STEP).unsqueeze(-2)).clamp_(-UNITS, UNITS)
    scales = data[scales_start:].clone().view(torch.float32).view(per_group)
    return _canonical(groups.mul_(scales[..., None, None]), layout, box)


def _leave_rest(units: torch.Tensor, limit: float, layout: KvLayout, box: KvBox) -> torch.Tensor:
    """Turn groups in units into what codes are rounded from; returns the bytes ``[..., block, coarse and step, D]``."""
    one = torch.ones((), device=units.device)  # quotients of two tensors are rounded correctly on every device
    highest, lowest = _over_tokens(units, layout, box)
    coarse = (highest + lowest).mul_(0.5 / COARSE_STEP).round_()
    units.sub_((coarse * COARSE_STEP).unsqueeze(-2))
    highest, lowest = _over_tokens(units, layout, box)
    step = torch.maximum(highest, -lowest).mul_(one / limit).ceil_().clamp_(1, MOST_STEP)
    units.mul_((one / step).unsqueeze(-2)).clamp_(-limit, limit)
    return torch.stack((coarse.to(torch.int8).view(torch.uint8), step.to(torch.uint8)), dim=-2)


def _over_tokens(groups: torch.Tensor, layout: KvLayout, box: KvBox) -> tuple[torch.Tensor, torch.Tensor]:
    """Largest and smallest of each dim, ``[..., block, D]``, over the slots that the box has."""
    highest, lowest = groups.amax(dim=-2), groups.amin(dim=-2)
    size, last = layout.block_size, groups.shape[3] - 1
    for block, start, end in (
        (0, box.token_start % size, size if last else size - -box.token_end % size),
        (last, 0 if last else box.token_start % size, size - -box.token_end % size),
    ):
        if (start, end) != (0, size):
            torch.amax(groups[:, :, :, block, start:end], dim=-2, out=highest[:, :, :, block])
            torch.amin(groups[:, :, :, block, start:end], dim=-2, out=lowest[:, :, :, block])
    return highest, lowest


def _integers(scaled: torch.Tensor, kind: Codec) -> torch.Tensor:
    """Flat bytes of rounded codes."""
    codes = scaled.round().to(torch.int8).view(torch.uint8).reshape(-1)
    if kind.bits == 4:
        codes = torch.nn.functional.pad(codes, (0, codes.numel() % 2))
        codes = codes[0::2] & 15 | codes[1::2] << 4
    return codes


def _put(data: torch.Tensor, out: torch.Tensor) -> None:
    """Into the beginning of ``out``, zeros behind."""
    flat = data.reshape(-1)
    out[: flat.numel()].copy_(flat)
    out[flat.numel() :].zero_()


def _grouped(values: torch.Tensor, layout: KvLayout, box: KvBox) -> torch.Tensor:
    """Canonical values as groups, 0 outside of the box."""
    before = box.token_start % layout.block_size
    after = -box.token_end % layout.block_size
    padded = torch.nn.functional.pad(values, (0, 0, before, after)) if before or after else values
    return padded.view(*values.shape[:3], -1, layout.block_size, layout.head_dim)


def _canonical(groups: torch.Tensor, layout: KvLayout, box: KvBox) -> torch.Tensor:
    """The box's view of groups."""
    before = box.token_start % layout.block_size
    return groups.flatten(3, 4)[:, :, :, before : before + box.num_tokens]
