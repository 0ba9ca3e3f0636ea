"""The forward pass of the Llama family over one packed step: RMS norm, rotary attention, gated SiLU or experts.

One rank of several runs its stage's layers on its place's heads, features and experts: activations come from the stage
before and go to the next one, sums over the places follow the two row-parallel products of a layer, the embedding and
nothing else.

Shapes: F hidden features, H query heads, K kv heads, G = H / K, D head_dim, I intermediate features, N tokens of the
step (padded), R sampled tokens, V vocabulary. Activations are feature-major, ``[features, N]`` (kernels/ops.py).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from biphase.engine.batch import StepBatch
from biphase.engine.checkpoint.shard import Shard
from biphase.engine.model_config import ModelConfig
from biphase.engine.parallel.group import RankGroups
from biphase.engine.parallel.local_config import layer_marks, local_config
from biphase.kernels.ops import Kernels


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One layer's weights, views of the mapped file; vectors as columns ``[features, 1]``."""

    attn_norm: torch.Tensor
    qkv: torch.Tensor
    qkv_bias: torch.Tensor | None
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    o: torch.Tensor
    mlp_norm: torch.Tensor
    router: torch.Tensor | None
    """With experts: [E, F]; then ``gate_up`` [e, 2 * I, F] and ``down`` [e, F, I] are those of this rank's experts."""
    gate_up: torch.Tensor
    down: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Buffers:
    """Activations of a step with N tokens; views of buffers that every step shares, valid until the next step."""

    normed_FN: torch.Tensor
    qkv_FN: torch.Tensor
    q_HDN: torch.Tensor
    k_KDN: torch.Tensor
    q_KGDN: torch.Tensor
    kv_KDN: torch.Tensor
    """k and v: [2 * K, D, N]."""
    rotated_H2RN: torch.Tensor
    """The rotated part of q and k: [H + K, 2, rotary_dim / 2, N]."""
    attended_FN: torch.Tensor
    attended_KGDN: torch.Tensor
    gate_up_IN: torch.Tensor
    gate_IN: torch.Tensor
    up_IN: torch.Tensor


