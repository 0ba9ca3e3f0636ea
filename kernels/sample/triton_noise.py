# mypy: ignore-errors
"""The noise of a draw on the device: see ``noise``, whose words these are."""

import triton
import triton.language as tl


@triton.jit
def philox_words(seed, branch, position, quads):
    """Philox4x64-10: four words uint64 per counter (quad, branch, position, 0) under the key (seed, 0).

    Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011. All uint64, ``quads`` a vector.
    """
    multiplier0 = tl.full((), 0xD2E7470EE14C6C93, tl.uint64)
    multiplier1 = tl.full((), 0xCA5A826395121157, tl.uint64)
    weyl0 = tl.full((), 0x9E3779B97F4A7C15, tl.uint64)
    weyl1 = tl.full((), 0xBB67AE8584CAA73B, tl.uint64)
    c0 = quads
    c1 = tl.zeros_like(quads) + branch
    c2 = tl.zeros_like(quads) + position
    c3 = tl.zeros_like(quads)
    key0 = seed
    key1 = tl.full((), 0, tl.uint64)
    for _ in tl.static_range(10):
        high0, high1 = tl.umulhi(multiplier0, c0), tl.umulhi(multiplier1, c2)
        low0, low1 = multiplier0 * c0, multiplier1 * c2
        c0 = high1 ^ c1 ^ key0
        c1 = low1
        c2 = high0 ^ c3 ^ key1
        c3 = low0
        key0 += weyl0
        key1 += weyl1
    return c0, c1, c2, c3


@triton.jit
def gumbel_of(bits):
    """-log(-log(u)), u = (bits + 0.5) * 2^-23 exactly, of a word's upper 23 ``bits`` (int32)."""
    u = (bits.to(tl.float32) + 0.5) * (1.0 / (1 << 23))
    return -tl.log(-tl.log(u))


@triton.jit
def gumbel_tile(seed, branch, position, first_token, TILE: tl.constexpr):
    """Noise of tokens first_token .. + TILE (a multiple of four): one philox block for every four."""
    quads = (first_token >> 2).to(tl.uint64) + tl.arange(0, TILE // 4).to(tl.uint64)
    c0, c1, c2, c3 = philox_words(seed, branch, position, quads)
    even = tl.join((c0 >> 41).to(tl.int32), (c2 >> 41).to(tl.int32))
    odd = tl.join((c1 >> 41).to(tl.int32), (c3 >> 41).to(tl.int32))
    return gumbel_of(tl.reshape(tl.join(even, odd), [TILE]))
