"""Cutting a request's KV into pieces, and counting them at the other end. Pure."""

from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from itertools import pairwise, product

from biphase.kernels.kv_layout import KvBox, KvLayout

_COPY_PRICE = 0.05
"""What one strided copy costs beside its bytes, in units of what one message costs beside its bytes."""


def split(layout: KvLayout, box: KvBox, max_bytes: int, *, by_block: bool = False) -> Iterator[KvBox]:
    """Disjoint boxes that make up ``box``, each of at most ``max_bytes``, earlier tokens first.

    Cuts tokens at block boundaries where a block of one layer fits, and groups layers. A single token of a single
    layer and head is never cut, whatever its size. ``by_block``: no piece spans blocks, so that the pool has few runs of
    it: one per layer where it has all heads.
    """
    if box.num_tokens == 0 or box.num_layers == 0 or box.num_heads == 0:
        return
    row_bytes = 2 * layout.head_dim * layout.itemsize
    heads = min(box.num_heads, max(1, max_bytes // row_bytes))
    rows = max(1, max_bytes // (row_bytes * heads))  # token x layer pairs that fit
    size = layout.block_size
    tokens = min(rows, size) if by_block else _blocks_across(box.num_layers, rows // size) * size or min(rows, size)
    token = box.token_start
    while token < box.token_end:
        stop = min(box.token_end, token + tokens)
        if by_block:
            stop = min(stop, token - token % size + size)
        aligned = stop - stop % size
        if stop < box.token_end and aligned > token:
            stop = aligned
        layers = min(box.num_layers, rows // (stop - token))
        layers = -(-box.num_layers // -(-box.num_layers // layers))  # as few groups, and those of like size
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


@lru_cache
def _blocks_across(num_layers: int, most: int) -> int:
    """How many blocks one piece spans where ``most`` block x layer pairs fit; 0 where none does.

    Scattered blocks are copied one by one, all layers of a piece at once, and each copy has its price beside its bytes:
    so few blocks and many layers, as long as that takes hardly more pieces.
    """

    def price(blocks: int) -> float:
        groups = -(-num_layers // (most // blocks))
        return groups / blocks + groups * _COPY_PRICE

    return min(range(1, most + 1), key=price, default=0)


def contains(outer: KvBox, inner: KvBox) -> bool:
    """Whether ``inner`` is a box (no empty or inverted range) inside ``outer``."""
    return (
        outer.layer_start <= inner.layer_start < inner.layer_end <= outer.layer_end
        and outer.head_start <= inner.head_start < inner.head_end <= outer.head_end
        and outer.token_start <= inner.token_start < inner.token_end <= outer.token_end
    )


class Coverage:
    """Which part of a box has arrived: disjoint boxes whose volumes sum to the whole cover every element once.

    Pieces of the same tokens lie in one column; few columns overlap one another, and few pieces lie in each.
    """

    def __init__(self, whole: KvBox) -> None:
        self.whole = whole
        self.num_pieces = 0
        self._volume = 0
        self._columns: dict[tuple[int, int], list[KvBox]] = {}
        self._order: list[tuple[int, int]] = []  # of the columns, by their first token
        self._widest = 0

    def add(self, box: KvBox) -> bool:
        """``box`` has arrived: True, or False (and nothing changes) where it lies outside or overlaps what has."""
        if not self.is_free(box):
            return False
        column = (box.token_start, box.token_end)
        if column not in self._columns:
            self._columns[column] = []
            insort(self._order, column)
            self._widest = max(self._widest, box.num_tokens)
        self._columns[column].append(box)
        self.num_pieces += 1
        self._volume += _volume(box)
        return True

    def is_free(self, box: KvBox) -> bool:
        """Whether ``box`` lies inside and nothing of it has arrived."""
        if not contains(self.whole, box):
            return False
        return not any(_meets_any(box, column) for column in self._meeting(box.token_start, box.token_end))

    @property
    def complete(self) -> bool:
        return self._volume == _volume(self.whole)

    def missing(self) -> list[KvBox]:
        """Disjoint boxes that make up what has not arrived."""
        if self.complete:
            return []
        whole = self.whole
        pieces = [piece for column in self._columns.values() for piece in column]
        layers = _cuts(whole.layer_start, whole.layer_end, [(p.layer_start, p.layer_end) for p in pieces])
        heads = _cuts(whole.head_start, whole.head_end, [(p.head_start, p.head_end) for p in pieces])
        tokens = _cuts(whole.token_start, whole.token_end, list(self._columns))
        near = {cut: [piece for column in self._meeting(*cut) for piece in column] for cut in tokens}
        boxes: list[KvBox] = []
        for (layer_start, layer_end), (head_start, head_end), (token_start, token_end) in product(
            layers, heads, tokens
        ):
            cell = KvBox(
                layer_start=layer_start,
                layer_end=layer_end,
                head_start=head_start,
                head_end=head_end,
                token_start=token_start,
                token_end=token_end,
            )
            if any(contains(piece, cell) for piece in near[token_start, token_end]):
                continue
            joined = _join(boxes[-1], cell) if boxes else None
            if joined is not None:
                boxes[-1] = joined
            else:
                boxes.append(cell)
        return boxes

    def _meeting(self, token_start: int, token_end: int) -> Iterator[list[KvBox]]:
        """The columns that have some of these tokens."""
        first = bisect_left(self._order, (token_start - self._widest, 0))
        last = bisect_left(self._order, (token_end, 0))
        return (self._columns[column] for column in self._order[first:last] if column[1] > token_start)


def _cuts(start: int, end: int, ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The ranges between any two neighbouring ends."""
    return list(pairwise(sorted({start, end, *(bound for bounds in ranges for bound in bounds)})))


def _meets_any(box: KvBox, others: list[KvBox]) -> bool:
    """Whether layers and heads of ``box`` overlap those of any other; the tokens are known to."""
    layer_start, layer_end, head_start, head_end = box.layer_start, box.layer_end, box.head_start, box.head_end
    return any(
        other.layer_start < layer_end
        and layer_start < other.layer_end
        and other.head_start < head_end
        and head_start < other.head_end
        for other in others
    )


def _join(left: KvBox, right: KvBox) -> KvBox | None:
    """The two as one box, where ``right`` continues ``left`` along tokens."""
    whole = replace(left, token_end=right.token_end)
    continues = left.token_end == right.token_start and whole == replace(right, token_start=left.token_start)
    return whole if continues else None


def _volume(box: KvBox) -> int:
    return box.num_layers * box.num_heads * box.num_tokens
