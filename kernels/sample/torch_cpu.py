"""Sampling on the CPU: one argmax for the greedy rows, one Gumbel-max draw per sampled row.

The draw needs no random state: its noise is a function of (seed, branch, output position, token id), so a token does
not depend on what shares the batch, and a replay draws the same.
"""

from collections.abc import Sequence

import numpy as np
import torch

from biphase.kernels.sample.draw_row import Drawn, DrawRow
from biphase.kernels.sample.edits import edit
from biphase.kernels.sample.filters import keep_candidates
from biphase.kernels.sample.logprobs import RowLogprobs
from biphase.kernels.sample.noise import MAX_NOISE, GumbelBits, gumbel, least_word

_FEW = 512
"""Up to this many candidates the noise of all is computed."""
_LOUD_NOISE = 5.0
"""One token in 150 has more noise than this."""
_LOUD_WORD = np.uint64(least_word(_LOUD_NOISE))


def sample(logits_RV: torch.Tensor, rows: Sequence[DrawRow]) -> list[int]:
    """One token id per row; ``logits`` [rows, vocab] float32 contiguous, edited rows are overwritten.

    Order: penalties, bias, what is not allowed, temperature, top-k, top-p over what is left, min-p, then argmax of
    (logit - max) / temperature + noise. Ties go to the lowest id.
    """
    for row, draw in enumerate(rows):
        if draw.edited:
            edit(logits_RV[row].numpy(), draw)
    best: list[int] = logits_RV.argmax(dim=-1).tolist()
    logits = logits_RV.numpy()
    return [
        token if draw.temperature == 0 else _draw(logits[row], token, draw)
        for row, (token, draw) in enumerate(zip(best, rows, strict=True))
    ]


def sample_with_logprobs(logits_RV: torch.Tensor, rows: Sequence[DrawRow]) -> list[Drawn]:
    """As ``sample``, with the log-probabilities that rows ask for."""
    logits = logits_RV.numpy()
    asked = [
        None if draw.logprobs is None else RowLogprobs(logits[row], draw.logprobs) for row, draw in enumerate(rows)
    ]
    return [
        Drawn(token_id=token) if of_row is None else Drawn(token_id=token, logprob=of_row.of(token), top=of_row.top())
        for token, of_row in zip(sample(logits_RV, rows), asked, strict=True)
    ]


def _draw(logits_V: np.ndarray, best: int, draw: DrawRow) -> int:
    z = (logits_V - logits_V[best]) / np.float32(draw.temperature)
    bits = GumbelBits(seed=draw.seed, branch=draw.branch, position=draw.position)
    ids = keep_candidates(z, top_k=draw.top_k, top_p=draw.top_p, min_p=draw.min_p)
    if ids is None:
        return _loudest(z, bits.first(len(z)))
    if len(ids) <= _FEW:
        return int(ids[np.argmax(z[ids] + gumbel(bits.of(ids)))])
    return int(ids[_loudest(z[ids], bits.of(ids))])


def _loudest(z: np.ndarray, words: np.ndarray) -> int:
    """Index of the largest ``z + gumbel(words)``, the lowest of equals; ``z`` is at most 0, and 0 somewhere.

    Only those can win whose noise makes up for their distance to the best, so few need their noise computed: a score
    that some token reaches is a bound on the noise of whatever beats it.
    """
    loud = np.flatnonzero(words >= _LOUD_WORD)
    probes = np.append(loud, np.argmax(z))
    reached = float((z[probes] + gumbel(words[probes])).max())
    able = loud if reached >= _LOUD_NOISE + 0.01 else np.flatnonzero(words >= np.uint64(least_word(reached)))
    able = able[z[able] >= reached - MAX_NOISE]
    return int(able[np.argmax(z[able] + gumbel(words[able]))])
