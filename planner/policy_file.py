"""The policy file's strict schema. Pydantic ends here: ``load_policy`` returns a frozen ``Policy``.

Every mistake is one SetupError line that names the file, the line, the key, the value and the limit; an unknown key comes
with the nearest known one.
"""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from biphase.planner.policy import Policy, contradiction
from biphase.planner.schedules import reason_against
from biphase.protos.errors import SetupError, one_line

DAY_S = 86_400.0
MAX_REPLICAS = 256
_POLICY = Policy()


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class _Budget(_Strict):
    min: float = Field(_POLICY.gpu_budget.min, ge=0, le=1e6)
    max: float = Field(_POLICY.gpu_budget.max, gt=0, le=1e6)


class _Bounds(_Strict):
    min_replicas: int = Field(_POLICY.prefill.min_replicas, ge=0, le=MAX_REPLICAS)
    max_replicas: int = Field(_POLICY.prefill.max_replicas, ge=0, le=MAX_REPLICAS)


class _BudgetChange(_Strict):
    min: float | None = Field(None, ge=0, le=1e6)
    max: float | None = Field(None, gt=0, le=1e6)


class _BoundsChange(_Strict):
    min_replicas: int | None = Field(None, ge=0, le=MAX_REPLICAS)
    max_replicas: int | None = Field(None, ge=0, le=MAX_REPLICAS)


class _Targets(_Strict):
    ttft_ms: float = Field(_POLICY.targets.ttft_ms, gt=0, le=1e9)
    tpot_ms: float = Field(_POLICY.targets.tpot_ms, gt=0, le=1e9)
    percentile: float = Field(_POLICY.targets.percentile, gt=0, lt=100)
    attainment: float = Field(_POLICY.targets.attainment, gt=0, lt=1)


class _Up(_Strict):
    stabilization_s: float = Field(_POLICY.scale_up.stabilization_s, ge=0, le=DAY_S)
    cooldown_s: float = Field(_POLICY.scale_up.cooldown_s, ge=0, le=DAY_S)
    max_step: int = Field(_POLICY.scale_up.max_step, ge=1, le=MAX_REPLICAS)


class _Down(_Up):
    stabilization_s: float = Field(_POLICY.scale_down.stabilization_s, ge=0, le=DAY_S)
    cooldown_s: float = Field(_POLICY.scale_down.cooldown_s, ge=0, le=DAY_S)
    max_step: int = Field(_POLICY.scale_down.max_step, ge=1, le=MAX_REPLICAS)


class _Flip(_Strict):
    enabled: bool = _POLICY.role_flip.enabled
    min_gain: float = Field(_POLICY.role_flip.min_gain, ge=0, le=1)
    cooldown_s: float = Field(_POLICY.role_flip.cooldown_s, ge=0, le=DAY_S)


class _Schedule(_Strict):
    cron: str = Field(min_length=1)
    duration_s: float = Field(gt=0, le=366 * DAY_S)
    time_zone: str = Field("UTC", min_length=1)
    name: str = ""
    gpu_budget: _BudgetChange | None = None
    prefill: _BoundsChange | None = None
    decode: _BoundsChange | None = None


class _Policy(_Strict):
    interval_s: float = Field(_POLICY.interval_s, ge=0.1, le=3600)
    window_s: float = Field(_POLICY.window_s, gt=0, le=DAY_S)
    gpu_budget: _Budget = Field(default_factory=lambda: _Budget.model_validate({}))
    prefill: _Bounds = Field(default_factory=lambda: _Bounds.model_validate({}))
    decode: _Bounds = Field(default_factory=lambda: _Bounds.model_validate({}))
    targets: _Targets = Field(default_factory=lambda: _Targets.model_validate({}))
    scale_up: _Up = Field(default_factory=lambda: _Up.model_validate({}))
    scale_down: _Down = Field(default_factory=lambda: _Down.model_validate({}))
    role_flip: _Flip = Field(default_factory=lambda: _Flip.model_validate({}))
    start_timeout_s: float = Field(_POLICY.start_timeout_s, gt=0, le=DAY_S)
    node_wait_s: float = Field(_POLICY.node_wait_s, gt=0, le=DAY_S)
    schedules: list[_Schedule] = Field(default_factory=list)
    dry_run: bool = _POLICY.dry_run


_INNER: dict[str, type[_Strict]] = {
    "gpu_budget": _Budget,
    "prefill": _Bounds,
    "decode": _Bounds,
    "targets": _Targets,
    "scale_up": _Up,
    "scale_down": _Down,
    "role_flip": _Flip,
    "schedules": _Schedule,
}


