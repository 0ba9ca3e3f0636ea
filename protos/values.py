"""Value types that several folders share. Plain frozen dataclasses: no protobuf, no gRPC, no torch."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Literal

from biphase.protos.ids import Incarnation, InstanceName, TicketId
from biphase.protos.step_time import RecentSteps, StepTime

Role = Literal["prefill", "decode"]
ROLES: tuple[Role, ...] = ("prefill", "decode")
Mode = Literal["auto", "strict"]
LegOutcome = Literal["done", "cancelled", "handoff_failed", "lease_expired", "failed", "drained"]
"""How one request's work on one instance ended."""


class FinishReason(Enum):
    """Why a request's output ended."""

    STOP = "stop"
    """EOS, a stop token id or a stop string."""
    LENGTH = "length"
    """max_tokens reached or the context used up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How a request's tokens are chosen, fully resolved.

    ``temperature`` 0 is greedy; ``top_k`` 0, ``top_p`` 1 and ``min_p`` 0 switch those filters off. ``max_tokens`` and
    ``min_tokens`` count output tokens, forced ones (of a replay) included. ``seed`` is 64 bits, unsigned.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    branch: int = 0
    max_tokens: int = 16
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class KvTicket:
    """The right to pull one request's KV from a prefill instance; 128 random bits plus where to go."""

    id: TicketId
    kv_address: str
    instance: InstanceName
    incarnation: Incarnation
    num_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """What an instance says about its model. ``max_model_len`` is prompt and output together, in tokens."""

    name: str
    model_hash: bytes
    vocab_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    architecture: str
    dtype: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LegStats:
    """Where one leg's time went; milliseconds and payload bytes."""

    queue_ms: float = 0.0
    prefill_ms: float = 0.0
    transfer_ms: float = 0.0
    transfer_bytes: int = 0
    exposed_ms: float = 0.0
    decode_ms: float = 0.0
    preemptions: int = 0
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """An instance's announced load. ``room_blocks``: free and not promised to anything admitted or queued."""

    queued_tokens: int = 0
    queued: int = 0
    running: int = 0
    free_blocks: int = 0
    room_blocks: int = 0
    draining: bool = False
    legs: int = 0
    """Open there, prompts that wait to be pulled among them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSignals:
    """What an instance has done since its incarnation began, and what it holds now; ``uptime_s`` since then.

    ``busy_s``: in steps, the one under way so far. ``running_tokens``: context held by what runs. ``recent``: the steps of
    the last seconds. ``step_s``: how long the oldest step under way has run, 0 without one; ``step_expected_s``: what its
    like took so far, 0 where nobody knows.
    """

    uptime_s: float = 0.0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    num_steps: int = 0
    busy_s: float = 0.0
    queued: int = 0
    queued_tokens: int = 0
    running: int = 0
    running_tokens: int = 0
    free_blocks: int = 0
    prefill_step: StepTime = field(default_factory=StepTime)
    decode_step: StepTime = field(default_factory=StepTime)
    recent: RecentSteps = field(default_factory=RecentSteps)
    step_s: float = 0.0
    step_expected_s: float = 0.0
