"""The router's own to_proto / from_proto pairs. Generated classes stop here and at the shells that own a stream."""

from biphase.protos import router_pb2, worker_pb2
from biphase.protos.convert import finish_to_proto, outcome_from_proto, stats_from_proto, ticket_from_proto
from biphase.protos.values import Role
from biphase.router.events import HandedOff, LegEnded, RefusalReason, Refused, Started
from biphase.router.output import Piece
from biphase.router.record import Summary
from biphase.router.validate import Asked, AskedSampling

_REFUSALS: dict[int, RefusalReason] = {
    worker_pb2.REFUSAL_BUSY: "busy",
    worker_pb2.REFUSAL_DRAINING: "draining",
    worker_pb2.REFUSAL_INVALID: "invalid",
}


def asked_from_proto(message: router_pb2.GenerateRequest) -> Asked:
    sampling = message.sampling
    prompt = message.WhichOneof("prompt")
    return Asked(
        request_id=message.request_id,
        model=message.model,
        text=message.text if prompt == "text" else None,
        token_ids=tuple(message.token_ids.ids) if prompt == "token_ids" else None,
        chat=tuple((item.role, item.content) for item in message.chat.messages) if prompt == "chat" else None,
        sampling=AskedSampling(
            temperature=sampling.temperature if sampling.HasField("temperature") else None,
            top_k=sampling.top_k if sampling.HasField("top_k") else None,
            top_p=sampling.top_p if sampling.HasField("top_p") else None,
            min_p=sampling.min_p if sampling.HasField("min_p") else None,
            seed=sampling.seed if sampling.HasField("seed") else None,
            max_tokens=sampling.max_tokens if sampling.HasField("max_tokens") else None,
            min_tokens=sampling.min_tokens if sampling.HasField("min_tokens") else None,
            ignore_eos=sampling.ignore_eos,
            stop_token_ids=tuple(sampling.stop_token_ids),
            stop=tuple(sampling.stop),
        ),
    )


def piece_to_proto(piece: Piece) -> router_pb2.GenerateReply:
    delta = router_pb2.Delta(text=piece.text, token_ids=piece.token_ids, first_index=piece.first_index)
    return router_pb2.GenerateReply(delta=delta)


def summary_to_proto(summary: Summary) -> router_pb2.GenerateReply:
    timeline = router_pb2.Timeline(
        queue_ms=summary.queue_ms,
        prefill_queue_ms=summary.prefill_queue_ms,
        prefill_ms=summary.prefill_ms,
        transfer_ms=summary.transfer_ms,
        transfer_bytes=summary.transfer_bytes,
        transfer_exposed_ms=summary.transfer_exposed_ms,
        decode_ms=summary.decode_ms,
        first_token_at_ms=summary.first_token_at_ms,
        finished_at_ms=summary.finished_at_ms,
        preemptions=summary.preemptions,
    )
    usage = router_pb2.Usage(
        prompt_tokens=summary.prompt_tokens,
        output_tokens=summary.output_tokens,
        cached_tokens=summary.cached_tokens,
    )
    return router_pb2.GenerateReply(
        finished=router_pb2.Finished(
            finish_reason=finish_to_proto(summary.finish),
            usage=usage,
            timeline=timeline,
            decision=summary.decision,
            decision_reason=summary.decision_reason,
            prefill_instance=summary.prefill_instance,
            decode_instance=summary.decode_instance,
            seed=summary.seed,
            stop_reason=summary.stop_reason,
            replays=summary.replays,
        )
    )


def refused_from_proto(message: worker_pb2.Refused, role: Role) -> Refused:
    return Refused(role=role, reason=_REFUSALS.get(message.reason, "busy"), detail=message.detail)


def started_from_proto(message: worker_pb2.Started) -> Started:
    ticket = ticket_from_proto(message.ticket) if message.HasField("ticket") else None
    return Started(ticket=ticket, queue_ms=message.queue_ms)


def handed_off_from_proto(message: worker_pb2.HandedOff) -> HandedOff:
    return HandedOff(
        num_bytes=message.bytes,
        ms=message.ms,
        exposed_ms=message.exposed_ms,
        first_token=message.first_token if message.HasField("first_token") else None,
    )


def ended_from_proto(message: worker_pb2.LegEnded, role: Role) -> LegEnded:
    return LegEnded(
        role=role,
        outcome=outcome_from_proto(message.outcome),
        detail=message.detail,
        stats=stats_from_proto(message.stats),
    )