class LlamaModel:
    """Weights, KV pool and activation buffers. Runs in one thread; changes the pool and its buffers only."""

    def __init__(
        self,
        config: ModelConfig,
        tensors: dict[str, torch.Tensor],
        pool: torch.Tensor,
        kernels: Kernels,
        groups: RankGroups | None = None,
    ) -> None:
        """``config`` of the whole model; ``pool`` [layers, blocks, 2, K, block_size, D] and ``tensors``, as
        engine.checkpoint names them, of this rank."""
        shard = Shard.whole() if groups is None else Shard(plan=groups.plan, rank=groups.rank)
        self.config = config = local_config(config, shard.plan, shard.rank)
        self._kernels = kernels
        self._tp = None if groups is None else groups.tp
        self._previous = None if groups is None else groups.previous
        self._next = None if groups is None else groups.next
        self._vocabulary = shard.vocabulary(config)
        self._vocabulary_sizes = shard.vocabulary_sizes(config)
        self._experts = shard.experts(config)
        self._embed = tensors.get("embed")
        self._head = tensors.get("lm_head", self._embed)
        self._norm = tensors["norm"].unsqueeze(1) if "norm" in tensors else None
        self._layers = [_layer(tensors, i) for i in range(config.num_layers)]
        self._block_rows = [layer.view(-1, pool.shape[-2] * pool.shape[-1]) for layer in pool]
        self._token_rows = [layer.view(-1, pool.shape[-1]) for layer in pool]
        self._frequencies = torch.tensor(config.rope.inverse_frequencies(), dtype=torch.float32).unsqueeze(1)
        self._scale = config.head_dim**-0.5
        self._marks = layer_marks(config.num_layers)
        self._flat: dict[str, torch.Tensor] = {}
        self._buffers: dict[int, Buffers] = {}

    def forward(self, batch: StepBatch, on_layers: Callable[[int], None] | None = None) -> torch.Tensor | None:
        """Writes the step's k and v into the pool; returns logits ``[R, V]`` of the sampled columns: None without any,
        and on ranks that do not sample. Calls ``on_layers`` as Engine does. Raises EngineLost.
        """
        ops = self._kernels
        eps = self.config.rms_norm_eps
        buffers = self._buffers_for(batch.num_padded)
        angles_RN = self._frequencies * batch.positions
        cos_RN, sin_RN = angles_RN.cos(), angles_RN.sin()
        h_FN = self._entering(batch)
        for i, layer in enumerate(self._layers):
            self._expect_sum(h_FN)
            ops.rms_norm.rms_norm(h_FN, layer.attn_norm, eps, buffers.normed_FN)
            ops.linear.linear(layer.qkv, buffers.normed_FN, buffers.qkv_FN)
            if layer.qkv_bias is not None:
                buffers.qkv_FN.add_(layer.qkv_bias)
            if layer.q_norm is not None and layer.k_norm is not None:
                ops.rms_norm.rms_norm(buffers.q_HDN, layer.q_norm, eps, buffers.q_HDN)
                ops.rms_norm.rms_norm(buffers.k_KDN, layer.k_norm, eps, buffers.k_KDN)
            kv_XMD = ops.rope_and_cache.rope_and_cache(
                buffers.rotated_H2RN, buffers.kv_KDN, cos_RN, sin_RN, self._token_rows[i], batch.cache_rows
            )
            if on_layers is not None and i + 1 in self._marks:
                on_layers(i + 1)
            if batch.decode is not None:
                ops.decode_attention.decode_attention(
                    buffers.q_KGDN, self._block_rows[i], batch.decode, self._scale, buffers.attended_KGDN
                )
            for chunk in batch.chunks:
                ops.prefill_attention.prefill_attention(
                    buffers.q_KGDN, kv_XMD, self._block_rows[i], chunk, self._scale, buffers.attended_KGDN
                )
            self._add_product(layer.o, buffers.attended_FN, h_FN, buffers)
            self._expect_sum(h_FN)
            ops.rms_norm.rms_norm(h_FN, layer.mlp_norm, eps, buffers.normed_FN)
            if layer.router is not None:
                self._add_experts(layer, layer.router, h_FN, buffers)
                continue
            ops.linear.linear(layer.gate_up, buffers.normed_FN, buffers.gate_up_IN)
            activated_IN = ops.silu_mul.silu_mul(buffers.gate_IN, buffers.up_IN)
            self._add_product(layer.down, activated_IN, h_FN, buffers)
        return self._leaving(h_FN, batch)

    def _entering(self, batch: StepBatch) -> torch.Tensor:
        """What this stage begins with, ``[F, N]``: the tokens' embeddings, or what the stage before has made of them."""
        if self._previous is not None:
            return self._previous.recv(torch.empty(self.config.hidden_size, batch.num_padded))
        assert self._embed is not None
        if self._tp is None:
            return self._embed.index_select(0, batch.token_ids).t().contiguous()
        rows = batch.token_ids - self._vocabulary.start
        elsewhere = (rows < 0) | (rows >= len(self._vocabulary))
        found_NF = self._embed.index_select(0, rows.masked_fill(elsewhere, 0))
        # one place has a row, the others add zeros: the sum is exact
        return self._tp.all_reduce(found_NF.masked_fill_(elsewhere.unsqueeze(1), 0.0).t().contiguous())

    def _leaving(self, h_FN: torch.Tensor, batch: StepBatch) -> torch.Tensor | None:
        """Hand on the stage's output, or make logits of it."""
        if self._next is not None:
            self._next.send(h_FN)
            return None
        if batch.sampled_columns is None:
            return None
        last_FR = h_FN.index_select(1, batch.sampled_columns)
        self._kernels.rms_norm.rms_norm(last_FR, self._norm, self.config.rms_norm_eps, last_FR)
        logits_RV: torch.Tensor = self._kernels.linear.linear_logits(self._head, last_FR)
        return logits_RV if self._tp is None else self._tp.gather_columns(logits_RV, self._vocabulary_sizes)

    def _expect_sum(self, h_FN: torch.Tensor) -> None:
        if self._tp is not None:
            self._tp.expect(h_FN)

    def _add_product(self, w_FI: torch.Tensor, x_IN: torch.Tensor, h_FN: torch.Tensor, buffers: Buffers) -> None:
        """``h += w @ x`` of a row-parallel matrix: each place has some of the columns of ``w`` and the rows of ``x``."""
        if self._tp is None:
            self._kernels.linear.linear_add(w_FI, x_IN, h_FN)
            return
        # normed_FN has been read
        h_FN.add_(self._tp.all_reduce(self._kernels.linear.linear(w_FI, x_IN, buffers.normed_FN)))

    def _add_experts(self, layer: Layer, router_EF: torch.Tensor, h_FN: torch.Tensor, buffers: Buffers) -> None:
        """Every place routes alike, computes its own experts, and adds what all have computed."""
        ops, config, x_FN = self._kernels, self.config, buffers.normed_FN
        logits_EN = ops.linear.linear(router_EF, x_FN, x_FN.new_empty(config.num_experts, x_FN.shape[1]))
        ids_KN, weights_KN = ops.moe.route(logits_EN, config.num_experts_per_tok, config.norm_topk_prob)
        if self._tp is None:
            ops.moe.add_experts(x_FN, ids_KN, weights_KN, layer.gate_up, layer.down, h_FN)
            return
        ids_KN = ids_KN - self._experts.start
        ids_KN.masked_fill_(ids_KN >= len(self._experts), -1)
        sum_FN = torch.zeros_like(h_FN)
        ops.moe.add_experts(x_FN, ids_KN, weights_KN, layer.gate_up, layer.down, sum_FN)
        h_FN.add_(self._tp.all_reduce(sum_FN))

    def _buffers_for(self, num_tokens: int) -> Buffers:
        found = self._buffers.get(num_tokens)
        if found is None:
            found = self._buffers[num_tokens] = self._make_buffers(num_tokens)
        return found

    def _make_buffers(self, num_tokens: int) -> Buffers:
        config = self.config
        heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
        qkv = self._rows("qkv", (heads + 2 * kv_heads) * dim, num_tokens)
        attended = self._rows("attended", heads * dim, num_tokens)
        gate_up = self._rows("gate_up", 2 * config.intermediate_size, num_tokens)
        per_head = qkv.view(heads + 2 * kv_heads, dim, num_tokens)
        rotary = config.rope.rotary_dim
        return Buffers(
            normed_FN=self._rows("normed", config.hidden_size, num_tokens),
            qkv_FN=qkv,
            q_HDN=per_head[:heads],
            k_KDN=per_head[heads : heads + kv_heads],
            q_KGDN=per_head[:heads].view(kv_heads, heads // kv_heads, dim, num_tokens),
            kv_KDN=per_head[heads:],
            rotated_H2RN=per_head[: heads + kv_heads, :rotary].view(heads + kv_heads, 2, rotary // 2, num_tokens),
            attended_FN=attended,
            attended_KGDN=attended.view(kv_heads, heads // kv_heads, dim, num_tokens),
            gate_up_IN=gate_up,
            gate_IN=gate_up[: config.intermediate_size],
            up_IN=gate_up[config.intermediate_size :],
        )

    def _rows(self, name: str, num_features: int, num_tokens: int) -> torch.Tensor:
        """``[features, tokens]``, contiguous, at the start of the named buffer, which grows when it must."""
        flat = self._flat.get(name)
        if flat is None or flat.numel() < num_features * num_tokens:
            self._buffers.clear()  # they would keep the smaller buffer alive
            flat = self._flat[name] = torch.zeros(num_features * num_tokens)
        return flat[: num_features * num_tokens].view(num_features, num_tokens)


def _layer(tensors: dict[str, torch.Tensor], i: int) -> Layer:
    def column(name: str) -> torch.Tensor:
        return tensors[f"layers.{i}.{name}"].unsqueeze(1)

    router = tensors.get(f"layers.{i}.router")
    experts = "" if router is None else "experts_"

    def column_or_none(name: str) -> torch.Tensor | None:
        return column(name) if f"layers.{i}.{name}" in tensors else None

    return Layer(
        attn_norm=column("attn_norm"),
        qkv=tensors[f"layers.{i}.qkv"],
        qkv_bias=column_or_none("qkv_bias"),
        q_norm=column_or_none("q_norm"),
        k_norm=column_or_none("k_norm"),
        o=tensors[f"layers.{i}.o"],
        mlp_norm=column("mlp_norm"),
        router=router,
        gate_up=tensors[f"layers.{i}.{experts}gate_up"],
        down=tensors[f"layers.{i}.{experts}down"],
    )
