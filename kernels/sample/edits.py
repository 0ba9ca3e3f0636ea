"""Edits of a row's logits before the draw, in float32: penalties, then bias, then what is not allowed at all."""

import numpy as np

from biphase.kernels.sample.draw_row import DrawRow


def edit(logits_V: np.ndarray, row: DrawRow) -> None:
    """In place. The order matters for the repetition penalty alone, which multiplies: a bias keeps its full weight."""
    if row.penalised:
        _penalise(logits_V, row)
    if row.logit_bias:
        ids, values = zip(*row.logit_bias, strict=True)
        logits_V[list(ids)] += np.asarray(values, dtype=np.float32)
    if row.allowed is not None:
        logits_V[~allowed_tokens(row.allowed, len(logits_V))] = -np.inf
    if row.forbid_ids:
        logits_V[list(row.forbid_ids)] = -np.inf


def allowed_tokens(words: np.ndarray, vocab_size: int) -> np.ndarray:
    """The bitmask as booleans [vocab]."""
    bits = np.unpackbits(np.ascontiguousarray(words, dtype="<i4").view(np.uint8), bitorder="little")
    return bits[:vocab_size].astype(bool)


def allowed_words(token_ids: np.ndarray, vocab_size: int) -> np.ndarray:
    """The bitmask, int32 words [ceil(vocab / 32)], that allows ``token_ids``."""
    bits = np.zeros(-(-vocab_size // 32) * 32, dtype=np.uint8)
    bits[token_ids] = 1
    return np.packbits(bits, bitorder="little").view("<i4")


def _penalise(logits_V: np.ndarray, row: DrawRow) -> None:
    output = np.asarray(row.output_ids, dtype=np.int64)
    if row.repetition_penalty != 1:
        seen = np.unique(np.concatenate((np.asarray(row.prompt_ids, dtype=np.int64), output)))
        penalty, of_seen = np.float32(row.repetition_penalty), logits_V[seen]
        logits_V[seen] = np.where(of_seen > 0, of_seen / penalty, of_seen * penalty)
    if row.frequency_penalty or row.presence_penalty:
        ids, counts = np.unique(output, return_counts=True)
        by_count = np.float32(row.frequency_penalty) * counts.astype(np.float32)
        logits_V[ids] -= by_count + np.float32(row.presence_penalty)
