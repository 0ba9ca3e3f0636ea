"""How many tokens a prompt or an answer has: a number, or a distribution that it is drawn from. Pure."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from biphase.client.bench.draws import Draws
from biphase.protos.errors import SetupError

Kind = Literal["fixed", "uniform", "normal", "lognormal", "empirical"]

_FORMS: dict[Kind, str] = {
    "fixed": "N",
    "uniform": "uniform:LEAST:MOST",
    "normal": "normal:MEAN:SD",
    "lognormal": "lognormal:MEAN:SD",
    "empirical": "empirical:FILE",
}
FORMS = ", ".join(_FORMS.values())
MOST_TOKENS = 10_000_000
"""More is a slip of the finger."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """``first`` and ``second``: the number; least and most; mean and standard deviation. Draws are at least 1."""

    kind: Kind
    first: float = 0.0
    second: float = 0.0
    values: tuple[int, ...] = ()
    """Of ``empirical``: what was seen, each as likely as the others."""

    def draw(self, draws: Draws) -> int:
        match self.kind:
            case "fixed":
                return int(self.first)
            case "uniform":
                return int(self.first) + int(draws.random() * (int(self.second) - int(self.first) + 1))
            case "normal":
                return max(1, round(draws.gauss(self.first, self.second)))
            case "lognormal":
                return max(1, round(math.exp(draws.gauss(*self._logarithms()))))
            case "empirical":
                return self.values[int(draws.random() * len(self.values))]

    def _logarithms(self) -> tuple[float, float]:
        """Mean and deviation of the logarithm, for the mean and deviation wanted of the length itself."""
        variance = math.log1p((self.second / self.first) ** 2)
        return math.log(self.first) - variance / 2, math.sqrt(variance)

    @property
    def mean(self) -> float:
        """Before draws below 1 become 1."""
        match self.kind:
            case "uniform":
                return (self.first + self.second) / 2
            case "empirical":
                return sum(self.values) / len(self.values)
            case _:
                return self.first

    @property
    def most(self) -> float:
        """What no draw exceeds; infinite where there is no such bound."""
        match self.kind:
            case "fixed":
                return self.first
            case "uniform":
                return self.second
            case "empirical":
                return max(self.values)
            case _:
                return math.inf

    def __str__(self) -> str:
        match self.kind:
            case "fixed":
                return f"{self.first:g}"
            case "empirical":
                return f"empirical ({len(self.values)} values)"
            case _:
                return f"{self.kind}:{self.first:g}:{self.second:g}"


def fixed(tokens: int) -> Lengths:
    return Lengths(kind="fixed", first=tokens)


def parse_lengths(text: str, name: str, read_values: Callable[[str], Sequence[int]]) -> Lengths:
    """``text`` as one of FORMS; ``name`` begins the message of a SetupError, ``read_values`` reads an empirical file."""
    word, *rest = text.strip().split(":")
    if not rest:
        return fixed(_whole(word, name, text))
    kind: Kind | None = next((known for known in get_args(Kind) if known == word), None)
    if kind is None or kind == "fixed":
        raise SetupError(f"{name} is {text!r}: it must be one of {FORMS}")
    if kind == "empirical":
        values = tuple(read_values(":".join(rest)))
        bad = next((value for value in values if not 1 <= value <= MOST_TOKENS), None)
        if not values or bad is not None:
            what = "holds no value" if bad is None else f"holds {bad}: lengths are 1 to {MOST_TOKENS}"
            raise SetupError(f"{name}: {':'.join(rest)} {what}")
        return Lengths(kind="empirical", values=values)
    if len(rest) != 2:
        raise SetupError(f"{name} is {text!r}: it must be {_FORMS[kind]}")
    if kind == "uniform":
        least, most = (_whole(part, name, text) for part in rest)
        if least > most:
            raise SetupError(f"{name} is {text!r}: the least, {least}, is above the most, {most}")
        return Lengths(kind="uniform", first=least, second=most)
    mean, deviation = (_number(part, name, text) for part in rest)
    if not 1 <= mean <= MOST_TOKENS or not 0 <= deviation <= MOST_TOKENS:
        raise SetupError(f"{name} is {text!r}: the mean is 1 to {MOST_TOKENS}, the deviation 0 to {MOST_TOKENS}")
    return Lengths(kind=kind, first=mean, second=deviation)


def _whole(part: str, name: str, text: str) -> int:
    if not part.isascii() or not part.isdecimal() or not 1 <= int(part) <= MOST_TOKENS:
        raise SetupError(f"{name} is {text!r}: it must be one of {FORMS}, in whole tokens from 1 to {MOST_TOKENS}")
    return int(part)


def _number(part: str, name: str, text: str) -> float:
    try:
        value = float(part)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise SetupError(f"{name} is {text!r}: {part!r} is no finite number")
    return value
