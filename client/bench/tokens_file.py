"""Recorded answers: a JSON Lines file of prompts, the tokens that a model gave them, and how clear each choice was.

The first line is a header: {"biphase_tokens": 1, "model": NAME, "model_hash": HEX}. Then one line per prompt: {"prompt_ids",
"tokens", "margin"}, and for a sampled one "temperature" and "seed". ``margin`` is the smallest gap between the two best
logits of any token of the answer, null where it is not known; below MIN_MARGIN the choice hangs on the order of sums, which
differs between batches, and the prompt is not used.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from biphase.protos.errors import SetupError

MIN_MARGIN = 1e-3
_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """One prompt and its answer, end-of-sequence ignored."""

    prompt_ids: tuple[int, ...]
    tokens: tuple[int, ...]
    margin: float | None
    temperature: float = 0.0
    seed: int | None = None

    @property
    def clear(self) -> bool:
        """Whether every right computation gives these tokens, as far as is known."""
        return bool(self.tokens) and (self.margin is None or self.margin >= MIN_MARGIN)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recording:
    """``model_hash``: of the weights that gave the answers; empty where unknown."""

    model: str
    model_hash: str
    prompts: tuple[Recorded, ...]

    @property
    def usable(self) -> tuple[Recorded, ...]:
        return tuple(one for one in self.prompts if one.clear)


def write_recording(path: Path, recording: Recording) -> None:
    """Raises SetupError where the file cannot be written."""
    header = {"biphase_tokens": _VERSION, "model": recording.model, "model_hash": recording.model_hash}
    lines = [json.dumps(header), *(json.dumps(_line(one), separators=(",", ":")) for one in recording.prompts)]
    try:
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    except OSError as error:
        raise SetupError(f"cannot write {path}: {error.strerror}") from error


def _line(one: Recorded) -> dict[str, Any]:
    line: dict[str, Any] = {"prompt_ids": one.prompt_ids, "tokens": one.tokens, "margin": one.margin}
    if one.temperature:
        line |= {"temperature": one.temperature, "seed": one.seed}
    return line


def read_recording(path: Path) -> Recording:
    """Raises SetupError naming the line that is not as it should be."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SetupError(f"cannot read {path}: {getattr(error, 'strerror', None) or 'it is not UTF-8'}") from error
    header = _object(path, 1, lines[0] if lines else "")
    if header.get("biphase_tokens") != _VERSION:
        raise SetupError(f"{path}: no recording of tokens (its first line has no biphase_tokens {_VERSION})")
    return Recording(
        model=str(header.get("model", "")),
        model_hash=str(header.get("model_hash", "")),
        prompts=tuple(_recorded(path, number, line) for number, line in enumerate(lines[1:], start=2) if line.strip()),
    )


def _recorded(path: Path, number: int, line: str) -> Recorded:
    values = _object(path, number, line)
    margin, temperature, seed = values.get("margin"), values.get("temperature", 0.0), values.get("seed")
    if not _is_number(margin, none=True) or not _is_number(temperature) or not isinstance(seed, int | None):
        raise SetupError(f"{path}:{number}: margin, temperature and seed are numbers")
    return Recorded(
        prompt_ids=_ids(path, number, values, "prompt_ids"),
        tokens=_ids(path, number, values, "tokens"),
        margin=margin,
        temperature=temperature,
        seed=seed,
    )


def _object(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        values = json.loads(line)
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise SetupError(f"{path}:{number}: not a JSON object")
    return values


def _ids(path: Path, number: int, values: dict[str, Any], key: str) -> tuple[int, ...]:
    found: Sequence[object] = values.get(key) if isinstance(values.get(key), list) else ()  # type: ignore[assignment]
    ids = tuple(one for one in found if isinstance(one, int) and not isinstance(one, bool) and 0 <= one < 1 << 32)
    if not found or len(ids) != len(found):
        raise SetupError(f"{path}:{number}: {key} is a list of token ids, at least one")
    return ids


def _is_number(value: object, *, none: bool = False) -> bool:
    return (none and value is None) or (isinstance(value, int | float) and not isinstance(value, bool))
