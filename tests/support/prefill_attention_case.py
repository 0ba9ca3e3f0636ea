"""A case of ``prefill_attention`` and its tensors: NaN in every slot that no token may read, and in the output."""

import random
from dataclasses import dataclass

import torch

from biphase.kernels.prefill_attention.tile_plan import PrefillPlan, plan_prefill

F8 = torch.float8_e4m3fn


@dataclass(frozen=True, kw_only=True)
class Case:
    query_lens: tuple[int, ...]
    context_lens: tuple[int, ...]
    heads: int = 4
    kv_heads: int = 2
    dim: int = 64
    block_size: int = 64
    dtype: torch.dtype = torch.float32
    kv_dtype: torch.dtype | None = None
    window: int | None = None
    soft_cap: float | None = None
    scale: float | None = None
    first_row: int = 0
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Inputs:
    q_NHD: torch.Tensor
    pool_layer: torch.Tensor
    block_tables: torch.Tensor
    out_NHD: torch.Tensor
    kv_scale: torch.Tensor | None

    def plan(self, case: Case) -> PrefillPlan:
        return plan_prefill(
            case.query_lens,
            case.context_lens,
            self.block_tables,
            self.pool_layer,
            num_heads=case.heads,
            first_row=case.first_row,
        )


def make_inputs(case: Case, device: torch.device) -> Inputs:
    generator = torch.Generator().manual_seed(case.seed)
    kv_dtype = case.kv_dtype or case.dtype
    needed = [-(-context // case.block_size) for context in case.context_lens]
    num_blocks = sum(needed) + 3
    free = list(range(num_blocks))
    random.Random(case.seed).shuffle(free)
    # past a sequence's blocks a table holds anything: here, blocks full of NaN
    tables = torch.full((len(needed), max(needed) + 1), free[-1], dtype=torch.int32)
    pool = torch.full((num_blocks, 2, case.kv_heads, case.block_size, case.dim), torch.nan)
    for sequence, context in enumerate(case.context_lens):
        blocks = [free.pop(0) for _ in range(needed[sequence])]
        tables[sequence, : len(blocks)] = torch.tensor(blocks, dtype=torch.int32)
        for index, block in enumerate(blocks):
            count = min(case.block_size, context - index * case.block_size)
            pool[block, :, :, :count] = torch.randn(2, case.kv_heads, count, case.dim, generator=generator)
    kv_scale = None
    if kv_dtype == F8:
        kv_scale = (0.01 + 0.02 * torch.rand(2, case.kv_heads, generator=generator)).to(device)
        pool = pool / kv_scale.cpu()[None, :, :, None, None]
    rows = case.first_row + sum(case.query_lens) + 2
    # strided as the fused product leaves it: q, then k and v, which are none of this kernel's business
    width = (case.heads + 2 * case.kv_heads) * case.dim
    qkv = torch.full((rows, width), torch.nan)
    used = slice(case.first_row, rows - 2)
    qkv[used, : case.heads * case.dim] = torch.randn(
        rows - 2 - case.first_row, case.heads * case.dim, generator=generator
    )
    qkv = qkv.to(case.dtype).to(device)
    return Inputs(
        q_NHD=qkv[:, : case.heads * case.dim].view(rows, case.heads, case.dim),
        pool_layer=pool.to(kv_dtype).to(device),
        block_tables=tables.to(device),
        out_NHD=torch.full((rows, case.heads, case.dim), torch.nan, dtype=case.dtype, device=device),
        kv_scale=kv_scale,
    )
