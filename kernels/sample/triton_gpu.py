"""Launches the sampling kernels: eight of fixed grid, no host read, usable in a CUDA graph.

What they draw is what ``torch_cpu`` draws, bit for bit in the noise's words; see ``reference.rows_reference``.
"""

from collections.abc import Callable
from typing import Any

import torch

from biphase.kernels.gpu.check import check_dtype, check_rows, check_same_device, check_shape
from biphase.kernels.gpu.launch import launch
from biphase.kernels.gpu.target import Target, target_of
from biphase.kernels.gpu.tuning import Settings, tuned
from biphase.kernels.sample.buffers import (
    FIRST_BINS,
    LAST_BINS,
    MAX_SPLITS,
    MIDDLE_BINS,
    SampleOut,
    SampleWorkspace,
    group_size,
    num_groups,
)
from biphase.kernels.sample.draw_row import MAX_TOP_LOGPROBS
from biphase.kernels.sample.params import SampleParams
from biphase.kernels.sample.triton_draw import draw_kernel
from biphase.kernels.sample.triton_kernel import prepare_kernel
from biphase.kernels.sample.triton_select import digit_kernel

OP = "sample"
VOCAB_START_MULTIPLE = 32
"""A shard begins at a whole word of the bitmask, which is a whole philox block too."""
_MAX_REGISTERS = 128
"""Left alone, ptxas aims lower and spills a few bytes."""
_LOGIT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def sample(
    logits_RV: torch.Tensor,
    params: SampleParams,
    out: SampleOut,
    workspace: SampleWorkspace,
    *,
    late_ids: torch.Tensor | None = None,
    vocab_start: int = 0,
    reduce_max: Callable[[torch.Tensor], None] | None = None,
    settings: Settings | None = None,
) -> None:
    """Draw row i of ``logits`` [R, V] (rows aligned to 16 bytes) as row i of ``params`` says.

    ``late_ids`` int64: the last step's ``out.token_ids``, may be the same tensor; see ``SampleParams.fill``.
    Logits may be one shard of the vocabulary, from global id ``vocab_start`` on (a multiple of 32; masks are the
    shard's own): ``reduce_max`` then makes a tensor [R] float32 the maximum over the shards, in place and on the
    stream, and ``merge_shards`` picks among the shards' ``out``. Top-k, top-p and log-probabilities need it whole.
    Raises ValueError naming the argument.
    """
    num_rows, vocab_size = _check(logits_RV, params, out, workspace, late_ids, vocab_start, reduce_max)
    target = target_of(logits_RV.device)
    chosen = settings or tuned(OP, target, key(num_rows)) or default(target, num_rows)
    tile, warps = chosen["TILE"], chosen["num_warps"]
    num_tiles = -(-vocab_size // tile)
    tiles_per_split = -(-num_tiles // min(chosen["splits"], MAX_SPLITS))
    grid = (num_rows, -(-num_tiles // tiles_per_split))
    common: dict[str, Any] = {
        "TILE": tile,
        "MAX_SPLITS": MAX_SPLITS,
        "num_warps": warps,
        "enable_fp_fusion": False,  # edits and z are rounded as on the CPU
        "maxnreg": _MAX_REGISTERS,
    }
    searched = {"GROUP": group_size(vocab_size), "NUM_GROUPS": num_groups(vocab_size)}
    row_data = (logits_RV, logits_RV.stride(0), params.words, workspace.edits)
    launch(
        prepare_kernel,
        grid,
        *row_data,
        workspace.counts,
        workspace.edits.stride(0),
        out.token_ids if late_ids is None else late_ids,
        workspace.row_max,
        workspace.state,
        workspace.partial_values,
        workspace.partial_ids,
        workspace.groups,
        vocab_start,
        vocab_size,
        tiles_per_split,
        **common,
        **searched,
    )
    if reduce_max is not None:
        reduce_max(workspace.row_max[:num_rows])
    for by_mass in (False, True):
        for digit in range(3):
            launch(
                digit_kernel,
                grid,
                *row_data,
                workspace.edits.stride(0),
                workspace.row_max,
                workspace.state,
                workspace.histogram,
                workspace.split_histogram,
                workspace.ties_before,
                vocab_size,
                tiles_per_split,
                BY_MASS=by_mass,
                DIGIT=digit,
                FIRST_BINS=FIRST_BINS,
                MIDDLE_BINS=MIDDLE_BINS,
                LAST_BINS=LAST_BINS,
                **common,
            )
    launch(
        draw_kernel,
        grid,
        *row_data,
        workspace.edits.stride(0),
        workspace.row_max,
        workspace.state,
        workspace.partial_values,
        workspace.partial_ids,
        workspace.partial_sums,
        workspace.groups,
        workspace.ties_before,
        out.token_ids,
        out.scores,
        out.logprobs,
        out.top_ids,
        out.top_logprobs,
        vocab_start,
        vocab_size,
        tiles_per_split,
        MAX_TOP=MAX_TOP_LOGPROBS,
        **common,
        **searched,
    )


def key(num_rows: int) -> str:
    """Rows up to the next power of two."""
    return f"R{1 << max(0, num_rows - 1).bit_length()}"


def default(target: Target, num_rows: int) -> Settings:
    """Enough programs for eight per multiprocessor, as far as one row's work divides."""
    splits = min(MAX_SPLITS, max(4, 8 * target.num_sms // max(1, num_rows)))
    return {"TILE": 1024, "splits": splits, "num_warps": 4}


def candidates(target: Target, key: str) -> list[Settings]:
    """Settings worth measuring for ``key``."""
    rows = int(key[1:])
    fewest, most = target.num_sms, 32 * target.num_sms
    return [
        {"TILE": tile, "splits": splits, "num_warps": warps}
        for tile in (1024, 2048)
        for warps in (4, 8)
        for splits in (2, 4, 8, 16, 32, 64)
        if min(fewest, rows * MAX_SPLITS) <= rows * splits <= max(most, rows * 2)
    ]


def _check(
    logits_RV: torch.Tensor,
    params: SampleParams,
    out: SampleOut,
    workspace: SampleWorkspace,
    late_ids: torch.Tensor | None,
    vocab_start: int,
    reduce_max: object,
) -> tuple[int, int]:
    check_dtype("logits", logits_RV, *_LOGIT_DTYPES)
    check_shape("logits", logits_RV, None, None)
    check_rows("logits", logits_RV)
    rows, vocab = logits_RV.shape
    for name, limit in (("params", params.max_rows), ("workspace", workspace.max_rows), ("out", len(out.token_ids))):
        if rows > limit:
            raise ValueError(f"{name} has room for {limit} rows, logits has {rows}")
    for name, size in (("params", params.vocab_size), ("workspace", workspace.vocab_size)):
        if size != vocab:
            raise ValueError(f"{name} is made for a vocabulary of {size}, logits has {vocab}")
    if late_ids is not None:
        check_dtype("late_ids", late_ids, torch.int64)
        check_shape("late_ids", late_ids, None)
        check_rows("late_ids", late_ids)
    num_late = (out.token_ids if late_ids is None else late_ids).shape[0]
    if params.last_late_row >= num_late:
        raise ValueError(f"late_ids has {num_late} entries, a row takes entry {params.last_late_row}")
    if vocab_start < 0 or vocab_start % VOCAB_START_MULTIPLE:
        raise ValueError(f"vocab_start is {vocab_start}, it must be a multiple of {VOCAB_START_MULTIPLE}")
    if (vocab_start or reduce_max is not None) and params.has_filters:
        raise ValueError("reduce_max: top-k, top-p and log-probabilities need logits of the whole vocabulary")
    check_same_device(
        logits=logits_RV, params=params.words, workspace=workspace.edits, out=out.token_ids, late_ids=late_ids
    )
    return rows, vocab
