"""The work of a step's prefill attention, cut into tiles on the host, once for all layers. No triton.

Queries are packed: no sequence is padded. A tile is BLOCK_M packed rows (query tokens x query heads of one kv head) of one
sequence; the tiles that read most keys come first, so that the last ones to run are short.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from biphase.kernels.gpu.check import check_base, check_one_of, check_shape
from biphase.kernels.gpu.target import target_of
from biphase.kernels.prefill_attention.settings import BLOCK_SIZES, HEAD_DIMS, PrefillShape, settings_for

TILE_FIELDS = 8
"""int32 per tile: sequence, first packed row, first query token of the sequence in the step, packed rows of the sequence,
position of the sequence's first query token, and three of padding to 32 bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillPlan:
    """Query tokens of B sequences, which are rows ``first_row`` .. ``first_row + num_tokens`` of the step."""

    first_row: int
    query_lens: tuple[int, ...]
    context_lens: tuple[int, ...]
    """Tokens in the cache after this step."""
    num_heads: int
    """Query heads."""
    block_m: int
    """Packed rows of a tile; the launch takes the same."""
    tiles: torch.Tensor
    """``[num_tiles, TILE_FIELDS]`` int32 on the device."""
    block_tables: torch.Tensor
    """``[B, W]`` int32 on the device."""

    @property
    def num_tokens(self) -> int:
        return sum(self.query_lens)


def plan_prefill(
    query_lens: Sequence[int],
    context_lens: Sequence[int],
    block_tables: torch.Tensor,
    pool_layer: torch.Tensor,
    *,
    num_heads: int,
    first_row: int = 0,
) -> PrefillPlan:
    """``block_tables`` [B, W] int32: a row per sequence. ``pool_layer``: any layer's, for its shape and device.

    One copy to the device, from pinned memory and without waiting: torch keeps that memory until the copy is done.
    Raises ValueError naming the argument.
    """
    check_shape("pool_layer", pool_layer, None, 2, None, None, None)
    kv_heads, block_size, head_dim = pool_layer.shape[2:]
    check_one_of("head_dim", head_dim, HEAD_DIMS)
    check_one_of("block_size", block_size, BLOCK_SIZES)
    _check(query_lens, context_lens, block_tables, block_size)
    if kv_heads < 1 or num_heads < 1 or num_heads % kv_heads:
        raise ValueError(f"num_heads is {num_heads}, no multiple of the {kv_heads} kv heads")
    if first_row < 0:
        raise ValueError(f"first_row is {first_row}, it must be at least 0")
    block_m = settings_for(target_of(pool_layer.device), PrefillShape.of(pool_layer))["BLOCK_M"]
    tiles = torch.from_numpy(tile_list(query_lens, context_lens, num_heads // kv_heads, block_m, first_row=first_row))
    if pool_layer.device.type == "cuda":
        tiles = tiles.pin_memory()
    return PrefillPlan(
        first_row=first_row,
        query_lens=tuple(query_lens),
        context_lens=tuple(context_lens),
        num_heads=num_heads,
        block_m=block_m,
        tiles=tiles.to(pool_layer.device, non_blocking=True),
        block_tables=block_tables,
    )


def tile_list(
    query_lens: Sequence[int], context_lens: Sequence[int], group: int, block_m: int, *, first_row: int
) -> np.ndarray:
    """``[num_tiles, TILE_FIELDS]`` int32, most keys first; ``group``: query heads per kv head."""
    query = np.asarray(query_lens, dtype=np.int64)
    context = np.asarray(context_lens, dtype=np.int64)
    starts = first_row + np.cumsum(query) - query
    per_sequence = -(-query * group // block_m)
    sequence = np.repeat(np.arange(len(query)), per_sequence)
    index = np.arange(len(sequence)) - np.repeat(np.cumsum(per_sequence) - per_sequence, per_sequence)
    row = index * block_m
    num_rows = (query * group)[sequence]
    position = (context - query)[sequence]
    num_keys = position + (np.minimum(row + block_m, num_rows) - 1) // group + 1
    fields = np.zeros((len(sequence), TILE_FIELDS), dtype=np.int32)
    for column, values in enumerate((sequence, row, starts[sequence], num_rows, position)):
        fields[:, column] = values
    return fields[np.argsort(-num_keys, kind="stable")]


def _check(query_lens: Sequence[int], context_lens: Sequence[int], block_tables: torch.Tensor, block_size: int) -> None:
    if block_tables.dtype != torch.int32 or block_tables.dim() != 2 or block_tables.stride(1) != 1:
        raise ValueError(
            f"block_tables is {str(block_tables.dtype).removeprefix('torch.')} {list(block_tables.shape)} with strides "
            f"{list(block_tables.stride())}, expected int32 [B, W] with contiguous rows"
        )
    check_base("block_tables", block_tables)
    num_sequences, width = block_tables.shape
    for name, lens in (("query_lens", query_lens), ("context_lens", context_lens)):
        if len(lens) != num_sequences:
            raise ValueError(f"{name} has {len(lens)} entries, block_tables has {num_sequences} rows")
    for sequence, (query, context) in enumerate(zip(query_lens, context_lens, strict=True)):
        if not 0 <= query <= context:
            raise ValueError(f"query_lens[{sequence}] is {query}, expected 0 to context_lens[{sequence}] = {context}")
        if context > width * block_size:
            raise ValueError(
                f"context_lens[{sequence}] is {context}, block_tables has room for {width} blocks of {block_size}"
            )
