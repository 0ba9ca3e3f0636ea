"""Attention of a few new tokens per sequence over its paged context, on a GPU."""

import torch

from biphase.kernels.decode_attention.plan_kernel import plan_kernel
from biphase.kernels.decode_attention.triton_kernel import join_kernel, split_kernel
from biphase.kernels.decode_attention.workspace import (
    FP8,
    OP,
    DecodeWorkspace,
    candidates,
    default_settings,
    key_of,
    rows_of_program,
)
from biphase.kernels.gpu import table_check
from biphase.kernels.gpu.check import (
    check_contiguous,
    check_dtype,
    check_rows,
    check_same_device,
    check_shape,
)
from biphase.kernels.gpu.dependent_launch import dependent_launch
from biphase.kernels.gpu.launch import launch
from biphase.kernels.gpu.target import target_of
from biphase.kernels.gpu.tuning import Settings

__all__ = ["OP", "DecodeWorkspace", "candidates", "decode_attention", "default_settings", "key_of", "plan_decode"]

_PARTS = 32
"""Partial results that the join reads at once."""
_REGISTERS, _MAX_REGISTERS, _MAX_FP32_REGISTERS = 64 << 10, 248, 168
"""Of a multiprocessor, and of a thread."""


def plan_decode(context_lens: torch.Tensor, query_starts: torch.Tensor, workspace: DecodeWorkspace) -> None:
    """Cuts the step's work into the workspace's runs, on the device: once per step, before the first layer.

    ``context_lens`` [B] int32, tokens in the cache after this step (0: padding); ``query_starts`` [B + 1] int32.
    """
    num_seqs = _check_lengths(context_lens, query_starts, workspace)
    check_same_device(context_lens=context_lens, query_starts=query_starts, workspace=workspace.rows)
    if num_seqs == 0:
        return
    max_seqs = max(32, 1 << (workspace.max_seqs - 1).bit_length())
    runs = min(32, 8192 // max_seqs)
    launch(
        plan_kernel,
        (-(-workspace.num_programs // runs),),
        context_lens,
        query_starts,
        workspace.rows,
        workspace.runs,
        num_seqs,
        workspace.window or 0,
        TILE=workspace.settings["TILE"],
        PROGRAMS=workspace.num_programs,
        RESIDENT=workspace.resident,
        LONG_RUN=workspace.settings["LONG_RUN"],
        MAX_SEQS=max_seqs,
        RUNS=runs,
        num_warps=4 if max_seqs <= 512 else 16,
        **dependent_launch(target_of(context_lens.device)),
    )


def decode_attention(
    q_NHD: torch.Tensor,
    pool_layer: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    query_starts: torch.Tensor,
    workspace: DecodeWorkspace,
    out_NHD: torch.Tensor,
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    kv_scale: torch.Tensor | None = None,
    max_query_len: int = 1,
) -> None:
    """``out = softmax(scale * q k) v`` for each sequence's last tokens, after ``plan_decode``. Two launches.

    ``q``, ``out`` [N, H, D], rows aligned to 16 bytes (views of a wider product are fine); ``pool_layer`` [blocks, 2, K,
    block_size, D] of their dtype or e4m3; ``block_tables`` [B, W] int32; ``kv_scale`` [2, K] float32 with e4m3 only.
    Query token j of the q that a sequence has sees its tokens up to ``context - q + j``, of those the last ``window``;
    with ``soft_cap``, logits x become ``cap * tanh(x / cap)``. Lengths are read on the device only: grids and arguments
    are the same for all of them, so a graph of these launches serves any. ``max_query_len`` is one of those arguments.
    Rows of padding sequences (context 0) are left alone. In debug mode (kernels.gpu.table_check) block tables and query
    starts are checked too. Raises ValueError naming the argument.
    """
    check_shape("pool_layer", pool_layer, None, 2, workspace.num_kv_heads, workspace.block_size, workspace.head_dim)
    check_dtype("pool_layer", pool_layer, workspace.kv_dtype)
    check_contiguous("pool_layer", pool_layer)
    check_rows("pool_layer", pool_layer)
    num_heads = workspace.num_heads
    check_shape("q", q_NHD, None, num_heads, workspace.head_dim)
    num_tokens = q_NHD.shape[0]
    num_kv_heads, block_size, head_dim = pool_layer.shape[2:]
    is_fp8 = pool_layer.dtype == FP8
    for name, tensor in {"q": q_NHD, "out": out_NHD}.items():
        check_shape(name, tensor, num_tokens, num_heads, head_dim)
        if is_fp8:
            check_dtype(name, tensor, torch.bfloat16, torch.float16, torch.float32)
        else:
            check_dtype(name, tensor, pool_layer.dtype)
        check_rows(name, tensor)
        if tensor.stride(1) != head_dim and num_heads > 1:
            raise ValueError(f"{name} has heads {tensor.stride(1)} elements apart, expected {head_dim}")
    num_seqs = _check_lengths(context_lens, query_starts, workspace)
    check_shape("block_tables", block_tables, num_seqs, None)
    check_dtype("block_tables", block_tables, torch.int32)
    if block_tables.stride(-1) != 1 and block_tables.shape[1] > 1:
        raise ValueError(f"block_tables has stride {block_tables.stride(-1)} in its last dimension")
    if not 1 <= max_query_len <= workspace.max_query_len:
        raise ValueError(f"max_query_len is {max_query_len}, the workspace holds 1 to {workspace.max_query_len}")
    if window != workspace.window:
        raise ValueError(f"window is {window}, the workspace's plan is for {workspace.window}")
    if soft_cap is not None and not soft_cap > 0:
        raise ValueError(f"soft_cap is {soft_cap}, it must be above 0")
    if is_fp8 != (kv_scale is not None):
        raise ValueError(f"kv_scale is {'missing' if is_fp8 else 'given'}, the pool holds {pool_layer.dtype}")
    if kv_scale is not None:
        check_shape("kv_scale", kv_scale, 2, num_kv_heads)
        check_dtype("kv_scale", kv_scale, torch.float32)
        check_contiguous("kv_scale", kv_scale)
    check_same_device(
        q=q_NHD,
        pool_layer=pool_layer,
        block_tables=block_tables,
        context_lens=context_lens,
        query_starts=query_starts,
        workspace=workspace.rows,
        out=out_NHD,
        kv_scale=kv_scale,
    )
    if num_seqs == 0 or num_tokens == 0:
        return
    if table_check.may_check(q_NHD):
        _check_tables(num_tokens, pool_layer, block_tables, context_lens, query_starts, window, max_query_len)
    target = target_of(q_NHD.device)
    if is_fp8:
        target.require_fp8("an fp8 KV cache")
    group = num_heads // num_kv_heads
    query_rows = max_query_len * group
    program_rows = rows_of_program(query_rows)
    row_tiles = -(-query_rows // program_rows)
    dim = 1 << (head_dim - 1).bit_length()
    settings = workspace.settings
    # no sequence is longer than its row of the table: with short tables, fewer programs can have work at all
    most_tiles = num_seqs * -(-block_tables.shape[1] * block_size // settings["TILE"])
    launch(
        split_kernel,
        (num_kv_heads * row_tiles, min(workspace.num_programs, most_tiles)),
        q_NHD,
        pool_layer.view(torch.int16) if is_fp8 else pool_layer,
        block_tables,
        kv_scale,
        workspace.rows,
        workspace.runs,
        workspace.part_out,
        workspace.part_lse,
        out_NHD,
        q_NHD.stride(0),
        out_NHD.stride(0),
        block_tables.stride(0),
        scale,
        window or 0,
        soft_cap or 0.0,
        NUM_KV_HEADS=num_kv_heads,
        GROUP=group,
        QUERY_ROWS=query_rows,
        ROWS=program_rows,
        ROW_TILES=row_tiles,
        HEAD_DIM=head_dim,
        DIM=dim,
        BLOCK_SIZE=block_size,
        TILE=settings["TILE"],
        FP8=is_fp8,
        WINDOWED=window is not None,
        CAPPED=soft_cap is not None,
        num_warps=settings["num_warps"],
        maxnreg=_registers(settings, pool_layer.dtype),
        num_stages=settings["num_stages"],
        **dependent_launch(target),
    )
    launch(
        join_kernel,
        (num_kv_heads * query_rows, num_seqs),
        workspace.rows,
        workspace.part_out,
        workspace.part_lse,
        out_NHD,
        out_NHD.stride(0),
        NUM_KV_HEADS=num_kv_heads,
        GROUP=group,
        QUERY_ROWS=query_rows,
        HEAD_DIM=head_dim,
        DIM=dim,
        PARTS=_PARTS,
        num_warps=4,
        **dependent_launch(target),
    )


def _check_tables(
    num_tokens: int,
    pool_layer: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    query_starts: torch.Tensor,
    window: int | None,
    max_query_len: int,
) -> None:
    contexts, query_lens = context_lens.tolist(), query_starts.diff().tolist()
    table_check.check_query_starts(query_starts.tolist(), contexts, num_tokens=num_tokens, max_query_len=max_query_len)
    table_check.check_block_tables(
        block_tables,
        [0 if window is None else max(0, c - q + 1 - window) for c, q in zip(contexts, query_lens, strict=True)],
        contexts,
        block_size=pool_layer.shape[3],
        num_blocks=pool_layer.shape[0],
    )


def _registers(settings: Settings, kv_dtype: torch.dtype) -> int:
    """What a thread may have with all resident programs: left alone, ptxas aims lower and spills a few bytes. float32,
    which has no tensor core tiles to hold, spills with more."""
    threads = 32 * settings["num_warps"] * settings["resident"]
    return min(_MAX_FP32_REGISTERS if kv_dtype == torch.float32 else _MAX_REGISTERS, _REGISTERS // threads // 8 * 8)


def _check_lengths(context_lens: torch.Tensor, query_starts: torch.Tensor, workspace: DecodeWorkspace) -> int:
    """How many sequences there are."""
    check_shape("context_lens", context_lens, None)
    num_seqs = context_lens.shape[0]
    if num_seqs > workspace.max_seqs:
        raise ValueError(f"context_lens has {num_seqs} sequences, the workspace holds {workspace.max_seqs}")
    check_shape("query_starts", query_starts, num_seqs + 1)
    for name, tensor in {"context_lens": context_lens, "query_starts": query_starts}.items():
        check_dtype(name, tensor, torch.int32)
        check_contiguous(name, tensor)
    return num_seqs
