"""The position-weighted 64-bit sum of packed KV, on the host. numpy only; the Triton kernels compute the same bits.

    sum = (weight(0) * w_0 + weight(1) * w_1 + ...) mod 2^64

over the buffer's 32-bit little-endian words, the last one filled up with zero bytes. ``weight(i) = y << 32 | x`` is a
mix of the position alone, in 32-bit arithmetic:

    x = (i + START) * 0x9E3779B1;  x ^= x >> 15;  x *= 0x85EBCA77;  x ^= x >> 13
    y = (x ^ x >> 16) * 0xC2B2AE3D

Integer addition mod 2^64 knows no order, so any number of programs may add their parts. For i < 2^31, x is one to one and
never 0, so x_i and x_i - x_j have at most 31 factors of two, and so have weight(i) and weight(i) - weight(j); a nonzero
difference of two words has at most 31 as well. No product of the two is 0 mod 2^64: a change of one word, and a swap of
any two unequal words, always changes the sum. Other changes (swaps of blocks, heads or layers) slip through with 2^-64
or so. The multipliers are xxHash's primes (Y. Collet), the mix has the shape of MurmurHash3's finalizer (A. Appleby).
"""

import functools
from typing import Any

import numpy as np

MASK = (1 << 64) - 1
START = 0x165667B1
MUL_1, MUL_2, MUL_3 = 0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D
MAX_WORDS = 1 << 31
"""Longest buffer in words, so that no weight is 0 and positions fit 32 bits."""

_PART = 1 << 14  # words whose products lie in the cache at once


def sum64(data: Any) -> int:
    """The sum of a buffer of bytes. Raises ValueError for one of 8 GiB and more."""
    flat = np.frombuffer(data, dtype=np.uint8) if len(data) else np.empty(0, np.uint8)
    whole = flat.size // 4
    if whole >= MAX_WORDS:
        raise ValueError(f"a buffer of {flat.size} bytes, a sum is over less than {MAX_WORDS * 4}")
    words = flat[: whole * 4].view("<u4")
    total = 0
    wide = np.empty(min(_PART, whole), dtype=np.uint64)
    for start in range(0, whole, _PART):
        part = words[start : start + _PART]
        np.copyto(wide[: part.size], part)
        total += int(np.dot(wide[: part.size], _weights(start)[: part.size]))
    if flat.size % 4:
        last = int.from_bytes(flat[whole * 4 :].tobytes(), "little")
        total += last * int(weights(whole, 1)[0])
    return total & MASK


def weights(start: int, count: int) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """The weights of ``count`` positions from ``start`` on."""
    x = np.arange(start, start + count, dtype=np.uint32)
    x += np.uint32(START)
    x *= np.uint32(MUL_1)
    x ^= x >> np.uint32(15)
    x *= np.uint32(MUL_2)
    x ^= x >> np.uint32(13)
    y = (x ^ (x >> np.uint32(16))) * np.uint32(MUL_3)
    return (y.astype(np.uint64) << np.uint64(32)) | x


@functools.lru_cache(maxsize=256)  # 32 MiB: pieces of up to 16 MiB find theirs ready
def _weights(start: int) -> np.ndarray[Any, np.dtype[np.uint64]]:
    return weights(start, _PART)
