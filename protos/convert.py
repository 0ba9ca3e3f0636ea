"""Every to_proto / from_proto pair. Generated classes stop at servicers and stubs; the rest of the program sees values."""

import numpy as np

from biphase.protos import common_pb2, worker_pb2
from biphase.protos.ids import Incarnation, InstanceName, TicketId
from biphase.protos.step_time import RecentSteps, StepTime
from biphase.protos.values import (
    FinishReason,
    KvTicket,
    LegOutcome,
    LegStats,
    Load,
    ModelInfo,
    Role,
    Sampling,
    WorkerSignals,
)

_FINISH_TO_PROTO = {
    None: common_pb2.FINISH_NONE,
    FinishReason.STOP: common_pb2.FINISH_STOP,
    FinishReason.LENGTH: common_pb2.FINISH_LENGTH,
}
_FINISH_FROM_PROTO = {value: key for key, value in _FINISH_TO_PROTO.items()}
_ROLE_TO_PROTO: dict[Role, common_pb2.Role.ValueType] = {
    "prefill": common_pb2.ROLE_PREFILL,
    "decode": common_pb2.ROLE_DECODE,
}
_ROLE_FROM_PROTO: dict[int, Role] = {int(value): key for key, value in _ROLE_TO_PROTO.items()}

_OUTCOME_TO_PROTO: dict[LegOutcome, worker_pb2.LegOutcome.ValueType] = {
    "done": worker_pb2.LEG_DONE,
    "cancelled": worker_pb2.LEG_CANCELLED,
    "handoff_failed": worker_pb2.LEG_HANDOFF_FAILED,
    "lease_expired": worker_pb2.LEG_LEASE_EXPIRED,
    "failed": worker_pb2.LEG_FAILED,
    "drained": worker_pb2.LEG_DRAINED,
}
_OUTCOME_FROM_PROTO: dict[int, LegOutcome] = {int(value): key for key, value in _OUTCOME_TO_PROTO.items()}


def pack_tokens(token_ids: list[int] | tuple[int, ...]) -> bytes:
    """Token ids as little-endian uint32."""
    return np.asarray(token_ids, dtype="<u4").tobytes()


def unpack_tokens(data: bytes) -> list[int]:
    """The inverse of pack_tokens. Raises ValueError when the length is no multiple of 4."""
    return [int(token) for token in np.frombuffer(data, dtype="<u4").tolist()]


def finish_to_proto(finish: FinishReason | None) -> common_pb2.FinishReason.ValueType:
    return _FINISH_TO_PROTO[finish]


def finish_from_proto(finish: int) -> FinishReason | None:
    return _FINISH_FROM_PROTO[common_pb2.FinishReason.ValueType(finish)]


def role_to_proto(role: Role) -> common_pb2.Role.ValueType:
    return _ROLE_TO_PROTO[role]


def role_from_proto(role: int) -> Role:
    """Raises KeyError for ROLE_UNSPECIFIED."""
    return _ROLE_FROM_PROTO[int(role)]


def outcome_to_proto(outcome: LegOutcome) -> worker_pb2.LegOutcome.ValueType:
    return _OUTCOME_TO_PROTO[outcome]


def outcome_from_proto(outcome: int) -> LegOutcome:
    """Raises KeyError for LEG_UNSPECIFIED."""
    return _OUTCOME_FROM_PROTO[int(outcome)]


def sampling_to_proto(value: Sampling) -> common_pb2.Sampling:
    return common_pb2.Sampling(
        temperature=value.temperature,
        top_k=value.top_k,
        top_p=value.top_p,
        min_p=value.min_p,
        seed=value.seed,
        branch=value.branch,
        max_tokens=value.max_tokens,
        min_tokens=value.min_tokens,
        ignore_eos=value.ignore_eos,
        stop_token_ids=value.stop_token_ids,
    )


def sampling_from_proto(message: common_pb2.Sampling) -> Sampling:
    return Sampling(
        temperature=message.temperature,
        top_k=message.top_k,
        top_p=message.top_p,
        min_p=message.min_p,
        seed=message.seed,
        branch=message.branch,
        max_tokens=message.max_tokens,
        min_tokens=message.min_tokens,
        ignore_eos=message.ignore_eos,
        stop_token_ids=tuple(message.stop_token_ids),
    )


def ticket_to_proto(value: KvTicket) -> worker_pb2.KvTicket:
    return worker_pb2.KvTicket(
        id=value.id,
        kv_address=value.kv_address,
        instance=value.instance,
        incarnation=value.incarnation,
        num_tokens=value.num_tokens,
    )


def ticket_from_proto(message: worker_pb2.KvTicket) -> KvTicket:
    return KvTicket(
        id=TicketId(message.id),
        kv_address=message.kv_address,
        instance=InstanceName(message.instance),
        incarnation=Incarnation(message.incarnation),
        num_tokens=message.num_tokens,
    )


