"""bfloat16 and the two fp8 formats as raw bits: exact decoding to float32, encoding to nearest even. numpy only."""

import functools
from typing import Any

import numpy as np
import triton.language as tl

# mantissa bits, exponent bias, largest finite value, bits of NaN, bits past the largest value
_FP8 = {
    tl.float8e4nv: (3, 7, 448.0, 0x7F, 0x7F),  # e4m3fn: no infinity, overflow is NaN
    tl.float8e5: (2, 15, 57344.0, 0x7F, 0x7C),
}
PACKED = frozenset({tl.bfloat16, *_FP8})
"""Types that the interpreter holds as unsigned integers."""


def decode(bits: np.ndarray, dtype: Any) -> np.ndarray:
    """float32 values of ``bits`` (uint16 or uint8)."""
    if dtype == tl.bfloat16:
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return _fp8_values(dtype)[bits.view(np.uint8)]


def encode(values: np.ndarray, dtype: Any) -> np.ndarray:
    """Bits of ``values`` (numbers of any numpy type), rounded once, to nearest even; NaN stays NaN."""
    if dtype == tl.bfloat16:
        return _encode_bfloat16(_to_float32_odd(values))
    return _encode_fp8(values, dtype)


def round_to_tf32(values: np.ndarray) -> np.ndarray:
    """float32 with 10 bits of mantissa left, to nearest (ties away, as ``cvt.rna.tf32``)."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = (bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)
    return np.where(np.isfinite(values), rounded, bits).astype(np.uint32).view(np.float32)


def _to_float32_odd(values: np.ndarray) -> np.ndarray:
    """float32, and where that was inexact its last bit set (round to odd): a second rounding is then as if it were one."""
    single = values.astype(np.float32)
    if values.dtype.itemsize <= 2 or values.dtype == np.float32:
        return single
    exact = values.astype(np.float64)
    away = np.abs(single.astype(np.float64)) > np.abs(exact)
    inexact = np.isfinite(single) & (single.astype(np.float64) != exact)
    bits = single.view(np.uint32) - (inexact & away).astype(np.uint32)
    return (bits | inexact.astype(np.uint32)).view(np.float32)


def _encode_bfloat16(values: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(values).view(np.uint32).reshape(values.shape)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint32(0x7FFF), rounded).astype(np.uint16)


def _encode_fp8(values: np.ndarray, dtype: Any) -> np.ndarray:
    mantissa_bits, bias, largest, nan_bits, overflow_bits = _FP8[dtype]
    magnitude = np.abs(values.astype(np.float64))
    bounded = np.where(np.isnan(magnitude), 0.0, np.minimum(magnitude, 2 * largest))
    smallest = np.ldexp(1.0, 1 - bias)  # numbers below are subnormal, spaced as those from here on
    _, exponent = np.frexp(np.maximum(bounded, smallest))  # = f * 2**exponent, f in [0.5, 1)
    exponent = exponent - 1
    steps = np.rint(np.ldexp(bounded, mantissa_bits - exponent)).astype(np.int64)
    # a carry out of the mantissa runs into the exponent, as it must
    codes = ((exponent + bias - 1) << mantissa_bits) + steps
    overflow = np.ldexp(steps.astype(np.float64), exponent - mantissa_bits) > largest
    codes = np.where(overflow, overflow_bits, codes)
    codes = np.where(np.isnan(magnitude), nan_bits, codes)
    return (codes | (np.signbit(values.astype(np.float64)).astype(np.int64) << 7)).astype(np.uint8)


@functools.cache
def _fp8_values(dtype: Any) -> np.ndarray:
    mantissa_bits, bias, largest, _, overflow_bits = _FP8[dtype]
    code = np.arange(128)
    exponent, mantissa = code >> mantissa_bits, code & ((1 << mantissa_bits) - 1)
    significand = np.where(exponent == 0, mantissa, mantissa + (1 << mantissa_bits)).astype(np.float64)
    values = np.ldexp(significand, np.maximum(exponent, 1) - bias - mantissa_bits)
    values[values > largest] = np.nan
    if dtype == tl.float8e5:
        values[overflow_bits] = np.inf
    return np.concatenate([values, -values]).astype(np.float32)
