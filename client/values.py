"""What a client sees: the pieces of an answer and the descriptions of a server. Frozen values, no gRPC."""

from dataclasses import dataclass
from typing import Literal

from biphase.protos.ids import Incarnation, InstanceName, RequestId
from biphase.protos.values import FinishReason, ModelInfo, Role


@dataclass(frozen=True, slots=True, kw_only=True)
class Accepted:
    """The router took the request: its own id of it, the client's id ("" when none was given) and the seed it will use."""

    request_id: RequestId
    client_request_id: str
    seed: int
    prompt_tokens: int
    model: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """A piece of the answer. ``token_ids`` may run ahead of ``text``; ``first_index`` is the output index of the first."""

    text: str
    token_ids: tuple[int, ...]
    first_index: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Tokens: of the prompt, of the output, and how many of the prompt's came from a cache."""

    prompt_tokens: int
    output_tokens: int
    cached_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """Where a request's time went, by the router's and the instances' own clocks: durations in milliseconds.

    The two ``*_at_ms`` count from the request's arrival at the router. ``transfer_bytes`` is the payload of KV that was
    handed off; ``transfer_exposed_ms`` the part of the transfer that the first token did not hide.
    """

    queue_ms: float
    prefill_queue_ms: float
    prefill_ms: float
    transfer_ms: float
    transfer_bytes: int
    transfer_exposed_ms: float
    decode_ms: float
    first_token_at_ms: float
    finished_at_ms: float
    preemptions: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """A finished request. ``ttft_ms`` and ``tpot_ms`` are measured at the client, from sending the request.

    ``tpot_ms`` is (last token - first token) / (output tokens - 1), 0 for a single token. ``stop_reason`` is the stop
    string, or "token:ID", that ended the output, else "". ``replays``: how often it was prefilled again after an
    instance was lost; instances, decision and durations are then those of the last way it took.
    """

    request_id: RequestId
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    stop_reason: str
    usage: Usage
    timeline: Timeline
    decision: Literal["disaggregated", "local"]
    decision_reason: str
    prefill_instance: str
    decode_instance: str
    seed: int
    ttft_ms: float
    tpot_ms: float
    replays: int = 0

    @property
    def instances(self) -> tuple[str, ...]:
        """The instances that worked on the request, in order, each once: "name#incarnation (pid N)"."""
        return tuple(dict.fromkeys(name for name in (self.prefill_instance, self.decode_instance) if name))


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """The model that a router serves."""

    model: ModelInfo
    max_output_tokens: int
    has_chat_template: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Instance:
    """A prefill or decode instance as the router sees it. ``state`` is connecting, ready, lost or draining, since
    ``since_unix_s``; ``legs``: what this router has there now of its requests, where the other counts are the instance's own
    of all routers."""

    name: InstanceName
    role: Role
    incarnation: Incarnation
    address: str
    state: str
    since_unix_s: float
    pid: int
    queued_tokens: int
    running: int
    free_blocks: int
    num_blocks: int
    block_size: int
    threads: int
    kv_bytes: int
    legs: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerInfo:
    """A router's word on itself, its instances and its counters."""

    name: str
    version: str
    pid: int
    mode: str
    uptime_s: float
    instances: tuple[Instance, ...]
    counters: dict[str, int]
