"""Attention of one new token per sequence over its paged context."""

from biphase.kernels.decode_attention.reference import decode_attention_reference
from biphase.kernels.decode_attention.torch_cpu import DecodeBatch, decode_attention, plan_decode

__all__ = ["DecodeBatch", "decode_attention", "decode_attention_reference", "plan_decode"]
