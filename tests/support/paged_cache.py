"""Paged caches for kernel tests: every place that a kernel may not read holds NaN.

K kv heads, D head_dim, T tokens of one sequence, W width of block tables. Pool of one layer: [blocks, 2, K, block_size, D].
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

FP8_LIMIT = 448.0
_EPSILON = {torch.float32: 2.0**-20, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float8_e4m3fn: 2.0**-4}


@dataclass(frozen=True, slots=True, kw_only=True)
class PagedCache:
    """``block_tables`` [B, W] int32: past a sequence's blocks they name a free one. ``context_lens`` [B] int32."""

    pool: torch.Tensor
    block_tables: torch.Tensor
    context_lens: torch.Tensor
    kv_scale: torch.Tensor | None

    @property
    def block_size(self) -> int:
        return self.pool.shape[3]

    def slots(self, sequence: int, positions: Sequence[int]) -> torch.Tensor:
        """[len(positions)] int64: where those tokens of a sequence lie; -1 stays -1."""
        wanted = torch.tensor(positions, dtype=torch.int64, device=self.pool.device)
        blocks = self.block_tables[sequence].long()[wanted.clamp(min=0) // self.block_size]
        return torch.where(wanted < 0, wanted, blocks * self.block_size + wanted % self.block_size)

    def gathered(self, sequence: int, length: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V [T, K, D] of a sequence's tokens in float32, rescaled: what a reference attends to."""
        tokens = int(self.context_lens[sequence]) if length is None else length
        slots = self.slots(sequence, range(tokens))
        rows = self.pool[slots // self.block_size, :, :, slots % self.block_size].float()
        if self.kv_scale is not None:
            rows = rows * self.kv_scale[None, :, :, None]
        return rows[:, 0], rows[:, 1]


def poisoned_pool(
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    *,
    block_size: int,
    dtype: torch.dtype = torch.float32,
    kv_scale: torch.Tensor | None = None,
    reserved_tokens: int = 0,
    num_free: int = 3,
    seed: int = 0,
) -> PagedCache:
    """A pool that holds K and V (one [T, K, D] per sequence, T may be 0) in shuffled blocks.

    NaN in every slot past a length (``reserved_tokens`` more per sequence have blocks already) and in ``num_free`` free
    blocks. fp8 pools take ``kv_scale`` [2, K] float32.
    """
    if (dtype == torch.float8_e4m3fn) != (kv_scale is not None):
        raise ValueError(f"kv_scale goes with fp8, not with {dtype}")
    num_heads, head_dim = keys[0].shape[1:]
    device = keys[0].device
    counts = [-(-(len(key) + reserved_tokens) // block_size) for key in keys]
    num_blocks = sum(counts) + num_free
    order = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(seed)).tolist()
    free, width = order[-1] if num_free else 0, max([*counts, 1])
    pool = torch.empty(num_blocks, 2, num_heads, block_size, head_dim, dtype=dtype, device=device)
    poison(pool)
    tables = torch.full((len(keys), width), free, dtype=torch.int32)
    for row, count in enumerate(counts):
        tables[row, :count] = torch.tensor([order.pop(0) for _ in range(count)], dtype=torch.int32)
    cache = PagedCache(
        pool=pool,
        block_tables=tables.to(device),
        context_lens=torch.tensor([len(key) for key in keys], dtype=torch.int32, device=device),
        kv_scale=kv_scale,
    )
    for row, (key, value) in enumerate(zip(keys, values, strict=True)):
        write_tokens(cache, cache.slots(row, range(len(key))), key, value)
    return cache


def write_tokens(cache: PagedCache, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
    """Writes K and V [T, K, D] at ``slots`` [T], quantised where the cache is fp8; slot -1 writes nothing."""
    rows = torch.stack([keys, values], 1).float()[slots >= 0]
    slots = slots[slots >= 0]
    if cache.kv_scale is not None:
        rows = (rows / cache.kv_scale[None, :, :, None]).clamp(-FP8_LIMIT, FP8_LIMIT)
    bits, size = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[cache.pool.dtype.itemsize], cache.block_size
    # as bits: no index assignment of fp8
    cache.pool.view(bits)[slots // size, :, :, slots % size] = rows.to(cache.pool.dtype).view(bits)


def poison(tensor: torch.Tensor) -> torch.Tensor:
    """Fills with NaN (integers: an absurd negative number), so that what a kernel leaves or reads too much is seen."""
    if tensor.dtype == torch.float8_e4m3fn:
        tensor.view(torch.uint8).fill_(0x7F)
    elif tensor.is_floating_point():
        tensor.fill_(float("nan"))
    else:
        tensor.fill_(-(2 ** (8 * tensor.element_size() - 2)) if tensor.dtype.is_signed else 0xA5)
    return tensor


def assert_near(
    actual: torch.Tensor, expected: torch.Tensor, *, dtype: torch.dtype | None = None, units: float = 4
) -> None:
    """Within ``units`` of the last place of ``dtype`` (default: ``actual``'s), relative to each value or to the largest
    of its row: sums of many terms err by their terms' size, not by their own. NaN never passes."""
    epsilon = _EPSILON[dtype or actual.dtype]
    got, want = actual.double(), expected.double()
    assert got.shape == want.shape, f"shape {list(got.shape)}, expected {list(want.shape)}"
    if not got.numel():
        return
    size = want.abs().amax(-1, keepdim=True).clamp(min=1e-3) if want.dim() else want.abs()
    error = (got - want).abs() / (units * epsilon * size)
    worst = int(error.nan_to_num(nan=torch.inf).argmax())
    at = [int(i) for i in torch.unravel_index(torch.tensor(worst), got.shape)]
    assert bool((error <= 1).all()), (
        f"at {at}: {got.flatten()[worst]:.6g}, expected {want.flatten()[worst]:.6g} "
        f"({error.flatten()[worst]:.3g} of what is allowed; {int((~(error <= 1)).sum())} of {error.numel()} wrong)"
    )
