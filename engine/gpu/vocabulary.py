"""Embedding and head on a GPU: whole, or on each place of a stage the rows of its part of the vocabulary.

Shapes: N rows, F hidden, R sampled rows, V vocabulary, W the widest part of it, P places.
"""

import torch

from biphase.engine.checkpoint.shard import Shard
from biphase.engine.model_config import ModelConfig
from biphase.engine.parallel.tensor_group import TensorGroup
from biphase.kernels.ops import PagedKernels


class Vocabulary:
    """Owns ``logits`` [R, V], which every place of the last stage has whole: all of them draw, and draw the same."""

    def __init__(
        self,
        config: ModelConfig,
        tensors: dict[str, torch.Tensor],
        kernels: PagedKernels,
        shard: Shard,
        tp: TensorGroup | None,
        *,
        max_rows: int,
    ) -> None:
        """A first stage has the tensor ``embed``, a last one ``lm_head`` or, where they are one, ``embed``."""
        self._kernels = kernels
        self._tp = tp
        self._embed = tensors.get("embed")
        self._head = tensors.get("lm_head", self._embed) if "norm" in tensors else None
        self._ours = shard.vocabulary(config)
        self._sizes = shard.vocabulary_sizes(config)
        like = tensors["layers.0.attn_norm"]
        # rows of a vocabulary of any size begin at a multiple of 16 bytes
        self.logits = like.new_zeros(max_rows if self._head is not None else 0, _aligned(config.vocab_size))
        self.logits = self.logits[:, : config.vocab_size]
        width = 0 if tp is None or self._head is None else _aligned(max(self._sizes))
        self._part = like.new_zeros(max_rows, width)
        self._parts = like.new_zeros(len(self._sizes) * max_rows * width)

    def embed(self, token_ids: torch.Tensor, sources: torch.Tensor, drawn: torch.Tensor, out_NF: torch.Tensor) -> None:
        """As the op of that name."""
        table = self._embed
        assert table is not None
        if self._tp is None:
            self._kernels.embed(token_ids, sources, drawn, table, out_NF)
            return
        tokens = torch.where(sources >= 0, drawn[sources.clamp(min=0).long()], token_ids)
        rows = tokens - self._ours.start
        elsewhere = (rows < 0) | (rows >= len(self._ours))
        torch.index_select(table, 0, rows.masked_fill(elsewhere, 0), out=out_NF)
        # one place has a row, the others add zeros: the sum is exact
        self._tp.all_reduce(out_NF.masked_fill_(elsewhere.unsqueeze(1), 0.0))

    def head(self, normed_RF: torch.Tensor) -> None:
        """Logits of the rows into ``logits``."""
        count = normed_RF.shape[0]
        if self._tp is None:
            self._kernels.linear(normed_RF, self._head, self.logits[:count])
            return
        part_RW = self._part[:count]
        self._kernels.linear(normed_RF, self._head, part_RW[:, : len(self._ours)])
        parts_PRW = self._parts[: self._tp.size * part_RW.numel()].view(self._tp.size, *part_RW.shape)
        self._tp.all_gather(parts_PRW, part_RW)
        start = 0
        for place, size in enumerate(self._sizes):
            self.logits[:count, start : start + size] = parts_PRW[place, :, :size]
            start += size


def _aligned(num_columns: int) -> int:
    return -(-num_columns // 8) * 8
