"""The deploy file's strict schema. Pydantic ends here: ``load_deployment`` returns frozen dataclasses.

Every mistake is one SetupError line that names the file, the line, the key, the value and the limit.
"""

import dataclasses
import difflib
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, create_model, model_validator

from biphase.cluster.deployment import (
    Deployment,
    Device,
    Dtype,
    KvCodec,
    KvDtype,
    KvTransport,
    LoadFormat,
    Placement,
    RolePlan,
)
from biphase.cluster.router_places import RouterPlace, reason_against
from biphase.protos.errors import SetupError, one_line
from biphase.protos.step_time import StepTime
from biphase.router.config import RequestLimits

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
MIN_KV_MEMORY_BYTES = 2**20
NAME_PATTERN = r"^[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?$"
MAX_LIMIT = 2**40
MAX_PARALLEL = 64
SHORT_NAMES = {"tp": "tensor_parallel_size", "pp": "pipeline_parallel_size"}
"""Of a role's keys."""
_PLAN, _DEPLOYMENT = RolePlan(), Deployment(model="")


def parse_bytes(value: str | int) -> int:
    """ "2GiB", "512 MiB", "1.5gb" or a number of bytes. Raises ValueError."""
    text = "" if isinstance(value, bool) else str(value)
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    if match is None or match[2].lower() not in _UNITS:
        raise ValueError("give bytes as a number or with a unit, as in 2GiB")
    num_bytes = int(float(match[1]) * _UNITS[match[2].lower()])
    if num_bytes < MIN_KV_MEMORY_BYTES:
        raise ValueError(f"{num_bytes} bytes is less than the least, {MIN_KV_MEMORY_BYTES} (1MiB)")
    return num_bytes


