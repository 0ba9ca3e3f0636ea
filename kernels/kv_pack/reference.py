"""What pack and unpack mean, one token of one head at a time; of codecs, one group at a time. numpy only."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from biphase.kernels.kv_layout import KvBox, KvLayout
from biphase.kernels.kv_pack.codec import CODECS, LEAST_AMAX, blocks_of


def pack_reference(pool: np.ndarray[Any, Any], layout: KvLayout, blocks: Sequence[int], box: KvBox) -> bytes:
    """The canonical bytes ``[layer][K,V][head][token][dim]`` of a box; pool ``[layers, blocks, 2, heads, size, dim]``."""
    rows = []
    for layer in range(box.layer_start, box.layer_end):
        for k_or_v in (0, 1):
            for head in range(box.head_start, box.head_end):
                for token in range(box.token_start, box.token_end):
                    block, slot = blocks[token // layout.block_size], token % layout.block_size
                    rows.append(pool[layer, block, k_or_v, head, slot].tobytes())
    return b"".join(rows)


def unpack_reference(
    pool: np.ndarray[Any, Any], layout: KvLayout, blocks: Sequence[int], box: KvBox, data: bytes
) -> None:
    """Write canonical bytes back, row by row."""
    row_bytes = layout.head_dim * layout.itemsize
    at = 0
    for layer in range(box.layer_start, box.layer_end):
        for k_or_v in (0, 1):
            for head in range(box.head_start, box.head_end):
                for token in range(box.token_start, box.token_end):
                    block, slot = blocks[token // layout.block_size], token % layout.block_size
                    row = np.frombuffer(data[at : at + row_bytes], dtype=pool.dtype)
                    pool[layer, block, k_or_v, head, slot] = row
                    at += row_bytes


def encode_reference(values: np.ndarray[Any, Any], layout: KvLayout, box: KvBox, codec: str) -> bytes:
    """A box's canonical float32 values ``[layer, K/V, head, token, dim]`` packed."""
    codes = np.zeros(values.shape, np.uint8)
    per_dim, scales = [], []
    for plane in np.ndindex(values.shape[:3]):
        for block in blocks_of(layout, box):
            rows = _rows(layout, box, block)
            group = values[plane][rows]
            amax = max(np.float32(np.abs(group).max()), np.float32(LEAST_AMAX))
            if codec == "int4":
                found, columns = _int4(group, amax)
                codes[plane][rows] = found
                per_dim.append(columns)
                scales.append(min(amax / np.float32(1016), np.float32(CODECS[codec].most_scale)))
                continue
            limit = np.float32(CODECS[codec].limit)
            scaled = np.clip(group * (limit / amax), -limit, limit)
            codes[plane][rows] = (
                e4m3_codes(scaled) if codec == "fp8" else np.rint(scaled).astype(np.int8).view(np.uint8)
            )
            scales.append(min(amax / limit, np.float32(CODECS[codec].most_scale)))
    flat = codes.ravel()
    if codec == "int4":
        flat = np.append(flat, np.zeros(flat.size % 2, np.uint8)) & 15
        flat = flat[0::2] + 16 * flat[1::2]
    return _filled(flat) + _filled(np.array(per_dim, np.uint8)) + np.array(scales, "<f4").tobytes()


def e4m3_values() -> np.ndarray[Any, Any]:
    """What the codes 0 .. 126 of e4m3 stand for; the upper half of all codes is that with a minus, 127 is NaN."""
    exponent, mantissa = np.divmod(np.arange(127, dtype=np.float32), np.float32(8))
    normal = (1 + mantissa / 8) * np.exp2(exponent - 7)
    return np.where(exponent == 0, mantissa / 8 * 2.0**-6, normal).astype(np.float32)


def e4m3_codes(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The nearest code of values within +-448, ties to even."""
    known = e4m3_values().astype(np.float64)
    size = np.abs(values).astype(np.float64)
    above = np.searchsorted(known, size).clip(1, 126)
    low, high = size - known[above - 1], known[above] - size
    nearest: np.ndarray[Any, Any] = np.where((low < high) | ((low == high) & (above % 2 == 1)), above - 1, above)
    signs = np.signbit(values).astype(np.uint8) << 7
    codes: np.ndarray[Any, Any] = nearest.astype(np.uint8) | signs
    return codes


def _int4(group: np.ndarray[Any, Any], amax: Any) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Codes ``[token, dim]``, and coarse and step ``[2, dim]``."""
    units = np.clip(group * (np.float32(1016) / amax), np.float32(-1016), np.float32(1016))
    coarse = np.rint((units.max(axis=0) + units.min(axis=0)) / np.float32(16))
    rest = units - 8 * coarse
    step = np.clip(np.ceil(np.abs(rest).max(axis=0) * np.float32(1 / 7)), 1, 255).astype(np.float32)
    codes = np.rint(np.clip(rest * (np.float32(1) / step), -7, 7)).astype(np.int8)
    return codes.view(np.uint8), np.stack((coarse.astype(np.int8).view(np.uint8), step.astype(np.uint8)))


def _rows(layout: KvLayout, box: KvBox, block: int) -> slice:
    """The box's tokens, counted from its first, that lie in a block of the request."""
    start, end = block * layout.block_size, (block + 1) * layout.block_size
    return slice(max(box.token_start, start) - box.token_start, min(box.token_end, end) - box.token_start)


def _filled(data: np.ndarray[Any, Any]) -> bytes:
    return data.tobytes() + bytes(-data.size % 4)
