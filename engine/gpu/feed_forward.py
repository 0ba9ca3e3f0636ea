"""The feed-forward part of a layer on a GPU: one for all tokens, or experts that each token chooses among.

On one of several places it is that place's features or experts, and what comes out is summed over the places elsewhere.
Shapes: N rows, F hidden, I intermediate features (of an expert), E experts, k taken per token, P = N * k pairs.
"""

from typing import Protocol

import torch

from biphase.engine.model_config import ModelConfig
from biphase.kernels.moe.local_experts import local_routing
from biphase.kernels.ops import PagedKernels


class FeedForward(Protocol):
    def __call__(self, i: int, x_NF: torch.Tensor, slots: torch.Tensor, out_NF: torch.Tensor) -> None:
        """Layer ``i`` applied to ``x``. ``slots`` [N] int64, negative for padding rows."""
        ...


def feed_forward_of(
    config: ModelConfig, tensors: dict[str, torch.Tensor], kernels: PagedKernels, max_rows: int, experts: range
) -> FeedForward:
    """With its buffers allocated for steps of ``max_rows``; ``config`` and ``experts``: of this rank."""
    if config.num_experts:
        return Experts(config, tensors, kernels, max_rows, experts)
    return Dense(config, tensors, kernels, max_rows)


class Dense:
    def __init__(
        self, config: ModelConfig, tensors: dict[str, torch.Tensor], kernels: PagedKernels, max_rows: int
    ) -> None:
        like = tensors["layers.0.down"]
        self._tensors = tensors
        self._kernels = kernels
        self._gate_up = like.new_zeros(max_rows, 2 * config.intermediate_size)
        self._activated = like.new_zeros(max_rows, config.intermediate_size)

    def __call__(self, i: int, x_NF: torch.Tensor, slots: torch.Tensor, out_NF: torch.Tensor) -> None:
        ops, tensors, count = self._kernels, self._tensors, x_NF.shape[0]
        gate_up, activated = self._gate_up[:count], self._activated[:count]
        ops.linear(x_NF, tensors[f"layers.{i}.gate_up"], gate_up)
        ops.silu_mul(gate_up, activated)
        ops.linear(activated, tensors[f"layers.{i}.down"], out_NF)


class Experts:
    def __init__(
        self,
        config: ModelConfig,
        tensors: dict[str, torch.Tensor],
        kernels: PagedKernels,
        max_rows: int,
        experts: range,
    ) -> None:
        like, pairs = tensors["layers.0.experts_down"], max_rows * config.num_experts_per_tok
        self._experts = None if len(experts) == config.num_experts else experts
        self._tensors = tensors
        self._kernels = kernels
        self._num_taken = config.num_experts_per_tok
        self._renormalize = config.norm_topk_prob
        # rows of 16 bytes, whatever the number of experts
        self._logits = like.new_zeros(max_rows, -(-config.num_experts // 8) * 8)[:, : config.num_experts]
        self._activated = like.new_zeros(pairs, config.moe_intermediate_size)
        self._rows = like.new_zeros(pairs, config.hidden_size)
        self._workspace = kernels.routing_workspace(
            max_tokens=max_rows,
            num_experts=config.num_experts,
            num_taken=config.num_experts_per_tok,
            dtype=like.dtype,
            device=like.device,
        )

    def __call__(self, i: int, x_NF: torch.Tensor, slots: torch.Tensor, out_NF: torch.Tensor) -> None:
        ops, tensors, count = self._kernels, self._tensors, x_NF.shape[0]
        logits, pairs = self._logits[:count], count * self._num_taken
        activated, rows = self._activated[:pairs], self._rows[:pairs]
        ops.linear(x_NF, tensors[f"layers.{i}.router"], logits)
        routing = ops.route(logits, self._workspace, renormalize=self._renormalize, slots=slots)
        if self._experts is not None:
            routing = local_routing(routing, self._experts)
        ops.grouped_gate_up(x_NF, tensors[f"layers.{i}.experts_gate_up"], routing, activated)
        ops.grouped_down(activated, tensors[f"layers.{i}.experts_down"], routing, rows)
        ops.combine(rows, routing, out_NF)
