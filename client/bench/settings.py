"""What a bench is told, checked: from the command's flags to phases, prompts and goals."""

import argparse
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from biphase.client.bench.arrivals import Phase, total_s
from biphase.client.bench.goals import Metric, parse_goals
from biphase.client.bench.lengths import MOST_TOKENS, fixed, parse_lengths
from biphase.client.bench.phases_file import Defaults, read_lengths, read_phases
from biphase.protos.errors import SetupError


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """One load. ``num_prompts`` or the phases' length ends it, whichever comes first."""

    addresses: tuple[str, ...]
    phases: tuple[Phase, ...]
    num_prompts: int | None = None
    goals: Mapping[Metric, float] = field(default_factory=dict)
    seed: int = 0
    salt: int = 0
    temperature: float = 0.0
    ignore_eos: bool = True
    timeout_s: float | None = None
    max_in_flight: int = 4096
    check_tokens: Path | None = None
    record_tokens: Path | None = None
    json_file: Path | None = None
    progress: bool = True

    @property
    def planned_s(self) -> float:
        return total_s(self.phases)


def settings_of(arguments: argparse.Namespace, addresses: tuple[str, ...]) -> Settings:
    """Raises SetupError: one line with the value and what it may be."""
    check_tokens = _path(arguments.check_tokens)
    if arguments.salt and check_tokens is not None:
        raise SetupError("--salt changes random prompts, --check-tokens sends recorded ones: give one of them")
    if arguments.temperature and check_tokens is not None:
        raise SetupError("--temperature is the recording's own with --check-tokens")
    if arguments.respect_eos and check_tokens is not None:
        raise SetupError("--respect-eos ends answers early, --check-tokens compares them whole: give one of them")
    if check_tokens is not None and check_tokens == _path(arguments.record_tokens):
        raise SetupError(f"--check-tokens and --record-tokens are the same file, {check_tokens}")
    for flag, value in (("--temperature", arguments.temperature), ("--request-rate", arguments.request_rate)):
        if not value >= 0:
            raise SetupError(f"{flag} is {value:g}: it must be at least 0")
    if not arguments.burstiness > 0:
        raise SetupError(f"--burstiness is {arguments.burstiness:g}: it must be above 0")
    for flag, seconds in (("--timeout", arguments.timeout), ("--duration", arguments.duration)):
        if seconds is not None and not 0 < seconds < math.inf:
            raise SetupError(f"{flag} is {seconds:g}: a finite number of seconds above 0 is needed")
    for flag, count in (("--num-prompts", arguments.num_prompts), ("--max-in-flight", arguments.max_in_flight)):
        if count is not None and count < 1:
            raise SetupError(f"{flag} is {count}: the least is 1")
    return Settings(
        addresses=addresses,
        phases=tuple(_phases(arguments, recorded=check_tokens is not None)),
        num_prompts=_num_prompts(arguments),
        goals=parse_goals(arguments.goodput or ()),
        seed=arguments.seed,
        salt=arguments.salt,
        temperature=arguments.temperature,
        ignore_eos=not arguments.respect_eos,
        timeout_s=arguments.timeout,
        max_in_flight=arguments.max_in_flight,
        check_tokens=check_tokens,
        record_tokens=_path(arguments.record_tokens),
        json_file=_path(arguments.json),
        progress=not arguments.no_progress,
    )


def _num_prompts(arguments: argparse.Namespace) -> int | None:
    if arguments.num_prompts is None and arguments.duration is None and arguments.phases is None:
        return 100
    return None if arguments.num_prompts is None else int(arguments.num_prompts)


def _phases(arguments: argparse.Namespace, *, recorded: bool) -> list[Phase]:
    """The phases file's; without one, a single phase of the flags. Of a recording, answers are as long as recorded."""
    defaults = Defaults(
        rate=arguments.request_rate,
        burstiness=arguments.burstiness,
        input_tokens=parse_lengths(arguments.input_len or "128", "--input-len", read_lengths),
        output_tokens=fixed(MOST_TOKENS)
        if recorded and arguments.output_len is None
        else parse_lengths(arguments.output_len or "64", "--output-len", read_lengths),
    )
    if arguments.phases is not None:
        if arguments.duration is not None:
            raise SetupError("--duration and --phases: the phases say how long they last, give one of them")
        return read_phases(Path(arguments.phases), defaults)
    seconds = math.inf if arguments.duration is None else arguments.duration
    if math.isinf(defaults.rate) and arguments.num_prompts is None and arguments.duration is not None:
        raise SetupError("--request-rate inf sends everything at once: give --num-prompts")
    if defaults.rate == 0:
        raise SetupError("--request-rate is 0: nothing would be sent")
    return [
        Phase(
            name="all",
            seconds=seconds,
            rate=defaults.rate,
            rate_end=defaults.rate,
            burstiness=defaults.burstiness,
            input_tokens=defaults.input_tokens,
            output_tokens=defaults.output_tokens,
        )
    ]


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text)
