"""One step as tensors: which tokens, where their k and v go, who attends to what, which columns are sampled.

Made once per step and used by every layer. Token order: single tokens by falling context length, then chunks.
"""

from dataclasses import dataclass

import torch

from biphase.engine.step import SeqStep, StepPlan
from biphase.kernels.decode_attention import DecodeBatch
from biphase.kernels.kv_layout import KvLayout
from biphase.kernels.ops import Kernels
from biphase.kernels.prefill_attention import PrefillChunk
from biphase.protos.errors import InvalidRequest


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
        num_heads: int,
        num_blocks: int,
        vocab_size: int,
        max_model_len: int,
        sliding_window: int | None,
    ) -> None:
        self._kernels = kernels
        self._layout = layout
        self._num_heads = num_heads
        self._num_blocks = num_blocks
        self._vocab_size = vocab_size
        self._max_model_len = max_model_len
        self._window = sliding_window
        self._gather_buffer = torch.empty(0)

    def build(self, plan: StepPlan) -> StepBatch:
        """Raises InvalidRequest, naming value and limit, for a plan that cannot be computed."""
        if not plan.seqs:
            raise InvalidRequest("the step plan is empty, at least 1 sequence is needed")
        for seq in plan.seqs:
            self._check(seq)
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
        if not 0 <= int(ids.min()) <= int(ids.max()) < self._vocab_size:
            bad = next(token for token in token_ids if not 0 <= token < self._vocab_size)
            raise InvalidRequest(f"token id {bad} is outside the vocabulary of {self._vocab_size}")
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

    def _check(self, seq: SeqStep) -> None:
        count = len(seq.token_ids)
        end = seq.start + count
        if count < 1:
            raise InvalidRequest(f"sequence {seq.seq_id} has {count} tokens in the step, at least 1 is needed")
        if seq.start < 0:
            raise InvalidRequest(f"sequence {seq.seq_id} starts at {seq.start}, the first position is 0")
        if end > self._max_model_len:
            raise InvalidRequest(f"sequence {seq.seq_id} reaches {end} tokens, the context holds {self._max_model_len}")
        needed = self._layout.blocks_for(end)
        if len(seq.blocks) < needed:
            raise InvalidRequest(f"sequence {seq.seq_id} has {len(seq.blocks)} blocks, {end} tokens need {needed}")
        if min(seq.blocks) < 0 or max(seq.blocks) >= self._num_blocks:
            bad = next(block for block in seq.blocks if not 0 <= block < self._num_blocks)
            raise InvalidRequest(f"sequence {seq.seq_id} has block {bad}, the pool holds 0 .. {self._num_blocks - 1}")
        for token in seq.forbid_ids:
            if not 0 <= token < self._vocab_size:
                raise InvalidRequest(f"forbidden token id {token} is outside the vocabulary of {self._vocab_size}")
        if seq.sampling is not None and not seq.sampling.temperature >= 0:
            raise InvalidRequest(f"temperature is {seq.sampling.temperature}, must be at least 0")
