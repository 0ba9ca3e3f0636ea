"""Which tokens a draw may take: exact top-k, top-p and min-p without sorting the vocabulary.

Few tokens carry nearly all of the mass, so the filters look at those within a cut of the best first and widen the
cut only when that was not enough. A cut of infinity is the full sort.
"""

import math

import numpy as np

_CUTS = (2.0, 5.0, 10.0, 20.0, math.inf)
_SORTED_AT_ONCE = 1024
_BINS, _BINS_PER_UNIT = 2048, 128.0
"""16 units of z, in which lies all but 1e-7 of the mass per token; the last bin holds what is further down."""


def keep_candidates(z: np.ndarray, *, top_k: int, top_p: float, min_p: float) -> np.ndarray | None:
    """Ids (int64, ascending) of the tokens that pass the filters; ``z`` [vocab] is (logit - max) / temperature.

    Order: top-k, then top-p over what top-k left, then min-p. Top-k keeps exactly k tokens; top-p the fewest whose
    mass reaches p, at least one; among equals the lower id is kept. min-p keeps p(token) >= min_p * p(best).
    None: all filters are off.
    """
    kept: np.ndarray | None = None
    if 0 < top_k < len(z):
        kept = _best(z, top_k)
    if top_p < 1:
        kept = _nucleus(z, kept, top_p)
    if min_p > 0:
        floor = min_p_floor(min_p)
        kept = np.flatnonzero(z >= floor) if kept is None else kept[z[kept] >= floor]
    return kept if kept is None else np.sort(kept)


def min_p_floor(min_p: float) -> np.float32:
    """The least float32 z that passes: not below log(min_p), however that rounds."""
    exact = math.log(min_p)
    floor = np.float32(exact)
    return floor if float(floor) >= exact else np.nextafter(floor, np.float32(np.inf))


def _ranked(z: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Ascending ``ids`` by falling z, then by rising id."""
    order: np.ndarray = ids[np.argsort(-z[ids], kind="stable")]
    return order


def _best(z: np.ndarray, count: int) -> np.ndarray:
    for cut in _CUTS:
        ids = np.flatnonzero(z >= -cut)
        if len(ids) >= count:
            break
    if len(ids) > count:
        values = z[ids]
        ids = ids[values >= np.partition(values, len(ids) - count)[len(ids) - count]]
    return _ranked(z, ids)[:count]


def _nucleus(z: np.ndarray, among: np.ndarray | None, top_p: float) -> np.ndarray:
    """The shortest prefix, by rank, whose mass is ``top_p`` of the whole (``among``: of those only)."""
    if among is None:
        wanted = top_p * float(np.exp(z).sum(dtype=np.float64))
        for cut in _CUTS:
            ids = np.flatnonzero(z >= -cut)
            mass = np.exp(z[ids])
            if float(mass.sum(dtype=np.float64)) >= wanted * (1 + 1e-9):
                break
    else:
        ids = np.sort(among)
        mass = np.exp(z[ids])
        wanted = top_p * float(mass.sum(dtype=np.float64))
    surely: np.ndarray | None = None
    if len(ids) > _SORTED_AT_ONCE:
        # by mass in bins of z, only the bin in which the prefix ends has to be sorted
        bins = np.minimum(-z[ids] * _BINS_PER_UNIT, _BINS - 1).astype(np.int64)
        by_bin = np.bincount(bins, weights=mass, minlength=_BINS).cumsum()
        last = min(int(np.searchsorted(by_bin, wanted)), int(bins.max()))
        surely = ids[bins < last]
        wanted -= float(by_bin[last - 1]) if last else 0.0
        ids = ids[bins == last]
    ranked = _ranked(z, ids)
    running = np.cumsum(np.exp(z[ranked]), dtype=np.float64)
    prefix = ranked[: int(np.searchsorted(running, wanted)) + 1]
    return prefix if surely is None else np.concatenate((surely, prefix))
