"""Which tokens a draw may take: exact top-k, top-p and min-p without sorting the vocabulary.

Few tokens carry nearly all of the mass, so the filters look at those within a cut of the best first and widen the
cut only when that was not enough. A cut of infinity is the full sort.
"""

import math

import numpy as np

_CUTS = (2.0, 5.0, 10.0, 20.0, math.inf)


def keep_candidates(z: np.ndarray, *, top_k: int, top_p: float, min_p: float) -> np.ndarray:
    """Ids (int64, ascending) of the tokens that pass the filters; ``z`` [vocab] is (logit - max) / temperature.

    Order: top-k, then top-p over what top-k left, then min-p. Top-k keeps exactly k tokens; top-p the fewest whose
    mass reaches p, at least one; among equals the lower id is kept. min-p keeps p(token) >= min_p * p(best).
    """
    kept: np.ndarray | None = None
    if 0 < top_k < len(z):
        kept = _best(z, top_k)
    if top_p < 1:
        kept = _nucleus(z, kept, top_p)
    if min_p > 0:
        floor = math.log(min_p)
        kept = np.flatnonzero(z >= floor) if kept is None else kept[z[kept].astype(np.float64) >= floor]
    return np.arange(len(z)) if kept is None else np.sort(kept)


def _ranked(z: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Ascending ``ids`` by falling z, then by rising id."""
    order: np.ndarray = ids[np.argsort(-z[ids], kind="stable")]
    return order


def _best(z: np.ndarray, count: int) -> np.ndarray:
    for cut in _CUTS:
        ids = np.flatnonzero(z >= -cut)
        if len(ids) >= count:
            break
    return _ranked(z, ids)[:count]


def _nucleus(z: np.ndarray, among: np.ndarray | None, top_p: float) -> np.ndarray:
    """The shortest ranking prefix (of ``among``, itself ranked, or of all) whose mass is ``top_p`` of the whole."""
    if among is not None:
        return _prefix(z, among, top_p * float(np.exp(z[among]).sum(dtype=np.float64)))
    wanted = top_p * float(np.exp(z).sum(dtype=np.float64))
    for cut in _CUTS:
        ids = np.flatnonzero(z >= -cut)
        if float(np.exp(z[ids]).sum(dtype=np.float64)) >= wanted * (1 + 1e-9):
            break
    return _prefix(z, _ranked(z, ids), wanted)


def _prefix(z: np.ndarray, ranked: np.ndarray, wanted: float) -> np.ndarray:
    running = np.cumsum(np.exp(z[ranked]), dtype=np.float64)
    return ranked[: int(np.searchsorted(running, wanted)) + 1]
