"""Launch settings of the Triton prefill attention: tile shapes, warps and stages by GPU, head_dim and dtypes. No triton.

What the tuning table lacks gets ``default``, chosen from compiled code (registers, shared memory, instructions).
"""

import functools
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


@functools.cache
def default(target: Target, shape: PrefillShape) -> Settings:
    """Asked at every launch."""
    return candidates(target, shape)[0]


def candidates(target: Target, shape: PrefillShape) -> list[Settings]:
    """What is worth measuring on that GPU, the default first. None spills on the GPUs that kernels are compiled for."""
    found: list[Settings] = []
    for settings in _worth_measuring(target, shape):
        if settings["USE_TMA"] and shape.block_size % settings["BLOCK_N"]:
            settings = {**settings, "USE_TMA": 0}  # one bulk copy takes a tile, which has to lie in one block
        if settings not in found:
            found.append(settings)
    return found


def _worth_measuring(target: Target, shape: PrefillShape) -> list[Settings]:
    generation = target.capability // 10  # 9: Hopper (wgmma), 10: Blackwell (tcgen05), any other multiplies by mma.sync
    fp8 = shape.kv_dtype == torch.float8_e4m3fn
    if shape.kv_dtype == torch.float32:
        # no tensor cores: each thread multiplies whole rows, which a bulk copy's layout would have it hold all at once
        return [_settings(32, 16), _settings(16, 16)]
    if generation == 9 and shape.head_dim == 256:
        if fp8:
            first = _settings(128, 32, edge=16, bulk=True)
            return [first, {**first, "USE_TMA": 0}, _settings(128, 16, bulk=True)]
        small = _settings(128, 32, bulk=True)
        return [_settings(128, 64, edge=32, bulk=True, overlap=True), small, {**small, "OVERLAP": 1}]
    if generation == 9:
        first = _settings(128, 64, num_stages=3, bulk=True, overlap=True)
        return [
            first,
            {**first, "num_stages": 2},
            {**first, "OVERLAP": 0},
            {**first, "USE_TMA": 0},
            {**first, "BLOCK_M": 64, "num_warps": 4},
            _settings(128, 128, bulk=True, overlap=True),
        ]
    if generation == 10 and shape.head_dim == 256:
        first = _settings(128, 32, edge=16 if fp8 else 32, bulk=True)
        return [first, {**first, "num_stages": 3}, {**first, "USE_TMA": 0}]
    if generation == 10:
        first = _settings(128, 64, num_stages=3, bulk=True)
        return [
            first,
            {**first, "num_stages": 2},
            {**first, "USE_TMA": 0},
            {**first, "BLOCK_M": 64, "num_warps": 4},
            _settings(128, 128, bulk=True),
        ]
    if shape.head_dim == 256:
        first = _settings(64, 32)
        roomy = fp8 or target.shared_bytes >= 128 << 10
        return [first, _settings(64, 16, num_stages=3), *([{**first, "num_stages": 3}, _settings(64, 64)] * roomy)]
    return [
        _settings(128, 64, num_stages=3),
        _settings(128, 64),
        _settings(128, 32, num_stages=3),
        _settings(64, 32, num_warps=4, num_stages=3),
    ]


def _settings(
    m: int,
    n: int,
    *,
    edge: int = 64,
    bulk: bool = False,
    overlap: bool = False,
    num_warps: int = 8,
    num_stages: int = 2,
) -> Settings:
    return {
        "BLOCK_M": m,
        "BLOCK_N": n,
        "EDGE_N": min(n, edge),
        "USE_TMA": int(bulk),
        "OVERLAP": int(overlap),
        "num_warps": num_warps,
        "num_stages": num_stages,
    }