def model_to_proto(value: ModelInfo) -> common_pb2.ModelInfo:
    return common_pb2.ModelInfo(
        name=value.name,
        model_hash=value.model_hash,
        vocab_size=value.vocab_size,
        max_model_len=value.max_model_len,
        eos_token_ids=value.eos_token_ids,
        architecture=value.architecture,
        dtype=value.dtype,
    )


def model_from_proto(message: common_pb2.ModelInfo) -> ModelInfo:
    return ModelInfo(
        name=message.name,
        model_hash=message.model_hash,
        vocab_size=message.vocab_size,
        max_model_len=message.max_model_len,
        eos_token_ids=tuple(message.eos_token_ids),
        architecture=message.architecture,
        dtype=message.dtype,
    )


def stats_to_proto(value: LegStats) -> worker_pb2.LegStats:
    return worker_pb2.LegStats(
        queue_ms=value.queue_ms,
        prefill_ms=value.prefill_ms,
        transfer_ms=value.transfer_ms,
        transfer_bytes=value.transfer_bytes,
        exposed_ms=value.exposed_ms,
        decode_ms=value.decode_ms,
        preemptions=value.preemptions,
        cached_tokens=value.cached_tokens,
    )


def stats_from_proto(message: worker_pb2.LegStats) -> LegStats:
    return LegStats(
        queue_ms=message.queue_ms,
        prefill_ms=message.prefill_ms,
        transfer_ms=message.transfer_ms,
        transfer_bytes=message.transfer_bytes,
        exposed_ms=message.exposed_ms,
        decode_ms=message.decode_ms,
        preemptions=message.preemptions,
        cached_tokens=message.cached_tokens,
    )


def load_to_proto(value: Load) -> worker_pb2.Load:
    return worker_pb2.Load(
        queued_tokens=value.queued_tokens,
        queued=value.queued,
        running=value.running,
        free_blocks=value.free_blocks,
        room_blocks=value.room_blocks,
        draining=value.draining,
        legs=value.legs,
    )


def load_from_proto(message: worker_pb2.Load) -> Load:
    return Load(
        queued_tokens=message.queued_tokens,
        queued=message.queued,
        running=message.running,
        free_blocks=message.free_blocks,
        room_blocks=message.room_blocks,
        draining=message.draining,
        legs=message.legs,
    )


def step_time_to_proto(value: StepTime) -> worker_pb2.StepTime:
    return worker_pb2.StepTime(
        fixed_s=value.fixed_s,
        per_token_s=value.per_token_s,
        per_context_s=value.per_context_s,
        num_steps=value.num_steps,
    )


def step_time_from_proto(message: worker_pb2.StepTime) -> StepTime:
    return StepTime(
        fixed_s=message.fixed_s,
        per_token_s=message.per_token_s,
        per_context_s=message.per_context_s,
        num_steps=message.num_steps,
    )


def signals_to_proto(value: WorkerSignals) -> worker_pb2.WorkerSignals:
    recent = value.recent
    return worker_pb2.WorkerSignals(
        uptime_s=value.uptime_s,
        prefill_tokens=value.prefill_tokens,
        decode_tokens=value.decode_tokens,
        num_steps=value.num_steps,
        busy_s=value.busy_s,
        queued=value.queued,
        queued_tokens=value.queued_tokens,
        running=value.running,
        running_tokens=value.running_tokens,
        free_blocks=value.free_blocks,
        prefill_step=step_time_to_proto(value.prefill_step),
        decode_step=step_time_to_proto(value.decode_step),
        recent=worker_pb2.RecentSteps(
            num_steps=recent.num_steps,
            seconds=recent.seconds,
            tokens=recent.tokens,
            context_tokens=recent.context_tokens,
        ),
        step_s=value.step_s,
        step_expected_s=value.step_expected_s,
    )


def signals_from_proto(message: worker_pb2.WorkerSignals) -> WorkerSignals:
    recent = message.recent
    return WorkerSignals(
        uptime_s=message.uptime_s,
        prefill_tokens=message.prefill_tokens,
        decode_tokens=message.decode_tokens,
        num_steps=message.num_steps,
        busy_s=message.busy_s,
        queued=message.queued,
        queued_tokens=message.queued_tokens,
        running=message.running,
        running_tokens=message.running_tokens,
        free_blocks=message.free_blocks,
        prefill_step=step_time_from_proto(message.prefill_step),
        decode_step=step_time_from_proto(message.decode_step),
        recent=RecentSteps(
            num_steps=recent.num_steps,
            seconds=recent.seconds,
            tokens=recent.tokens,
            context_tokens=recent.context_tokens,
        ),
        step_s=message.step_s,
        step_expected_s=message.step_expected_s,
    )
