"""One step as tensors: which tokens, where their k and v go, who attends to what, which columns are sampled.

Made once per step and used by every layer. Token order: single tokens by falling context length, then chunks.
"""

from dataclasses import dataclass

import torch

from biphase.engine.plan_limits import PlanLimits
from biphase.engine.step import SeqStep, StepPlan
from biphase.kernels.decode_attention import DecodeBatch
from biphase.kernels.kv_layout import KvLayout
from biphase.kernels.ops import Kernels
from biphase.kernels.prefill_attention import PrefillChunk


@dataclass(frozen=True, slots=True, kw_only=True)
class StepBatch:
    """N is the padded token count, M the real one; padding has token 0 at position 0 and writes nowhere."""

    token_ids: torch.Tensor
    """[N] int64."""
    positions: torch.Tensor
    """[N] float32."""
    cache_rows: torch.Tensor
    """[2 * kv_heads * M] int64, rows of a layer's pool by token."""
    decode: DecodeBatch | None
    chunks: tuple[PrefillChunk, ...]
    sampled_columns: torch.Tensor | None
    """[R] int64: the last token of each sequence that samples; None: none does."""
    sampled_seqs: tuple[int, ...]
    """Index in the plan of each sampled column's sequence."""

    @property
    def num_padded(self) -> int:
        return self.token_ids.shape[0]


class BatchBuilder:
    """Turns plans into batches; owns the gather buffer that all decode attention of this engine shares."""

    def __init__(
        self,
        *,
        kernels: Kernels,
        layout: KvLayout,
        limits: PlanLimits,
        num_heads: int,
        sliding_window: int | None,
    ) -> None:
        self._kernels = kernels
        self._layout = layout
        self._limits = limits
        self._num_heads = num_heads
        self._window = sliding_window
        self._gather_buffer = torch.empty(0)

    def build(self, plan: StepPlan) -> StepBatch:
        """Raises InvalidRequest, naming value and limit, for a plan that cannot be computed."""
        self._limits.check(plan)
        singles = [i for i, seq in enumerate(plan.seqs) if len(seq.token_ids) == 1]
        singles.sort(key=lambda i: -plan.seqs[i].start)
        order = [*singles, *(i for i, seq in enumerate(plan.seqs) if len(seq.token_ids) > 1)]

        block_size = self._layout.block_size
        token_ids: list[int] = []
        positions: list[int] = []
        blocks: list[int] = []
        columns: list[int] = []
        sampled: list[int] = []
        chunks: list[PrefillChunk] = []
        for i in order:
            seq = plan.seqs[i]
            count = len(seq.token_ids)
            if count > 1:
                chunks.append(self._chunk(seq, len(token_ids)))
            token_ids.extend(seq.token_ids)
            positions.extend(range(seq.start, seq.start + count))
            blocks.extend(seq.blocks[position // block_size] for position in range(seq.start, seq.start + count))
            if seq.sampling is not None:
                columns.append(len(token_ids) - 1)
                sampled.append(i)

        ids = torch.tensor(token_ids)
        num_tokens = len(token_ids)
        padding = (0, self._kernels.linear.padded_tokens(num_tokens) - num_tokens)
        places = torch.tensor(positions)
        return StepBatch(
            token_ids=torch.nn.functional.pad(ids, padding),
            positions=torch.nn.functional.pad(places, padding).float(),
            cache_rows=self._kernels.rope_and_cache.cache_rows(
                torch.tensor(blocks), places % block_size, self._layout.num_kv_heads, block_size
            ),
            decode=self._decode([plan.seqs[i] for i in singles]) if singles else None,
            chunks=tuple(chunks),
            sampled_columns=torch.tensor(columns) if columns else None,
            sampled_seqs=tuple(sampled),
        )

    def _decode(self, seqs: list[SeqStep]) -> DecodeBatch:
        batch: DecodeBatch
        batch, self._gather_buffer = self._kernels.decode_attention.plan_decode(
            [seq.blocks for seq in seqs],
            [seq.start + 1 for seq in seqs],
            num_heads=self._num_heads,
            num_kv_heads=self._layout.num_kv_heads,
            block_size=self._layout.block_size,
            head_dim=self._layout.head_dim,
            window=self._window,
            scratch=self._gather_buffer,
        )
        return batch

    def _chunk(self, seq: SeqStep, start: int) -> PrefillChunk:
        chunk: PrefillChunk = self._kernels.prefill_attention.plan_prefill(
            seq.blocks,
            start=start,
            position=seq.start,
            count=len(seq.token_ids),
            num_kv_heads=self._layout.num_kv_heads,
            block_size=self._layout.block_size,
            window=self._window,
        )
        return chunk
