"""A step plan as rows of numbers: which row holds which token, where its k and v go, which rows draw. numpy only.

Row order: sequences with one token (decode rows), then the tokens of the chunks, packed. Where every sequence has one
token and draws, the step is one that a graph was captured for, padded to its bucket.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from biphase.engine.gpu.step_inputs import HostInputs
from biphase.engine.step import SeqStep, StepPlan
from biphase.protos.ids import SeqId


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRows:
    """``singles`` and ``chunks``: indices in the plan, in row order. ``drawing``: those that sample, in the order of the
    rows of logits. ``graph``: all are singles that sample. Lengths of the chunks: their tokens, and with their context.
    """

    num_rows: int
    singles: tuple[int, ...]
    chunks: tuple[int, ...]
    drawing: tuple[int, ...]
    chunk_lens: tuple[int, ...]
    chunk_contexts: tuple[int, ...]
    graph: bool

    @property
    def num_seqs(self) -> int:
        return len(self.singles) + len(self.chunks)


def rows_of(plan: StepPlan) -> StepRows:
    """Which rows a plan has."""
    singles = tuple(i for i, seq in enumerate(plan.seqs) if len(seq.token_ids) == 1)
    chunks = tuple(i for i, seq in enumerate(plan.seqs) if len(seq.token_ids) > 1)
    drawing = tuple(i for i in (*singles, *chunks) if plan.seqs[i].sampling is not None)
    chunk_lens = tuple(len(plan.seqs[i].token_ids) for i in chunks)
    return StepRows(
        num_rows=len(singles) + sum(chunk_lens),
        singles=singles,
        chunks=chunks,
        drawing=drawing,
        chunk_lens=chunk_lens,
        chunk_contexts=tuple(plan.seqs[i].start + count for i, count in zip(chunks, chunk_lens, strict=True)),
        graph=not chunks and len(drawing) == len(singles),
    )


def fill(
    host: HostInputs, plan: StepPlan, rows: StepRows, drawn_rows: Mapping[SeqId, int], *, block_size: int, padded: int
) -> None:
    """Write the step into pinned memory; rows up to ``padded`` become padding. ``drawn_rows``: where the last launched
    step put what it drew for a sequence."""
    for row, i in enumerate(rows.singles):
        seq = plan.seqs[i]
        host.token_ids[row] = seq.token_ids[0]
        host.sources[row] = _source(seq, drawn_rows)
        host.positions[row] = seq.start
        host.slots[row] = seq.blocks[seq.start // block_size] * block_size + seq.start % block_size
        host.context_lens[row] = seq.start + 1
        count = seq.start // block_size + 1
        host.block_tables[row, :count] = seq.blocks[:count]
    count = len(rows.singles)
    if padded > rows.num_rows:
        host.token_ids[rows.num_rows : padded] = 0
        host.sources[rows.num_rows : padded] = -1
        host.positions[rows.num_rows : padded] = 0
        host.slots[rows.num_rows : padded] = -1
        host.context_lens[rows.num_rows : padded] = 0
    num_decode = padded if rows.graph else count
    host.query_starts[: num_decode + 1] = np.arange(num_decode + 1)
    ends = _fill_chunks(host, plan, rows, block_size)
    if not rows.graph:
        position = {i: row for row, i in enumerate(rows.singles)} | ends
        host.sampled_rows[: len(rows.drawing)] = [position[i] for i in rows.drawing]


def _fill_chunks(host: HostInputs, plan: StepPlan, rows: StepRows, block_size: int) -> dict[int, int]:
    """The chunks' rows; returns each one's last row."""
    ends = {}
    at = len(rows.singles)
    for n, (i, length) in enumerate(zip(rows.chunks, rows.chunk_lens, strict=True), start=len(rows.singles)):
        seq = plan.seqs[i]
        positions = np.arange(seq.start, seq.start + length)
        count = int(positions[-1]) // block_size + 1
        table = np.asarray(seq.blocks[:count], dtype=np.int64)
        host.token_ids[at : at + length] = seq.token_ids
        host.sources[at : at + length] = -1
        host.positions[at : at + length] = positions
        host.slots[at : at + length] = table[positions // block_size] * block_size + positions % block_size
        host.block_tables[n, :count] = table
        at += length
        ends[i] = at - 1
    return ends


def _source(seq: SeqStep, drawn_rows: Mapping[SeqId, int]) -> int:
    """Where the step before failed to launch, nothing was drawn: the scheduler ends that sequence and drops this token,
    so any input will do, and the others of this step are spared."""
    return drawn_rows.get(seq.seq_id, -1) if seq.continues else -1
