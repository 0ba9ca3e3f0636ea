"""Device memory of the Triton decode attention, and how its work is cut: allocated once, the same for every step.

Owns the plan's buffers and the partial results. Which tile size, how many programs: decided here, since the plan and the
attention must agree on them.
"""

import dataclasses
import itertools
from dataclasses import dataclass

import torch

from biphase.kernels.gpu.check import check_dtype, check_one_of
from biphase.kernels.gpu.target import Target, target_of
from biphase.kernels.gpu.tuning import Settings, tuned

OP = "decode_attention"
HEAD_DIMS = (64, 96, 128, 256)
BLOCK_SIZES = (16, 32, 64, 128)
FP8 = torch.float8_e4m3fn
POOL_DTYPES = (torch.bfloat16, torch.float16, torch.float32, FP8)
MAX_SEQS = 4096
MAX_ROWS = 32
_MIN_ROWS = 16
_PLAN_FIELDS = 8
_RUN_FIELDS = 4
_SCRATCH_BYTES = 12 << 10
"""Shared memory beside the tiles: the queries, the weights, what reductions exchange."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeWorkspace:
    """For steps of at most ``max_seqs`` sequences of ``max_query_len`` tokens. ``plan_decode`` fills the plan.

    One plan serves all layers with the same ``window``; a model with two kinds of layers has two, on the same buffers of
    partial results (``with_window``).
    """

    max_seqs: int
    max_query_len: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    kv_dtype: torch.dtype
    window: int | None
    settings: Settings
    resident: int
    """Programs per kv head that the GPU holds at once."""
    num_programs: int
    """Programs per kv head that are launched, whatever the lengths."""
    rows: torch.Tensor
    """``[max_seqs, 8]`` int32: the plan of each sequence."""
    runs: torch.Tensor
    """``[num_programs, 4]`` int32: the tiles and sequences of each program."""
    part_out: torch.Tensor
    """``[2 * num_programs * K * rows * D]`` float32: results over a part of a sequence's keys."""
    part_lse: torch.Tensor
    """``[2 * num_programs * K * rows]`` float32: log2 of their sums of exponentials."""

    @classmethod
    def allocate(
        cls,
        *,
        max_seqs: int,
        max_query_len: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        block_size: int,
        kv_dtype: torch.dtype,
        device: torch.device,
        window: int | None = None,
        settings: Settings | None = None,
    ) -> "DecodeWorkspace":
        """``settings``: instead of the tuned or default ones. Raises ValueError naming the argument."""
        if not 1 <= max_seqs <= MAX_SEQS:
            raise ValueError(f"max_seqs is {max_seqs}, supported: 1 to {MAX_SEQS}")
        if max_query_len < 1:
            raise ValueError(f"max_query_len is {max_query_len}, it must be at least 1")
        if num_kv_heads < 1 or num_heads < 1 or num_heads % num_kv_heads:
            raise ValueError(f"num_heads is {num_heads}, not a multiple of num_kv_heads, {num_kv_heads}")
        if window is not None and window < 1:
            raise ValueError(f"window is {window}, it must be at least 1")
        check_one_of("head_dim", head_dim, HEAD_DIMS)
        check_one_of("block_size", block_size, BLOCK_SIZES)
        target = target_of(device)
        check_dtype("kv_dtype", torch.empty(0, dtype=kv_dtype), *POOL_DTYPES)
        if kv_dtype == FP8:
            target.require_fp8("an fp8 KV cache")
        query_rows = max_query_len * (num_heads // num_kv_heads)
        if settings is None:
            key = key_of(head_dim, kv_dtype, block_size)
            settings = tuned(OP, target, key) or default_settings(target, key)
        columns = num_kv_heads * -(-query_rows // rows_of_program(query_rows))
        resident = max(1, target.num_sms * settings["resident"] // columns)
        num_programs = resident * settings["waves"]
        parts = 2 * num_programs * num_kv_heads * query_rows
        return cls(
            max_seqs=max_seqs,
            max_query_len=max_query_len,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            block_size=block_size,
            kv_dtype=kv_dtype,
            window=window,
            settings=settings,
            resident=resident,
            num_programs=num_programs,
            rows=torch.zeros(max_seqs, _PLAN_FIELDS, dtype=torch.int32, device=device),
            runs=torch.zeros(num_programs, _RUN_FIELDS, dtype=torch.int32, device=device),
            part_out=torch.empty(parts * head_dim, dtype=torch.float32, device=device),
            part_lse=torch.empty(parts, dtype=torch.float32, device=device),
        )

    def with_window(self, window: int | None) -> "DecodeWorkspace":
        """Another plan on the same buffers of partial results."""
        return dataclasses.replace(
            self, window=window, rows=torch.zeros_like(self.rows), runs=torch.zeros_like(self.runs)
        )


def rows_of_program(query_rows: int) -> int:
    """Rows of one program's tile: what tensor cores need at least, a power of two."""
    return min(MAX_ROWS, max(_MIN_ROWS, 1 << (query_rows - 1).bit_length()))


def key_of(head_dim: int, kv_dtype: torch.dtype, block_size: int) -> str:
    return f"D{head_dim} {str(kv_dtype).removeprefix('torch.')} block {block_size}"


def default_settings(target: Target, key: str) -> Settings:
    """Two programs on a multiprocessor, so that one loads while the other begins, joins or computes. Tiles of 16 KiB of K
    and as much of V (fp8: half, its conversions need the registers); at least one more tile on its way per program."""
    row_bytes, is_fp8 = _parse(key)
    room = target.shared_bytes // 2 - _SCRATCH_BYTES
    tile = max(16, min(64 if is_fp8 else 128, (8 << 10 if is_fp8 else 16 << 10) // row_bytes))
    while tile > 16 and 2 * 2 * tile * row_bytes > room:
        tile //= 2
    # a fourth stage of rows this long makes ptxas spill
    stages = max(2, min(4 if row_bytes <= 256 else 3, room // (2 * tile * row_bytes) + 1))
    return _settings(tile, 4, stages, 2, 2)


def candidates(target: Target, key: str) -> list[Settings]:
    """What scripts/tune_kernels.py measures: all that fit in shared memory, as many programs a multiprocessor as then do."""
    row_bytes, _ = _parse(key)
    found = []
    for tile, warps, stages in itertools.product((16, 32, 64, 128), (4, 8), (3, 4, 5)):
        used = 2 * tile * row_bytes * (stages - 1) + _SCRATCH_BYTES
        if used <= target.shared_bytes:
            resident = min(4, target.shared_bytes // used)
            found += [_settings(tile, warps, stages, resident, waves) for waves in (1, 2, 4)]
    return found


def _settings(tile: int, warps: int, stages: int, resident: int, waves: int) -> Settings:
    """``resident``: programs a multiprocessor. ``waves``: of all programs, in turns. ``LONG_RUN``: see plan_kernel.py."""
    return {
        "TILE": tile,
        "num_warps": warps,
        "num_stages": stages,
        "resident": resident,
        "waves": waves,
        "LONG_RUN": 8,
    }


def _parse(key: str) -> tuple[int, bool]:
    """Bytes of a tile per position, of K or of V; whether they are fp8."""
    dim, dtype = key.split()[:2]
    padded = 1 << (int(dim[1:]) - 1).bit_length()
    return padded * {"float32": 4, "float8_e4m3fn": 1}.get(dtype, 2), dtype == "float8_e4m3fn"
