"""What the reconciler wants done: values that the controller's shell performs, one by one. Pure."""

from dataclasses import dataclass

from biphase.cluster.slot import FlipTo


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    name: str
    incarnation: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Kill:
    name: str
    incarnation: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Abandon:
    """A killed life is not seen gone, its host cannot be reached: hold it no more, the next one starts elsewhere."""

    name: str
    incarnation: int
    node: str = ""
    """Where it was, as far as is known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AskToStop:
    name: str
    incarnation: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TellDrain:
    name: str
    incarnation: int
    grace_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TellResume:
    name: str
    incarnation: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TellFlip:
    name: str
    incarnation: int
    to: FlipTo
    grace_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class GiveUp:
    """The deployment cannot start."""

    reason: str


Tell = TellDrain | TellResume | TellFlip
Action = Start | Kill | Abandon | AskToStop | Tell | GiveUp