def load_policy(path: Path) -> Policy:
    """Read a policy file. Raises SetupError, one line, for a missing file, bad YAML, a bad key or value, a contradiction."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else one_line(error)
        raise SetupError(f"cannot read policy file {path}: {reason}") from error
    return policy_from_text(text, source=str(path))


def policy_from_text(text: str, *, source: str) -> Policy:
    """The same for the text of a policy file, ``source`` by name."""
    try:
        values, lines = yaml.safe_load(text), _lines_of(text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{source}:{mark.line + 1}" if mark is not None else source
        raise SetupError(f"{where}: not valid YAML: {getattr(error, 'problem', None) or one_line(error)}") from error
    if not isinstance(values, dict):
        raise SetupError(f"{source}: a policy file is a mapping of keys such as gpu_budget, prefill and targets")
    return policy_from(values, source=source, lines=lines)


def policy_from(
    values: Mapping[str, Any], *, source: str = "", lines: Mapping[tuple[str, ...], int] | None = None
) -> Policy:
    """Check ``values`` as a policy file's content; ``lines`` maps a key's path to its line, for the message."""
    try:
        policy = Policy.from_values(_Policy.model_validate(values).model_dump())
    except ValidationError as error:
        errors = error.errors(include_url=False)
        # a misspelt key before the missing one that it was meant to be
        first = next((found for found in errors if found["type"] == "extra_forbidden"), errors[0])
        path = tuple(str(part) for part in first["loc"])
        raise SetupError(_where(source, path, lines) + _explain(path, dict(first))) from error
    for index, schedule in enumerate(policy.schedules):
        wrong = reason_against(schedule)
        if wrong is not None:
            key, text = wrong
            path = ("schedules", str(index), key)
            raise SetupError(_where(source, path, lines) + f"{'.'.join(path)} {text}")
    problem = contradiction(policy)
    if problem is not None:
        raise SetupError(_where(source, tuple(problem.split(" ")[0].split(".")), lines) + problem)
    return policy


def _explain(path: tuple[str, ...], error: dict[str, Any]) -> str:
    key, value, context = ".".join(path), error.get("input"), error.get("ctx", {})
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    shown = repr(value) if len(repr(value)) <= 60 else repr(value)[:57] + "..."
    match error["type"]:
        case "extra_forbidden":
            known = _keys_at(path[:-1])
            near = difflib.get_close_matches(path[-1], known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"known keys: {', '.join(known)}"
            return f"unknown key {key}: {hint}"
        case "missing":
            return f"key {key} is missing"
        case "greater_than_equal":
            return f"{key} is {shown}: the least is {context['ge']:g}"
        case "greater_than":
            return f"{key} is {shown}: it must be above {context['gt']:g}"
        case "less_than_equal":
            return f"{key} is {shown}: the most is {context['le']:g}"
        case "less_than":
            return f"{key} is {shown}: it must be below {context['lt']:g}"
        case "finite_number":
            return f"{key} is {shown}: it must be a finite number"
        case "string_too_short":
            return f"{key} is empty"
        case "model_type" | "model_attributes_type":
            return f"{key} is {shown}: it must be a mapping of {', '.join(_keys_at(path))}"
        case "list_type":
            return f"{key} is {shown}: it must be a list"
        case _:
            return f"{key} is {shown}: {error['msg'][0].lower()}{error['msg'][1:]}"


def _keys_at(path: tuple[str, ...]) -> list[str]:
    schema: type[BaseModel] = _Policy
    for part in path:
        schema = _INNER.get(part, schema)
    return list(schema.model_fields)


def _where(source: str, path: tuple[str, ...], lines: Mapping[tuple[str, ...], int] | None) -> str:
    if not source:
        return ""
    known = lines or {}
    while path and path not in known:
        path = path[:-1]
    return f"{source}:{known[path]}: " if path else f"{source}: "


def _lines_of(text: str) -> dict[tuple[str, ...], int]:
    """The line of every key, by its path; items of lists by their number."""
    lines: dict[tuple[str, ...], int] = {}

    def walk(node: yaml.Node | None, path: tuple[str, ...]) -> None:
        if isinstance(node, yaml.SequenceNode):
            for index, item in enumerate(node.value):
                lines[(*path, str(index))] = item.start_mark.line + 1
                walk(item, (*path, str(index)))
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                if isinstance(key, yaml.ScalarNode):
                    if (*path, key.value) in lines:
                        raise yaml.MarkedYAMLError(
                            problem=f"key {key.value} is given twice", problem_mark=key.start_mark
                        )
                    lines[(*path, key.value)] = key.start_mark.line + 1
                    walk(value, (*path, key.value))

    walk(yaml.compose(text, Loader=yaml.SafeLoader), ())
    return lines
