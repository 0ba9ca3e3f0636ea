"""Launch settings per GPU and shape, from the checked-in table that scripts/tune_kernels.py writes. Never tuned while
serving; what the table lacks gets the op's default."""

import functools
import json
from pathlib import Path

from biphase.kernels.gpu.target import Target

TABLE = Path(__file__).with_name("tuning_table.json")

Settings = dict[str, int]
"""Block sizes by the kernel's constexpr names, num_warps, num_stages."""


@functools.cache
def table() -> dict[str, dict[str, dict[str, Settings]]]:
    """GPU name or ``sm_90`` -> op -> key -> settings."""
    found: dict[str, dict[str, dict[str, Settings]]] = json.loads(TABLE.read_text())["settings"]
    return found


@functools.cache
def tuned(op: str, target: Target, key: str) -> Settings | None:
    """The entry of this very GPU, else of its architecture, else None. ``key``: the op's own name for a shape class."""
    for device in (target.name, f"sm_{target.capability}"):
        settings = table().get(device, {}).get(op, {}).get(key)
        if settings is not None:
            return settings
    return None
