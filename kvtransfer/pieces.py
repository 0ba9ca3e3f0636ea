"""Cutting a request's KV into pieces, and counting them at the other end. Pure."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from biphase.kernels.kv_layout import KvBox, KvLayout


def split(layout: KvLayout, box: KvBox, max_bytes: int) -> Iterator[KvBox]:
    """Disjoint boxes that make up ``box``, each of at most ``max_bytes``, earlier tokens first.

    Cuts tokens (at block boundaries where a block fits) until one layer fits, then groups layers. A single token of a
    single layer and head is never cut, whatever its size.
    """
    if box.num_tokens == 0 or box.num_layers == 0 or box.num_heads == 0:
        return
    row_bytes = 2 * layout.head_dim * layout.itemsize
    heads = min(box.num_heads, max(1, max_bytes // row_bytes))
    tokens = max(1, max_bytes // (row_bytes * heads))
    token = box.token_start
    while token < box.token_end:
        stop = min(box.token_end, token + tokens)
        aligned = stop - stop % layout.block_size
        if stop < box.token_end and aligned > token:
            stop = aligned
        layers = max(1, max_bytes // (row_bytes * heads * (stop - token)))
        for layer in range(box.layer_start, box.layer_end, layers):
            for head in range(box.head_start, box.head_end, heads):
                yield KvBox(
                    layer_start=layer,
                    layer_end=min(box.layer_end, layer + layers),
                    head_start=head,
                    head_end=min(box.head_end, head + heads),
                    token_start=token,
                    token_end=stop,
                )
        token = stop


def contains(outer: KvBox, inner: KvBox) -> bool:
    """Whether ``inner`` is a box (no empty or inverted range) inside ``outer``."""
    return (
        outer.layer_start <= inner.layer_start < inner.layer_end <= outer.layer_end
        and outer.head_start <= inner.head_start < inner.head_end <= outer.head_end
        and outer.token_start <= inner.token_start < inner.token_end <= outer.token_end
    )


class Coverage:
    """Which part of a box has arrived: disjoint boxes whose volumes sum to the whole cover every element once."""

    def __init__(self, whole: KvBox) -> None:
        self.whole = whole
        self.num_pieces = 0
        self._volume = 0
        self._lows = np.empty((16, 3), dtype=np.int64)
        self._highs = np.empty((16, 3), dtype=np.int64)

    def overlaps(self, box: KvBox) -> bool:
        """Whether any element of ``box`` has already arrived."""
        low, high = _corners(box)
        lows, highs = self._lows[: self.num_pieces], self._highs[: self.num_pieces]
        return bool(((lows < high) & (highs > low)).all(axis=1).any())

    def add(self, box: KvBox) -> None:
        """``box`` has arrived. Raises ValueError when it lies outside or overlaps."""
        if not contains(self.whole, box) or self.overlaps(box):
            raise ValueError(f"{box} lies outside {self.whole} or overlaps what has arrived")
        if self.num_pieces == len(self._lows):
            self._lows = np.concatenate([self._lows, np.empty_like(self._lows)])
            self._highs = np.concatenate([self._highs, np.empty_like(self._highs)])
        self._lows[self.num_pieces], self._highs[self.num_pieces] = _corners(box)
        self.num_pieces += 1
        self._volume += _volume(box)

    @property
    def complete(self) -> bool:
        return self._volume == _volume(self.whole)

    def missing(self) -> list[KvBox]:
        """Disjoint boxes that make up what has not arrived."""
        if self.complete:
            return []
        low, high = _corners(self.whole)
        cuts = [
            np.unique(np.concatenate([[low[axis], high[axis]], self._lows[: self.num_pieces, axis],
                                      self._highs[: self.num_pieces, axis]]))
            for axis in range(3)
        ]  # fmt: skip
        arrived = np.zeros([len(cut) - 1 for cut in cuts], dtype=bool)
        for piece in range(self.num_pieces):
            spans = [
                slice(*np.searchsorted(cuts[axis], [self._lows[piece, axis], self._highs[piece, axis]]))
                for axis in range(3)
            ]
            arrived[tuple(spans)] = True
        boxes: list[KvBox] = []
        for layer, head, token in np.argwhere(~arrived).tolist():
            cell = KvBox(
                layer_start=int(cuts[0][layer]),
                layer_end=int(cuts[0][layer + 1]),
                head_start=int(cuts[1][head]),
                head_end=int(cuts[1][head + 1]),
                token_start=int(cuts[2][token]),
                token_end=int(cuts[2][token + 1]),
            )
            joined = _join(boxes[-1], cell) if boxes else None
            if joined is not None:
                boxes[-1] = joined
            else:
                boxes.append(cell)
        return boxes


def _join(left: KvBox, right: KvBox) -> KvBox | None:
    """The two as one box, where ``right`` continues ``left`` along tokens."""
    whole = replace(left, token_end=right.token_end)
    continues = left.token_end == right.token_start and whole == replace(right, token_start=left.token_start)
    return whole if continues else None


def _corners(box: KvBox) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    return (box.layer_start, box.head_start, box.token_start), (box.layer_end, box.head_end, box.token_end)


def _volume(box: KvBox) -> int:
    return box.num_layers * box.num_heads * box.num_tokens
