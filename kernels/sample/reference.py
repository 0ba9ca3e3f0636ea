"""What ``sample`` computes, in plain Python integers and full sorts."""

import math

import numpy as np

_MASK = (1 << 64) - 1
_MULTIPLIERS = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
_WEYL = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)


def philox4x64(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Philox4x64-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        product0, product1 = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (product1 >> 64) ^ c1 ^ k0, product1 & _MASK, (product0 >> 64) ^ c3 ^ k1, product0 & _MASK
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def sample_reference(
    logits: np.ndarray,
    *,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    seed: int,
    branch: int,
    position: int,
    forbid_ids: tuple[int, ...] = (),
) -> int:
    """The token that ``sample`` draws from one row of logits; see there for the order of the filters."""
    allowed = [token for token in range(len(logits)) if token not in forbid_ids]
    if temperature == 0:
        return max(allowed, key=lambda token: (logits[token], -token))
    peak = max(logits[token] for token in allowed)
    z = {token: (np.float32(logits[token]) - np.float32(peak)) / np.float32(temperature) for token in allowed}
    ranked = sorted(allowed, key=lambda token: (-z[token], token))
    if top_k:
        ranked = ranked[:top_k]
    if top_p < 1:
        mass = [float(np.exp(z[token])) for token in ranked]
        wanted, running, kept = top_p * math.fsum(mass), 0.0, 0
        while kept < len(ranked) and (kept == 0 or running < wanted):
            running += mass[kept]
            kept += 1
        ranked = ranked[:kept]
    if min_p > 0:
        ranked = [token for token in ranked if float(z[token]) >= math.log(min_p)]

    def score(token: int) -> np.float32:
        word = philox4x64((token >> 2, branch, position, 0), (seed, 0))[token & 3]
        u = (np.float32(word >> 41) + np.float32(0.5)) * np.float32(2.0**-23)
        return np.float32(z[token] - np.log(-np.log(u)))

    return max(ranked, key=lambda token: (score(token), -token))
