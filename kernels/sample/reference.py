"""What ``sample`` computes, in plain Python integers and full sorts; and the launcher's arguments served row by row."""

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import torch

from biphase.kernels.sample.buffers import SampleOut, SampleWorkspace
from biphase.kernels.sample.draw_row import DrawRow
from biphase.kernels.sample.edits import edit
from biphase.kernels.sample.filters import keep_candidates
from biphase.kernels.sample.logprobs import RowLogprobs
from biphase.kernels.sample.noise import GumbelBits, gumbel
from biphase.kernels.sample.params import SampleParams

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
    allowed_ids: Sequence[int] | None = None,
    repetition_penalty: float = 1.0,
    frequency_penalty: float = 0.0,
    presence_penalty: float = 0.0,
    prompt_ids: Sequence[int] = (),
    output_ids: Sequence[int] = (),
    logit_bias: tuple[tuple[int, float], ...] = (),
) -> int:
    """The token that ``sample`` draws from one row of logits; see there for the order of edits and filters."""
    logits = logits.copy()
    for token in {*prompt_ids, *output_ids}:
        penalty = np.float32(repetition_penalty)
        logits[token] = logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
    for token, count in Counter(output_ids).items():
        logits[token] -= np.float32(frequency_penalty) * np.float32(count) + np.float32(presence_penalty)
    for token, value in logit_bias:
        logits[token] += np.float32(value)
    whole = range(len(logits)) if allowed_ids is None else sorted(allowed_ids)
    allowed = [token for token in whole if token not in forbid_ids]
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


def rows_reference(
    logits_RV: torch.Tensor,
    params: SampleParams,
    out: SampleOut,
    workspace: SampleWorkspace,
    *,
    late_ids: torch.Tensor | None = None,
    vocab_start: int = 0,
    reduce_max: Callable[[torch.Tensor], None] | None = None,
) -> None:
    """As ``triton_gpu.sample``, on any device; rows are read back and drawn one by one on the host."""
    logits = np.nan_to_num(logits_RV.float().cpu().numpy(), nan=-np.inf, posinf=np.inf, neginf=-np.inf)
    num_rows, vocab_size = logits.shape
    rows = [None if row is None else of_shard(row, vocab_start, vocab_size) for row in params.rows(late_ids)]
    rows = rows[:num_rows]
    raw = logits.copy()
    for row, draw in enumerate(rows):
        if draw is not None:
            edit(logits[row], draw)
    workspace.row_max[:num_rows] = torch.from_numpy(logits.max(axis=1))
    if reduce_max is not None:
        reduce_max(workspace.row_max[:num_rows])
    peaks = workspace.row_max[:num_rows].cpu().numpy()
    for row, draw in enumerate(rows):
        if draw is None:
            continue
        token, score = _best(logits[row], peaks[row], draw, vocab_start)
        out.token_ids[row], out.scores[row] = token, score
        if draw.logprobs is not None:
            of_row = RowLogprobs(raw[row], draw.logprobs)
            out.logprobs[row] = of_row.of(token)
            for place, (top_id, logprob) in enumerate(of_row.top()):
                out.top_ids[row, place], out.top_logprobs[row, place] = top_id, logprob


def _best(logits_V: np.ndarray, peak: np.float32, row: DrawRow, vocab_start: int) -> tuple[int, float]:
    """Global id and score."""
    if row.temperature == 0:
        best = int(np.argmax(logits_V))
        return vocab_start + best, float(logits_V[best])
    z = (logits_V - peak) / np.float32(row.temperature)
    kept = keep_candidates(z, top_k=row.top_k, top_p=row.top_p, min_p=row.min_p)
    ids = np.arange(len(z)) if kept is None else kept
    if not len(ids):
        return vocab_start, -math.inf
    bits = GumbelBits(seed=row.seed, branch=row.branch, position=row.position)
    scores = z[ids] + gumbel(bits.of(ids + vocab_start))
    best = int(np.argmax(scores))
    return vocab_start + int(ids[best]), float(scores[best])


def of_shard(row: DrawRow, vocab_start: int, vocab_size: int) -> DrawRow:
    """The row with the ids of one shard, counted from its start."""

    def own(ids: Sequence[int] | np.ndarray) -> np.ndarray:
        local = np.asarray(ids, dtype=np.int64) - vocab_start
        return local[(local >= 0) & (local < vocab_size)]

    return dataclasses.replace(
        row,
        prompt_ids=own(row.prompt_ids),
        output_ids=own(row.output_ids),
        forbid_ids=tuple(own(row.forbid_ids).tolist()),
        logit_bias=tuple((t - vocab_start, v) for t, v in row.logit_bias if 0 <= t - vocab_start < vocab_size),
    )
