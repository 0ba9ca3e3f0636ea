"""The sum of packed KV: its definition, and what it must notice."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from biphase.kernels.kv_pack.checksum import _PART, sum64


def weight(position: int) -> int:
    """As the definition says, one step at a time."""
    mask = 0xFFFFFFFF
    x = (position + 0x165667B1) * 0x9E3779B1 & mask
    x ^= x >> 15
    x = x * 0x85EBCA77 & mask
    x ^= x >> 13
    y = (x ^ x >> 16) * 0xC2B2AE3D & mask
    return y << 32 | x


def plain_sum(data: bytes) -> int:
    data += bytes(-len(data) % 4)
    words = [int.from_bytes(data[at : at + 4], "little") for at in range(0, len(data), 4)]
    return sum(weight(position) * word for position, word in enumerate(words)) % 2**64


@given(st.binary(max_size=300))
def test_it_is_as_defined(data: bytes) -> None:
    assert sum64(data) == plain_sum(data)
    assert sum64(memoryview(bytearray(data))) == plain_sum(data)


def test_long_buffers_are_summed_in_parts() -> None:
    data = np.random.default_rng(1).bytes(4 * (2 * _PART + 5) + 3)
    assert sum64(data) == plain_sum(data)
    assert sum64(b"") == 0


@given(st.binary(min_size=8, max_size=400), st.data())
@settings(max_examples=200)
def test_one_word_changed_or_two_swapped_is_noticed(data: bytes, draw: st.DataObject) -> None:
    data = data[: len(data) // 4 * 4]
    words = np.frombuffer(data, "<u4").copy()
    first, second = (draw.draw(st.integers(0, words.size - 1)) for _ in range(2))
    swapped = words.copy()
    swapped[[first, second]] = swapped[[second, first]]
    assert (sum64(swapped.tobytes()) == sum64(data)) == (words[first] == words[second])
    changed = words.copy()
    changed[first] ^= draw.draw(st.integers(1, 2**32 - 1))
    assert sum64(changed.tobytes()) != sum64(data)


def test_no_weight_is_even_too_often_to_tell_words_apart() -> None:
    """The lower halves of weights are one to one: no two positions share one, none is 0."""
    lower = [weight(position) & 0xFFFFFFFF for position in [*range(4000), *range(2**31 - 4000, 2**31)]]
    assert len(set(lower)) == len(lower) and 0 not in lower
