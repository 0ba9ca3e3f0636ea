"""Launch settings of the Triton prefill attention: tile shapes, warps and stages by GPU, head_dim and dtypes. No triton.

What the tuning table lacks gets ``default``, chosen from compiled code (registers, shared memory, instructions).
"""

from dataclasses import dataclass

import torch

from biphase.kernels.gpu.target import Target
from biphase.kernels.gpu.tuning import Settings, tuned

OP = "prefill_attention"

HEAD_DIMS = (64, 96, 128, 256)
BLOCK_SIZES = (16, 32, 64, 128)


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillShape:
    """What settings depend on: fixed for a model and its KV pool."""

    head_dim: int
    block_size: int
    kv_dtype: torch.dtype

    @classmethod
    def of(cls, pool_layer: torch.Tensor) -> "PrefillShape":
        return cls(head_dim=pool_layer.shape[4], block_size=pool_layer.shape[3], kv_dtype=pool_layer.dtype)

    @property
    def key(self) -> str:
        """Its row of the tuning table. float16 takes bfloat16's: the machine code is the same but for one letter."""
        name = {torch.float32: "f32", torch.float8_e4m3fn: "fp8"}.get(self.kv_dtype, "16bit")
        return f"{name}-d{self.head_dim}-b{self.block_size}"


def settings_for(target: Target, shape: PrefillShape) -> Settings:
    return tuned(OP, target, shape.key) or default(target, shape)


def default(target: Target, shape: PrefillShape) -> Settings:
    if shape.kv_dtype == torch.float32:
        return _settings(target, shape, m=16, n=16, warps=4, stages=2)
    return _settings(target, shape, m=128, n=64, warps=8, stages=2)


def candidates(target: Target, shape: PrefillShape) -> list[Settings]:
    """What is worth measuring on that GPU, the default first."""
    return [default(target, shape)]


def _settings(target: Target, shape: PrefillShape, *, m: int, n: int, warps: int, stages: int) -> Settings:
    # one bulk copy takes a whole tile where the tile lies in one block
    bulk_copies = target.capability >= 90 and target.capability < 120 and shape.block_size % n == 0
    return {
        "BLOCK_M": m,
        "BLOCK_N": n,
        "EDGE_N": min(n, 64),
        "USE_TMA": int(bulk_copies),
        "OVERLAP": int(target.capability // 10 == 9 and shape.kv_dtype != torch.float32),
        "num_warps": warps,
        "num_stages": stages,
    }
