"""Rotary position embedding of q and k, and the write of k and v into the paged cache."""

from biphase.kernels.rope_and_cache.reference import rope_and_cache_reference
from biphase.kernels.rope_and_cache.torch_cpu import cache_rows, rope_and_cache

__all__ = ["cache_rows", "rope_and_cache", "rope_and_cache_reference"]
