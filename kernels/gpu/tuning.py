"""Launch settings per GPU and shape, from the checked-in table that scripts/tune_kernels.py writes. Never tuned while
serving; what the table lacks gets the op's default."""

import functools
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from biphase.kernels.gpu.target import INTERPRETER, Target

TABLE = Path(__file__).with_name("tuning_table.json")

Settings = dict[str, int]
"""Block sizes by the kernel's constexpr names, num_warps, num_stages."""

Answer = Callable[[str, Target, str], Settings | None]

_answer: Answer | None = None


@functools.cache
def table() -> dict[str, dict[str, dict[str, Settings]]]:
    """GPU name or ``sm_90`` -> op -> key -> settings."""
    found: dict[str, dict[str, dict[str, Settings]]] = json.loads(TABLE.read_text())["settings"]
    return found


def tuned(op: str, target: Target, key: str) -> Settings | None:
    """The entry of this very GPU, else of its architecture, else None. ``key``: the op's own name for a shape class."""
    return _from_table(op, target, key) if _answer is None else _answer(op, target, key)


@contextmanager
def answering(answer: Answer) -> Iterator[None]:
    """Within it ``answer`` speaks for the table: to measure or compile a launch under given settings, or its defaults."""
    global _answer
    before, _answer = _answer, answer
    try:
        yield
    finally:
        _answer = before


@functools.cache
def _from_table(op: str, target: Target, key: str) -> Settings | None:
    if target == INTERPRETER:  # whose capability is borrowed
        return None
    for device in (target.name, f"sm_{target.capability}"):
        settings = table().get(device, {}).get(op, {}).get(key)
        if settings is not None:
            return settings
    return None
