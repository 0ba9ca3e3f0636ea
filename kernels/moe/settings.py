"""Launch settings of the products by expert: defaults by GPU and shape, and what is worth measuring beside them.

Two regimes. Few pairs per expert (decode): the weights' stream bounds, so tiles are as low as their pairs and programs
small enough that several on a multiprocessor keep loads in flight. Many (prefill): the matrix unit bounds, so tiles are
as large as registers, or tensor memory, and shared memory hold.
"""

from biphase.kernels.gpu.target import Target
from biphase.kernels.gpu.tuning import Settings, tuned

ROUTE, PRODUCT = "moe_route", "moe_product"
_TILE_ROWS = (16, 32, 64, 128)
_FULL_UP_TO = {16: 8, 32: 20, 64: 64}
"""Pairs per expert on average up to which nearly all experts fit into one tile of so many rows."""


def tile_rows(num_pairs: int, num_experts: int, target: Target, itemsize: int) -> int:
    """Rows of a step's tiles: those that the table or the default gives for so many pairs per expert."""
    each = -(-num_pairs // num_experts)
    bucket = 1 << max(0, each - 1).bit_length()
    if (found := tuned(ROUTE, target, f"pairs{bucket}")) is not None:
        return found["TILE_ROWS"]
    rows = next((rows for rows, most in _FULL_UP_TO.items() if each <= most), _TILE_ROWS[-1])
    return min(rows, 64) if itemsize == 4 else rows


def product_settings(
    target: Target, *, rows: int, gated: bool, num_out: int, num_in: int, num_experts: int, itemsize: int
) -> Settings:
    """BLOCK_N, BLOCK_K, GROUP_M, num_warps, num_stages of one product whose tiles have ``rows`` rows."""
    key = product_key(
        rows=rows, gated=gated, num_out=num_out, num_in=num_in, num_experts=num_experts, itemsize=itemsize
    )
    return tuned(PRODUCT, target, key) or default_settings(target, key)


def product_key(*, rows: int, gated: bool, num_out: int, num_in: int, num_experts: int, itemsize: int) -> str:
    return f"M{rows}:{'gated' if gated else 'plain'}:E{num_experts}:O{num_out}:I{num_in}:B{itemsize}"


def default_settings(target: Target, key: str) -> Settings:
    """Of a gated product BLOCK_N counts once for gate and once for up."""
    rows, gated, num_in, itemsize = _parts(key)
    if itemsize == 4:  # no matrix unit multiplies float32 exactly: small tiles on the vector units
        return _settings(16 if gated else 32, 32, 8, 4, 2)
    if rows < 128:
        width = 32 if gated else 64
        block_k = 128 if num_in >= 128 else 64
        if rows == 64:
            width, block_k = 2 * width, 64
        return _settings(width, block_k, 8, 4, 4)
    if target.capability >= 90:
        return _settings(128 if gated else 256, 64, 16, 8, 4 if target.capability == 90 else 3)
    return _settings(64 if gated else 128, 64, 16, 8, 3)


def candidates(target: Target, key: str) -> list[Settings]:
    """Worth measuring: all fit into shared memory."""
    rows, gated, _, itemsize = _parts(key)
    if itemsize == 4:
        return [default_settings(target, key)]
    found = []
    widths = (32, 64, 128) if rows < 128 else (64, 128, 256)
    for width in widths:  # of the weights' rows in a tile
        for block_k in (64, 128) if rows < 128 else (32, 64):
            for warps in (4, 8):
                for stages in (3, 4, 5, 6):
                    used = stages * (rows + width) * block_k * itemsize
                    if used > target.shared_bytes or rows * width > warps * 32 * 128:
                        continue
                    block_n = width // 2 if gated else width
                    found += [_settings(block_n, block_k, group, warps, stages) for group in _groups(rows)]
    return found


def _groups(rows: int) -> tuple[int, ...]:
    return (8,) if rows < 128 else (8, 16, 32)


def _settings(block_n: int, block_k: int, group: int, warps: int, stages: int) -> Settings:
    return {"BLOCK_N": block_n, "BLOCK_K": block_k, "GROUP_M": group, "num_warps": warps, "num_stages": stages}


def _parts(key: str) -> tuple[int, bool, int, int]:
    """(rows, gated, input features, bytes of an element) of a key."""
    rows, kind, _, _, num_in, itemsize = key.split(":")
    return int(rows[1:]), kind == "gated", int(num_in[1:]), int(itemsize[1:])
