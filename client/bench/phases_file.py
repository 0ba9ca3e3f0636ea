"""The phases file: load that changes over time, as YAML. Strict: an unknown key is refused, with the nearest known one.

burstiness: 1.0            # defaults for the phases below; so may be rate and the lengths
output_len: uniform:16:48
phases:
  - {name: reading, seconds: 150, rate: 2.0, input_len: 400}
  - {name: turning, seconds: 30, rate: [2.0, 4.0], input_len: 200}    # a ramp
  - {name: writing, seconds: 150, rate: 4.0, input_len: 32, output_len: lognormal:96:48}
"""

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from biphase.client.bench.arrivals import Phase
from biphase.client.bench.lengths import Lengths, fixed, parse_lengths
from biphase.protos.errors import SetupError, one_line

_SHARED = ("rate", "burstiness", "input_len", "output_len")


@dataclass(frozen=True, slots=True, kw_only=True)
class Defaults:
    """What a phase takes that says nothing: the flags of the command."""

    rate: float
    burstiness: float
    input_tokens: Lengths
    output_tokens: Lengths


def read_lengths(path: str) -> list[int]:
    """The whole numbers of a file, one a line. Raises SetupError."""
    try:
        words = Path(path).read_text(encoding="utf-8").split()
        return [int(word) for word in words]
    except OSError as error:
        raise SetupError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise SetupError(f"{path}: lengths are whole numbers, one a line ({one_line(error)})") from error


def read_phases(path: Path, defaults: Defaults) -> list[Phase]:
    """Raises SetupError: one line that names the key, the value and what it may be."""
    import yaml  # needed for a phases file alone

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SetupError(f"cannot read phases file {path}: {error.strerror}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark is not None else str(path)
        raise SetupError(f"{where}: not valid YAML: {getattr(error, 'problem', None) or one_line(error)}") from error
    if not isinstance(values, dict) or not isinstance(values.get("phases"), list) or not values["phases"]:
        raise SetupError(f"{path}: a phases file is a mapping with phases, a list of at least one")
    _check_keys(str(path), values, ("phases", *_SHARED))
    shared = {key: values[key] for key in _SHARED if key in values}
    phases = []
    for index, given in enumerate(values["phases"]):
        where = f"{path}: phases[{index}]"
        if not isinstance(given, dict):
            raise SetupError(f"{where} is {given!r}: it must be a mapping")
        _check_keys(where, given, ("name", "seconds", *_SHARED))
        phases.append(_phase(where, index, {**shared, **given}, defaults))
    return phases


def _phase(where: str, index: int, values: Mapping[str, Any], defaults: Defaults) -> Phase:
    if "seconds" not in values:
        raise SetupError(f"{where}: key seconds is missing")
    rate = values.get("rate", defaults.rate)
    rates: Sequence[Any] = rate if isinstance(rate, list) else [rate, rate]
    if len(rates) != 2:
        raise SetupError(f"{where}: rate is {rate!r}: it must be a number, or two for a ramp")
    first, last = (_number(f"{where}: rate", one, least=0.0) for one in rates)
    burstiness = values.get("burstiness", defaults.burstiness)
    return Phase(
        name=str(values.get("name", index)),
        seconds=_number(f"{where}: seconds", values["seconds"], above=0.0),
        rate=first,
        rate_end=last,
        burstiness=burstiness if burstiness == math.inf else _number(f"{where}: burstiness", burstiness, above=0.0),
        input_tokens=_lengths(f"{where}: input_len", values.get("input_len"), defaults.input_tokens),
        output_tokens=_lengths(f"{where}: output_len", values.get("output_len"), defaults.output_tokens),
    )


def _lengths(where: str, value: object, default: Lengths) -> Lengths:
    if value is None:
        return default
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return fixed(value)
    return parse_lengths(str(value), where, read_lengths)


def _number(where: str, value: object, *, least: float = -math.inf, above: float = -math.inf) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise SetupError(f"{where} is {value!r}: it must be a finite number")
    if value < least or value <= above:
        bound = f"at least {least:g}" if value < least else f"above {above:g}"
        raise SetupError(f"{where} is {value:g}: it must be {bound}")
    return float(value)


def _check_keys(where: str, given: Iterable[object], known: Sequence[str]) -> None:
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"known keys: {', '.join(known)}"
            raise SetupError(f"{where}: unknown key {key}: {hint}")
