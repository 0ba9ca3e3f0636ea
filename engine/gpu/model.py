"""The forward pass on a GPU: token-major activations in buffers that never move, about ten launches per layer.

Shapes: N rows of the step (decode tokens first, then the chunks' tokens, packed), F hidden, H query heads, K kv heads,
D head_dim, I intermediate, R sampled rows, V vocabulary. Per layer of a decode step: norm (fused with the residual sum),
q/k/v product, rotation fused with the cache write, attention and its reduction, output product, norm, gate/up product,
SiLU, down product.

One rank of several runs its stage's layers on its place's heads and features. Sums over the places are part of the pass,
and of a graph; what passes between stages is not, since a graph would wait for it with everything behind it in the queue.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from biphase.engine.checkpoint.shard import Shard
from biphase.engine.gpu.feed_forward import feed_forward_of
from biphase.engine.gpu.step_inputs import StepInputs
from biphase.engine.gpu.vocabulary import Vocabulary
from biphase.engine.model_config import ModelConfig
from biphase.engine.parallel.group import RankGroups
from biphase.engine.parallel.local_config import layer_marks, local_config
from biphase.kernels.kv_layout import KvLayout
from biphase.kernels.kv_pack.gpu_memory import GpuKvMemory
from biphase.kernels.ops import PagedKernels


@dataclass(frozen=True, slots=True, kw_only=True)
class StepShape:
    """What a step's launches depend on; everything else is in device buffers.

    ``num_decode``: the first rows, one token each of as many sequences, padding included. ``prefill``: the plan of the
    rows behind them, None without. ``num_sampled``: rows of logits; ``gather``: they are ``sampled_rows``, else the
    first rows.
    """

    num_rows: int
    num_decode: int
    prefill: Any
    num_sampled: int
    gather: bool


class GpuModel:
    """Weights, KV pool, activations. One thread uses it; it changes the pool and its buffers only."""

    def __init__(
        self,
        config: ModelConfig,
        tensors: dict[str, torch.Tensor],
        kernels: PagedKernels,
        *,
        layout: KvLayout,
        max_rows: int,
        max_seqs: int,
        max_model_len: int,
        device: torch.device,
        groups: RankGroups | None = None,
    ) -> None:
        """``config`` of the whole model; ``layout`` and ``tensors``, as engine.checkpoint names them, on the device, of
        this rank. The pool comes later: see ``bind_pool``."""
        shard = Shard.whole() if groups is None else Shard(plan=groups.plan, rank=groups.rank)
        config = local_config(config, shard.plan, shard.rank)
        dtype = tensors["layers.0.attn_norm"].dtype
        heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.config = config
        self.kernels = kernels
        self._tensors = tensors
        self._layout = layout
        self._device = device
        self._pool = torch.empty(0)
        self._kv_scales: torch.Tensor | None = None
        self._table = kernels.rotation_table(config.rope.inverse_frequencies(), max_model_len, device)
        self._scale = dim**-0.5
        self._marks = layer_marks(config.num_layers)
        self._tp = None if groups is None else groups.tp
        self._previous = None if groups is None else groups.previous
        self._next = None if groups is None else groups.next
        self._vocabulary = Vocabulary(config, tensors, kernels, shard, self._tp, max_rows=max_seqs)

        def rows(features: int, count: int = max_rows) -> torch.Tensor:
            return torch.zeros(count, features, dtype=dtype, device=device)

        self._residual = rows(config.hidden_size)
        self._normed = rows(config.hidden_size)
        self._hidden = rows(config.hidden_size)
        self._qkv = rows((heads + 2 * kv_heads) * dim)
        self._attended = rows(heads * dim)
        self._feed_forward = feed_forward_of(config, tensors, kernels, max_rows, shard.experts(config))
        self.logits = self._vocabulary.logits
        self.workspace = kernels.decode_workspace(
            max_seqs=max_seqs,
            max_query_len=1,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=dim,
            block_size=layout.block_size,
            kv_dtype=getattr(torch, layout.dtype),
            device=device,
            window=config.sliding_window,
        )

    @property
    def is_last_stage(self) -> bool:
        return self._next is None

    def bind_pool(self, num_blocks: int) -> GpuKvMemory:
        """Allocate the KV pool ``[layers, blocks, 2, K, block_size, D]``.

        A transfer waits for nothing: it reads tokens whose step is over, and writes blocks that no step has.
        """
        shape, dtype = self._layout.pool_shape(num_blocks), getattr(torch, self._layout.dtype)
        self._pool = torch.zeros(shape, dtype=dtype, device=self._device)
        if self._layout.kv_scales is not None:
            self._kv_scales = torch.tensor(self._layout.kv_scales, dtype=torch.float32, device=self._device)
        return GpuKvMemory(self._pool, self._layout)

    def plan_prefill(
        self, inputs: StepInputs, chunk_lens: Sequence[int], contexts: Sequence[int], num_decode: int
    ) -> Any:
        """Tiles of the chunks, whose rows and block tables lie behind those of ``num_decode`` decode sequences."""
        tables = inputs.block_tables[num_decode : num_decode + len(chunk_lens)]
        return self.kernels.plan_prefill(
            chunk_lens,
            contexts,
            tables,
            self._pool[0],
            num_heads=self.config.num_heads,
            first_row=num_decode,
        )

    def receive(self, num_rows: int) -> None:
        """Before ``forward``: the activations of the stage before, where there is one."""
        if self._previous is not None:
            self._previous.recv(self._residual[:num_rows])

    def send(self, num_rows: int) -> None:
        """After ``forward``: this stage's activations to the next, where there is one."""
        if self._next is not None:
            self._next.send(self._residual[:num_rows].clone())

    def forward(
        self,
        inputs: StepInputs,
        drawn: torch.Tensor,
        shape: StepShape,
        on_layers: Callable[[int], None] | None = None,
    ) -> None:
        """k and v of every row into the pool; of the last stage logits of the sampled rows into ``logits[:num_sampled]``.

        ``drawn`` [seqs] int64: the last step's tokens, for rows that continue it. ``on_layers`` is called, as Engine
        says, when the layers' launches are in the queue.
        """
        ops, config, tensors, count = self.kernels, self.config, self._tensors, shape.num_rows
        eps, last = config.rms_norm_eps, config.num_layers - 1
        residual, normed, hidden = self._residual[:count], self._normed[:count], self._hidden[:count]
        slots = inputs.slots[:count]
        if self._previous is None:
            self._vocabulary.embed(inputs.token_ids[:count], inputs.sources[:count], drawn, residual)
        ops.rms_norm(residual, tensors["layers.0.attn_norm"], eps, normed)
        if shape.num_decode:
            decode = shape.num_decode
            ops.plan_decode(inputs.context_lens[:decode], inputs.query_starts[: decode + 1], self.workspace)
        for i in range(config.num_layers):
            name = f"layers.{i}."
            self._write_kv(i, normed, inputs, count)
            if on_layers is not None and i + 1 in self._marks:
                on_layers(i + 1)
            ends = i == last and self._next is None
            if ends and not shape.num_sampled:
                return
            self._attend(i, inputs, shape)
            attended = self._attended[:count]
            if ends and shape.gather:
                # of the last layer's output nothing but the sampled rows is ever read
                picked = inputs.sampled_rows[: shape.num_sampled]
                attended, residual = attended.index_select(0, picked), residual.index_select(0, picked)
                slots = slots.index_select(0, picked)  # none is padding; kernels without slots would be other kernels
                normed, hidden = self._normed[: shape.num_sampled], self._hidden[: shape.num_sampled]
            ops.linear(attended, tensors[name + "o"], hidden)
            self._sum(hidden)
            ops.add_rms_norm(hidden, residual, tensors[name + "mlp_norm"], eps, normed)
            self._feed_forward(i, normed, slots, hidden)
            self._sum(hidden)
            if i == last and not ends:
                residual.add_(hidden)
                return
            after = tensors["norm"] if ends else tensors[f"layers.{i + 1}.attn_norm"]
            ops.add_rms_norm(hidden, residual, after, eps, normed)
        self._vocabulary.head(normed[: shape.num_sampled])

    def _sum(self, hidden_NF: torch.Tensor) -> None:
        """Over the places: each has multiplied some of the columns of a row-parallel matrix."""
        if self._tp is not None:
            self._tp.all_reduce(hidden_NF)

    def _write_kv(self, i: int, normed_NF: torch.Tensor, inputs: StepInputs, count: int) -> None:
        tensors, name = self._tensors, f"layers.{i}."
        qkv = self._qkv[:count]
        self.kernels.linear(normed_NF, tensors[name + "qkv"], qkv, tensors.get(name + "qkv_bias"))
        self.kernels.rope_and_cache(
            qkv,
            inputs.positions[:count],
            inputs.slots[:count],
            self._table,
            self._pool[i],
            num_heads=self.config.num_heads,
            q_norm=tensors.get(name + "q_norm"),
            k_norm=tensors.get(name + "k_norm"),
            eps=self.config.rms_norm_eps,
            kv_scale=self._kv_scale(i),
        )

    def _attend(self, i: int, inputs: StepInputs, shape: StepShape) -> None:
        heads, dim = self.config.num_heads, self.config.head_dim
        q_NHD = self._qkv[: shape.num_rows, : heads * dim].unflatten(1, (heads, dim))
        out_NHD = self._attended[: shape.num_rows].unflatten(1, (heads, dim))
        options = {"scale": self._scale, "window": self.config.sliding_window, "kv_scale": self._kv_scale(i)}
        decode = shape.num_decode
        if decode:
            self.kernels.decode_attention(
                q_NHD[:decode],
                self._pool[i],
                inputs.block_tables[:decode],
                inputs.context_lens[:decode],
                inputs.query_starts[: decode + 1],
                self.workspace,
                out_NHD[:decode],
                **options,
            )
        if shape.prefill is not None:
            self.kernels.prefill_attention(q_NHD, self._pool[i], shape.prefill, out_NHD, **options)

    def _kv_scale(self, i: int) -> torch.Tensor | None:
        return None if self._kv_scales is None else self._kv_scales[i]
