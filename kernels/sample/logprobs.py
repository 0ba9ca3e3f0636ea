"""Log-probabilities of the model's own logits."""

import numpy as np

from biphase.kernels.sample.filters import keep_candidates


class RowLogprobs:
    """Of one row [vocab] float32, taken before the row is edited."""

    def __init__(self, logits_V: np.ndarray, top: int) -> None:
        below = logits_V - logits_V.max()
        self._logprobs = below - np.float32(np.log(np.exp(below).sum(dtype=np.float64)))
        self._below, self._num_top = below, min(top, len(below))

    def of(self, token_id: int) -> float:
        return float(self._logprobs[token_id])

    def top(self) -> tuple[tuple[int, float], ...]:
        """Best first; among equal logits the lower id first."""
        if not self._num_top:
            return ()
        ids = keep_candidates(self._below, top_k=self._num_top, top_p=1.0, min_p=0.0)
        kept = np.arange(len(self._below)) if ids is None else ids
        ranked = kept[np.argsort(-self._below[kept], kind="stable")]
        return tuple((int(token), float(self._logprobs[token])) for token in ranked)
