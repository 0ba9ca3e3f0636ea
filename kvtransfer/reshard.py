"""Which rank of a decode instance takes what from which rank of a prefill instance. Pure.

Any plan to any other: layers and heads are intersected, so there is at most one box per pair of ranks. Where the source
holds a KV head on several ranks (more places than heads), each element is read once, from one of them: what is wanted of
that head is laid out in a line, target after target, and the line cut into equal parts, one per replica. Cuts lie at
multiples of the source's block size, so that every piece but the last is made of whole blocks there.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from biphase.kernels.kv_layout import KvBox
from biphase.protos.parallel_plan import ParallelPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class KvShape:
    """How one instance holds KV: layers and heads of the whole model over the ranks of ``plan``."""

    plan: ParallelPlan
    num_layers: int
    num_kv_heads: int
    block_size: int

    def box(self, rank: int, num_tokens: int) -> KvBox:
        """All that a rank holds of a request's first ``num_tokens`` tokens."""
        layers = self.plan.layers_of(rank, self.num_layers)
        heads = self.plan.kv_heads_of(rank, self.num_kv_heads)
        return KvBox(
            layer_start=layers.start,
            layer_end=layers.stop,
            head_start=heads.start,
            head_end=heads.stop,
            token_start=0,
            token_end=num_tokens,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """``target_rank`` reads ``box`` from ``source_rank``."""

    source_rank: int
    target_rank: int
    box: KvBox


def moves(source: KvShape, target: KvShape, num_tokens: int, turn: int = 0) -> list[Move]:
    """All moves of one request, at most one per pair, by target and then source.

    ``turn`` (any number that differs between requests) says which replica comes first, so that the rounding of cuts falls
    on another one each time. Raises ValueError for shapes of different models.
    """
    ours, theirs = (target.num_layers, target.num_kv_heads), (source.num_layers, source.num_kv_heads)
    if ours != theirs:
        raise ValueError(f"{theirs[0]} layers of {theirs[1]} KV heads against {ours[0]} of {ours[1]}")
    wanted = [(rank, target.box(rank, num_tokens)) for rank in range(target.plan.num_ranks)]
    found: list[Move] = []
    for replicas in _replicas(source):
        held = source.box(replicas[0], num_tokens)
        jobs = [(rank, common) for rank, box in wanted if (common := _common(held, box)) is not None]
        first = turn % len(replicas)
        found += _shared(jobs, (*replicas[first:], *replicas[:first]), source.block_size)
    return sorted(found, key=lambda move: (move.target_rank, move.source_rank))


def _replicas(shape: KvShape) -> list[tuple[int, ...]]:
    """The ranks, those that hold the same together."""
    groups: dict[KvBox, tuple[int, ...]] = {}
    for rank in range(shape.plan.num_ranks):
        box = shape.box(rank, 1)
        groups[box] = (*groups.get(box, ()), rank)
    return list(groups.values())


def _shared(jobs: Sequence[tuple[int, KvBox]], replicas: Sequence[int], block_size: int) -> list[Move]:
    """The jobs (target rank, box) over ranks that hold the same, as evenly as whole blocks allow."""
    total = sum(_volume(box) for _, box in jobs)
    found: list[Move] = []
    before = 0
    for target_rank, box in jobs:
        block = box.num_layers * box.num_heads * block_size
        token = box.token_start
        for index, source_rank in enumerate(replicas, start=1):
            if index == len(replicas):
                cut = box.token_end
            else:
                share = total * index - before * len(replicas)  # to where its part of the line ends, times replicas
                blocks = (2 * share // (block * len(replicas)) + 1) // 2  # the nearest cut
                cut = min(box.token_end, max(token, box.token_start + blocks * block_size))
            if cut > token:
                part = KvBox(
                    layer_start=box.layer_start,
                    layer_end=box.layer_end,
                    head_start=box.head_start,
                    head_end=box.head_end,
                    token_start=token,
                    token_end=cut,
                )
                found.append(Move(source_rank=source_rank, target_rank=target_rank, box=part))
                token = cut
        before += _volume(box)
    return found


def _common(left: KvBox, right: KvBox) -> KvBox | None:
    box = KvBox(
        layer_start=max(left.layer_start, right.layer_start),
        layer_end=min(left.layer_end, right.layer_end),
        head_start=max(left.head_start, right.head_start),
        head_end=min(left.head_end, right.head_end),
        token_start=max(left.token_start, right.token_start),
        token_end=min(left.token_end, right.token_end),
    )
    return box if min(box.num_layers, box.num_heads, box.num_tokens) > 0 else None


def _volume(box: KvBox) -> int:
    return box.num_layers * box.num_heads * box.num_tokens
