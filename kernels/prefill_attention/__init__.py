"""Causal attention of a chunk of one sequence's prompt over its context."""

from biphase.kernels.prefill_attention.reference import prefill_attention_reference
from biphase.kernels.prefill_attention.torch_cpu import PrefillChunk, plan_prefill, prefill_attention

__all__ = ["PrefillChunk", "plan_prefill", "prefill_attention", "prefill_attention_reference"]