Bytes = Annotated[int, BeforeValidator(parse_bytes)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class _StepTimeSchema(_Strict):
    """Of one engine step: for itself, for each new token, for each token that a new one attends to."""

    fixed_ms: float = Field(0.0, ge=0, le=60_000)
    per_token_us: float = Field(0.0, ge=0, le=100_000)
    per_context_us: float = Field(0.0, ge=0, le=100_000)

    @model_validator(mode="after")
    def _costs_something(self) -> Self:
        if not (self.fixed_ms or self.per_token_us or self.per_context_us):
            raise ValueError("a step that takes no time; give fixed_ms, per_token_us or per_context_us above 0")
        return self

    def to_step_time(self) -> StepTime:
        return StepTime(
            fixed_s=self.fixed_ms / 1e3,
            per_token_s=self.per_token_us / 1e6,
            per_context_s=self.per_context_us / 1e6,
            num_steps=1,
        )


class _RolePlanSchema(_Strict):
    replicas: int = Field(_PLAN.replicas, ge=0, le=256)
    tensor_parallel_size: int = Field(_PLAN.tensor_parallel_size, ge=1, le=MAX_PARALLEL)
    pipeline_parallel_size: int = Field(_PLAN.pipeline_parallel_size, ge=1, le=MAX_PARALLEL)
    threads: int | None = Field(_PLAN.threads, ge=1, le=1024)
    cpus: float = Field(_PLAN.cpus, ge=0, le=1024)
    gpus: float | None = Field(_PLAN.gpus, ge=0, le=1)
    kv_memory: Bytes | None = _PLAN.kv_memory_bytes
    block_size: int | None = Field(_PLAN.block_size, ge=1, le=1024)
    max_num_seqs: int = Field(_PLAN.max_num_seqs, ge=1, le=4096)
    max_num_batched_tokens: int = Field(_PLAN.max_num_batched_tokens, ge=1, le=1_000_000)
    max_queued_tokens: int | None = Field(_PLAN.max_queued_tokens, ge=1, le=100_000_000)
    step_time: _StepTimeSchema | None = None

    def to_plan(self) -> RolePlan:
        values = self.model_dump(exclude={"step_time"})
        step_time = self.step_time.to_step_time() if self.step_time is not None else _PLAN.step_time
        return RolePlan(kv_memory_bytes=values.pop("kv_memory"), step_time=step_time, **values)


class _RouterSchema(_Strict):
    name: str | None = Field(None, pattern=NAME_PATTERN)
    host: str | None = Field(None, min_length=1)
    port: int | None = Field(None, ge=0, le=65535)
    node: str = ""

    def to_place(self, index: int, host: str, port: int) -> RouterPlace:
        """What the entry leaves out is the deployment's."""
        return RouterPlace(
            name=self.name or f"router-{index}",
            host=self.host or host,
            port=port if self.port is None else self.port,
            node=self.node,
        )


if TYPE_CHECKING:
    _LimitsSchema = _Strict
else:
    _LimitsSchema = create_model(
        "_LimitsSchema",
        __base__=_Strict,
        **{
            item.name: (item.type, Field(item.default, gt=0, le=MAX_LIMIT))
            for item in dataclasses.fields(RequestLimits)
        },
    )


class _DeploymentSchema(_Strict):
    model: str = Field(min_length=1)
    load_format: LoadFormat = _DEPLOYMENT.load_format
    device: Device = _DEPLOYMENT.device
    dtype: Dtype = _DEPLOYMENT.dtype
    kv_dtype: KvDtype = _DEPLOYMENT.kv_dtype
    name: str = Field(_DEPLOYMENT.name, pattern=NAME_PATTERN)
    served_model_name: str = _DEPLOYMENT.served_model_name
    mode: Literal["auto", "strict"] = _DEPLOYMENT.mode
    backend: Literal["ray", "process"] = _DEPLOYMENT.backend
    host: str = Field(_DEPLOYMENT.host, min_length=1)
    port: int = Field(_DEPLOYMENT.port, ge=0, le=65535)
    prefill: _RolePlanSchema = Field(default_factory=lambda: _RolePlanSchema.model_validate({}))
    decode: _RolePlanSchema = Field(default_factory=lambda: _RolePlanSchema.model_validate({}))
    max_model_len: int | None = Field(_DEPLOYMENT.max_model_len, ge=2, le=10_000_000)
    weights_cache: str | None = _DEPLOYMENT.weights_cache
    kv_transport: KvTransport = _DEPLOYMENT.kv_transport
    kv_codec: KvCodec = _DEPLOYMENT.kv_codec
    kv_overlap: bool = _DEPLOYMENT.kv_overlap
    inject_faults: str = _DEPLOYMENT.inject_faults
    limits: _LimitsSchema = Field(default_factory=lambda: _LimitsSchema.model_validate({}))
    drain_s: float = Field(_DEPLOYMENT.drain_s, ge=0, le=86_400)
    start_timeout_s: float = Field(_DEPLOYMENT.start_timeout_s, gt=0, le=86_400)
    flip_grace_s: float = Field(_DEPLOYMENT.flip_grace_s, gt=0, le=86_400)
    replace_after_s: float = Field(_DEPLOYMENT.replace_after_s, gt=0, le=86_400)
    max_replays: int = Field(_DEPLOYMENT.max_replays, ge=0, le=1000)
    controller_port: int = Field(_DEPLOYMENT.controller_port, ge=0, le=65535)
    routers: list[_RouterSchema] | None = Field(None, min_length=1, max_length=64)
    placement: Placement = _DEPLOYMENT.placement
    autoscale: str | dict[str, Any] = _DEPLOYMENT.autoscale

    def to_deployment(self) -> Deployment:
        values = self.model_dump(exclude={"prefill", "decode", "limits", "routers"})
        if isinstance(self.autoscale, dict):
            values["autoscale"] = json.dumps(self.autoscale)
        return Deployment(
            **values,
            prefill=self.prefill.to_plan(),
            decode=self.decode.to_plan(),
            limits=RequestLimits(**self.limits.model_dump()),
            routers=tuple(
                entry.to_place(index, self.host, self.port) for index, entry in enumerate(self.routers or ())
            ),
        )


def load_deployment(path: Path, overrides: Mapping[str, Any] | None = None) -> Deployment:
    """Read a deploy file; ``overrides`` (flags) win over its keys, within prefill and decode key by key.

    Raises SetupError, one line, for a missing file, bad YAML or a bad key or value.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else one_line(error)
        raise SetupError(f"cannot read deploy file {path}: {reason}") from error
    try:
        values, lines = yaml.safe_load(text), _lines_of(text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark is not None else str(path)
        raise SetupError(f"{where}: not valid YAML: {getattr(error, 'problem', None) or one_line(error)}") from error
    if not isinstance(values, dict):
        raise SetupError(f"{path}: a deploy file is a mapping of keys such as model, prefill and decode")
    if isinstance(policy := values.get("autoscale"), str) and policy:  # beside the file, wherever that is read from
        values["autoscale"] = str((path.parent / policy).absolute())
    deployment = deployment_from(values, source=str(path), lines=lines)  # the file's own mistakes first
    if overrides:
        merged = merge(with_long_names(values), with_long_names(overrides))
        deployment = deployment_from(merged, source=f"{path} with the flags given")
    return deployment


def with_long_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """``tp`` and ``pp`` of a role under their long names. A key that is given by both is left, and refused as unknown."""
    renamed = dict(values)
    for role in ("prefill", "decode"):
        plan = values.get(role)
        if isinstance(plan, Mapping):
            renamed[role] = {
                long if (long := SHORT_NAMES.get(key, key)) == key or long not in plan else key: value
                for key, value in plan.items()
            }
    return renamed


def merge(values: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """``overrides`` over ``values``; mappings are merged key by key."""
    merged = dict(values)
    for key, value in overrides.items():
        inner = merged.get(key)
        merged[key] = merge(inner if isinstance(inner, dict) else {}, value) if isinstance(value, Mapping) else value
    return merged


def deployment_from(
    values: Mapping[str, Any],
    *,
    source: str = "",
    lines: Mapping[tuple[str, ...], int] | None = None,
    named: Callable[[tuple[str, ...]], str] = ".".join,
) -> Deployment:
    """Check ``values`` as a deploy file's content.

    For the message: ``source`` begins it, ``lines`` maps a key's path to its line, ``named`` says what a path is called.
    """
    try:
        deployment = _DeploymentSchema.model_validate(with_long_names(values)).to_deployment()
    except ValidationError as error:
        errors = error.errors(include_url=False)
        # a misspelt key before the missing one that it was meant to be
        first = next((found for found in errors if found["type"] == "extra_forbidden"), errors[0])
        path = tuple(str(part) for part in first["loc"])
        line = _line(path, lines or {})
        where = f"{source}{f':{line}' if line else ''}: " if source else ""
        raise SetupError(where + _explain(path, dict(first), named)) from error
    problem = _contradiction(deployment)
    if problem is not None:
        raise SetupError(f"{source}: {problem}" if source else problem)
    return deployment


def _contradiction(deployment: Deployment) -> str | None:
    """What each value alone cannot show."""
    if deployment.decode.replicas == 0:
        return "decode.replicas is 0: at least 1 decode instance is needed, prefill alone ends no request"
    if deployment.mode == "strict" and deployment.prefill.replicas == 0:
        return "mode is strict with prefill.replicas 0: strict needs at least 1 prefill instance"
    for role, plan in (("prefill", deployment.prefill), ("decode", deployment.decode)):
        if plan.parallel.num_ranks > 1 and plan.gpus not in (None, 0, 1):
            return (
                f"{role}.gpus is {plan.gpus:g} with {plan.parallel}: each rank of an instance needs a GPU of its own, "
                "give 1, or 0 for the CPU"
            )
    if deployment.routers:
        reason = reason_against(deployment.routers, deployment.backend)
        if reason is not None:
            return reason
    if deployment.inject_faults:
        from biphase.kvtransfer.faults import FaultPlan

        try:
            FaultPlan.parse(deployment.inject_faults)
        except SetupError as error:
            return f"inject_faults: {one_line(error)}"
    if deployment.device == "cpu" and deployment.kv_transport == "cuda_ipc":
        return "kv_transport is cuda_ipc with device cpu: it joins GPUs of one host, shm is its like on the CPU"
    if deployment.device == "cpu":
        for name in ("dtype", "kv_dtype"):
            if getattr(deployment, name) not in ("auto", "float32"):
                return f"{name} is {getattr(deployment, name)} with device cpu: the CPU computes in float32"
        for role, plan in (("prefill", deployment.prefill), ("decode", deployment.decode)):
            if plan.gpus:
                return f"{role}.gpus is {plan.gpus:g} with device cpu: give another device, or leave gpus out"
    if deployment.device == "cuda" and 0 in (deployment.prefill.gpus, deployment.decode.gpus):
        return "device is cuda and gpus is 0: give device auto, or gpus above 0 (a fraction shares a GPU)"
    return None


def _explain(path: tuple[str, ...], error: dict[str, Any], named: Callable[[tuple[str, ...]], str]) -> str:
    key, value, context = named(path), error.get("input"), error.get("ctx", {})
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    shown = repr(value) if len(repr(value)) <= 60 else repr(value)[:57] + "..."
    match error["type"]:
        case "extra_forbidden":
            known = list(_schema_at(path[:-1]).model_fields)
            if path[-1] in SHORT_NAMES and SHORT_NAMES[path[-1]] in known:
                return f"{key} and {SHORT_NAMES[path[-1]]} are the same key, give one of them"
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
            hint = ", of each rank: an instance of several has tensor_parallel_size" if path[-1] == "gpus" else ""
            return f"{key} is {shown}: the most is {context['le']:g}{hint}"
        case "finite_number":
            return f"{key} is {shown}: it must be a finite number"
        case "literal_error":
            return f"{key} is {shown}: it must be {context['expected']}"
        case "string_pattern_mismatch":
            return f"{key} is {shown}: 1 to 63 characters of a-z, 0-9, '.', '_', '-', letters or digits at the ends"
        case "string_too_short":
            return f"{key} is empty"
        case "too_short":
            return f"{key} is empty: the least is {context['min_length']}"
        case "too_long":
            return f"{key} has {context['actual_length']} entries: the most is {context['max_length']}"
        case "value_error":
            return f"{key} is {shown}: {context.get('error', error['msg'])}"
        case "model_type" | "model_attributes_type":
            return f"{key} is {shown}: it must be a mapping of {', '.join(_schema_at(path).model_fields)}"
        case _:
            return f"{key} is {shown}: {error['msg'][0].lower()}{error['msg'][1:]}"


def _schema_at(path: tuple[str, ...]) -> type[BaseModel]:
    schema: type[BaseModel] = _DeploymentSchema
    for part in path:
        if part.isdecimal():  # an entry of a list
            continue
        annotation = schema.model_fields[part].annotation
        for inner in get_args(annotation):  # such a one, a list of such, or none
            found = next(iter(get_args(inner)), inner)
            annotation = found if isinstance(found, type) and issubclass(found, BaseModel) else annotation
        assert isinstance(annotation, type) and issubclass(annotation, BaseModel)
        schema = annotation
    return schema


def _line(path: tuple[str, ...], lines: Mapping[tuple[str, ...], int]) -> int | None:
    while path and path not in lines:
        path = path[:-1]
    return lines.get(path)


def _lines_of(text: str) -> dict[tuple[str, ...], int]:
    """The line of every key, by its path."""
    lines: dict[tuple[str, ...], int] = {}

    def walk(node: yaml.Node | None, path: tuple[str, ...]) -> None:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                if isinstance(key, yaml.ScalarNode):
                    if (*path, key.value) in lines:
                        raise yaml.MarkedYAMLError(
                            problem=f"key {key.value} is given twice", problem_mark=key.start_mark
                        )
                    lines[(*path, key.value)] = key.start_mark.line + 1
                    lines.setdefault((*path, str(SHORT_NAMES.get(key.value, key.value))), key.start_mark.line + 1)
                    walk(value, (*path, key.value))
        elif isinstance(node, yaml.SequenceNode):
            for index, entry in enumerate(node.value):
                lines[(*path, str(index))] = entry.start_mark.line + 1
                walk(entry, (*path, str(index)))

    walk(yaml.compose(text, Loader=yaml.SafeLoader), ())
    return lines
