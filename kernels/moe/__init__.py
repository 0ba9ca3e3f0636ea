"""Mixture-of-experts layers: which experts each token takes, and the products of tokens grouped by expert."""

from biphase.kernels.moe.torch_cpu import add_experts, route

__all__ = ["add_experts", "route"]
