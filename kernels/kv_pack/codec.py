"""How a box lies in its packed buffer, by codec. Pure arithmetic, no torch.

    raw               the canonical bytes [layer][K,V][head][token][dim] of the pool's own dtype
    fp8, int8, int4   codes in that order, one byte each (e4m3; two's complement) or two to a byte (the earlier element
                      in the low half), filled up with zero bytes to a multiple of 4;
                      int4: then bytes [layer][K,V][head][block][coarse, step][dim], filled up likewise;
                      then the scales, float32 [layer][K,V][head][block], block: the blocks of the request that the box
                      touches, in the block size of the pool that was packed

A group of values with one scale is what one head of one block holds of the box. fp8 and int8:

    amax  = max |value|, at least 2^-100
    scale = amax / limit, correctly rounded          limit: 448, 127; at most the largest that times limit is finite
    code  = round(value * (limit / amax)), to nearest, ties to even, clamped to +-limit
    value = code * scale, rounded to the pool's dtype

int4 sends a coarse value for each dim of a group, in 8 bits, and codes of what remains of each token, in steps of that
dim's own. Keys have dims that are always far from 0; four bits for the sum of both would be spent on those alone.

    scale  = amax / 1016                             1016 = 127 * 8: the unit of what follows; at most as above
    t      = value * (1016 / amax), clamped to +-1016
    coarse = round((max t + min t) / 16)             over the group's tokens, for each dim; two's complement
    rest   = t - 8 * coarse
    step   = ceil(max |rest| * (1 / 7)), from 1 to 255
    code   = round(rest * (1 / step)), clamped to +-7
    value  = (8 * coarse + code * step, clamped to +-1016) * scale, rounded to the pool's dtype

all in float32, each operation correctly rounded, so that every backend gets the same bits. Values are finite, and what
comes back is: no value is larger than amax, but for the rounding of the scale and of the dtype, so that blocks near the
end of their dtype's range keep within it. Little-endian throughout.
"""

import math
from dataclasses import dataclass

from biphase.kernels.kv_layout import KvBox, KvLayout

LEAST_AMAX = 2.0**-100
"""Below it limit / amax could overflow; such values become code 0."""

COARSE_STEP = 8
UNITS = 127 * COARSE_STEP
MOST_STEP = 255

_FLOAT32_MAX = (2.0 - 2.0**-23) * 2.0**127


@dataclass(frozen=True, slots=True, kw_only=True)
class Codec:
    """``bits`` of a code, ``limit``: the largest code. ``residual``: codes are of what coarse values leave."""

    name: str
    bits: int
    limit: float
    residual: bool = False

    @property
    def most_scale(self) -> float:
        """The float32 next below the largest one of all divided by the largest code, or unit: a scale that was rounded
        upwards would make infinity of the largest values."""
        mantissa, exponent = math.frexp(_FLOAT32_MAX / (UNITS if self.residual else self.limit))
        return math.ldexp(math.floor(math.ldexp(mantissa, 24)), exponent - 24)


CODECS = {
    codec.name: codec
    for codec in (
        Codec(name="fp8", bits=8, limit=448.0),
        Codec(name="int8", bits=8, limit=127.0),
        Codec(name="int4", bits=4, limit=7.0, residual=True),
    )
}
"""Those that quantise."""

_QUANTIZABLE = ("float32", "bfloat16", "float16")


def check_codec(codec: str, dtype: str) -> None:
    """Raises ValueError where a pool of ``dtype`` cannot be packed so."""
    if codec != "raw" and codec not in CODECS:
        raise ValueError(f"codec is {codec!r}, supported: raw, {', '.join(CODECS)}")
    if codec != "raw" and dtype not in _QUANTIZABLE:
        raise ValueError(f"codec {codec} packs pools of {', '.join(_QUANTIZABLE)}, this one is {dtype}")


def blocks_of(layout: KvLayout, box: KvBox) -> range:
    """The blocks of the request, counted from its token 0, that the box touches."""
    if box.num_tokens == 0:
        return range(0)
    return range(box.token_start // layout.block_size, layout.blocks_for(box.token_end))


def code_bytes(layout: KvLayout, box: KvBox, codec: str) -> int:
    """Bytes of the codes: where what describes their groups begins."""
    if codec == "raw":
        return box.num_bytes(layout)
    count = box.num_layers * 2 * box.num_heads * box.num_tokens * layout.head_dim
    return -(-count * CODECS[codec].bits // 32) * 4


def scales_at(layout: KvLayout, box: KvBox, codec: str) -> int:
    """Where the scales begin, in bytes."""
    per_group = 2 * layout.head_dim if CODECS[codec].residual else 0
    return code_bytes(layout, box, codec) + -(-_num_groups(layout, box) * per_group // 4) * 4


def packed_bytes(layout: KvLayout, box: KvBox, codec: str = "raw") -> int:
    """Bytes of the whole packed buffer. Raises ValueError for a codec that this pool does not take."""
    check_codec(codec, layout.dtype)
    if codec == "raw":
        return box.num_bytes(layout)
    return scales_at(layout, box, codec) + 4 * _num_groups(layout, box)


def _num_groups(layout: KvLayout, box: KvBox) -> int:
    return box.num_layers * 2 * box.num_heads * len(blocks_of(layout, box))


def check_box(layout: KvLayout, box: KvBox, num_blocks: int) -> None:
    """Raises ValueError for a box outside of a request of ``num_blocks`` blocks."""
    if not (
        0 <= box.layer_start <= box.layer_end <= layout.num_layers
        and 0 <= box.head_start <= box.head_end <= layout.num_kv_heads
        and 0 <= box.token_start <= box.token_end <= num_blocks * layout.block_size
    ):
        raise ValueError(f"{box} lies outside {num_blocks} blocks of {layout}")
