"""The noise of a draw: a pure function of (seed, branch, output position, token id).

Philox4x64-10 with key (seed, 0) and counter (token_id >> 2, branch, position, 0); the token's word is token_id & 3.
Consecutive counters are numpy's own stream, so a row's bits come from one call.
"""

import numpy as np

_WORD = (1 << 64) - 1
_JUMP_WORDS = 700
"""Skipping ahead in the stream costs about as much as drawing this many words."""

MAX_NOISE = 16.64
"""Above the largest value of ``gumbel``: -log(-log(1 - 2^-24)) = 16.6355."""


class GumbelBits:
    """The 64-bit words of one draw, by token id."""

    def __init__(self, *, seed: int, branch: int, position: int) -> None:
        # numpy adds one to the counter before each block of four words
        before = ((branch << 64 | position << 128) - 1) % (1 << 256)
        counter = np.array([before >> shift & _WORD for shift in (0, 64, 128, 192)], dtype=np.uint64)
        self._stream = np.random.Philox(key=np.array([seed, 0], dtype=np.uint64), counter=counter)
        self._next_quad = 0

    def first(self, count: int) -> np.ndarray:
        """Words of token ids 0 .. count - 1."""
        self._skip_to(0)
        self._next_quad = -(-count // 4)
        words: np.ndarray = self._stream.random_raw(4 * self._next_quad)
        return words[:count]

    def of(self, token_ids: np.ndarray) -> np.ndarray:
        """Words of ascending ``token_ids`` (int64), whichever way is cheaper."""
        if not len(token_ids):
            return np.empty(0, dtype=np.uint64)
        if len(token_ids) * _JUMP_WORDS > int(token_ids[-1]):
            words: np.ndarray = self.first(int(token_ids[-1]) + 1)[token_ids]
            return words
        picked = np.empty(len(token_ids), dtype=np.uint64)
        quad: np.ndarray | None = None
        for i, token in enumerate(token_ids.tolist()):
            if quad is None or self._next_quad != (token >> 2) + 1:
                self._skip_to(token >> 2)
                quad = self._stream.random_raw(4)
                self._next_quad += 1
            picked[i] = quad[token & 3]
        return picked

    def _skip_to(self, quad: int) -> None:
        if quad != self._next_quad:
            self._stream.advance((quad - self._next_quad) % (1 << 256))
            self._next_quad = quad


def gumbel(words: np.ndarray) -> np.ndarray:
    """Standard Gumbel noise, float32: -log(-log(u)) with u = ((word >> 41) + 0.5) * 2^-23, so 0 < u < 1."""
    u = ((words >> np.uint64(41)).astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-23)
    noise: np.ndarray = -np.log(-np.log(u))
    return noise


def least_word(noise: float) -> int:
    """A word below which every word's noise is less than ``noise`` (a little low, for rounding)."""
    u = float(np.exp(-np.exp(-(noise - 1e-3))))
    return max(0, int(u * 2**23) - 2) << 41
