"""Folding a router's replies into an answer, and reading its descriptions. No I/O and no clock: time comes in."""

from typing import Literal, cast

from biphase.client.values import Accepted, Delta, Instance, Result, ServedModel, ServerInfo, Timeline, Usage
from biphase.protos import convert, router_pb2
from biphase.protos.errors import Internal
from biphase.protos.ids import Incarnation, InstanceName, RequestId


class ReplyFold:
    """One request's replies so far. Owned by the stream that feeds it.

    ``feed`` raises Internal when the replies contradict the contract: indices that do not follow each other, anything
    before Accepted or after Finished.
    """

    def __init__(self, sent_at_s: float) -> None:
        self.accepted: Accepted | None = None
        self.result: Result | None = None
        self._sent_at_s = sent_at_s
        self._first_at_s: float | None = None
        self._last_at_s = sent_at_s
        self._texts: list[str] = []
        self._token_ids: list[int] = []

    def __repr__(self) -> str:
        state = "finished" if self.result else "running" if self.accepted else "sent"
        return f"<ReplyFold [{state}, {len(self._token_ids)} tokens]>"

    @property
    def has_tokens(self) -> bool:
        return bool(self._token_ids)

    def feed(self, reply: router_pb2.GenerateReply, now_s: float) -> Delta | None:
        """Take the next reply; the delta in it, or None."""
        if self.result is not None:
            raise Internal("the router sent a reply after the end of the request")
        event = reply.WhichOneof("event")
        if event == "accepted":
            if self.accepted is not None:
                raise Internal("the router accepted the request twice")
            self.accepted = _accepted(reply.accepted)
            return None
        if self.accepted is None:
            raise Internal(f"the router sent {event or 'an unknown reply'} before it accepted the request")
        if event == "delta":
            return self._delta(reply.delta, now_s)
        if event == "finished":
            self.result = self._result(self.accepted, reply.finished)
        return None  # an event that a newer router knows and this client does not is passed over

    def end(self) -> Result:
        """The stream ended well. Raises Internal when it ended without a result."""
        if self.result is None:
            raise Internal("the router ended the stream before the end of the request")
        return self.result

    def _delta(self, message: router_pb2.Delta, now_s: float) -> Delta:
        if message.token_ids:
            if message.first_index != len(self._token_ids):
                due = len(self._token_ids)
                raise Internal(f"the router sent the token of output index {message.first_index} where {due} was due")
            if self._first_at_s is None:
                self._first_at_s = now_s
            self._last_at_s = now_s
            self._token_ids.extend(message.token_ids)
        self._texts.append(message.text)
        return Delta(text=message.text, token_ids=tuple(message.token_ids), first_index=message.first_index)

    def _result(self, accepted: Accepted, message: router_pb2.Finished) -> Result:
        reason = convert.finish_from_proto(message.finish_reason)
        if reason is None:
            raise Internal("the router finished the request without a reason")
        first_at_s = self._last_at_s if self._first_at_s is None else self._first_at_s
        gaps = max(len(self._token_ids) - 1, 1)
        return Result(
            request_id=accepted.request_id,
            text="".join(self._texts),
            token_ids=tuple(self._token_ids),
            finish_reason=reason,
            stop_reason=message.stop_reason,
            usage=Usage(
                prompt_tokens=message.usage.prompt_tokens,
                output_tokens=message.usage.output_tokens,
                cached_tokens=message.usage.cached_tokens,
            ),
            timeline=_timeline(message.timeline),
            decision=cast(Literal["disaggregated", "local"], message.decision),
            decision_reason=message.decision_reason,
            prefill_instance=message.prefill_instance,
            decode_instance=message.decode_instance,
            seed=message.seed,
            replays=message.replays,
            ttft_ms=(first_at_s - self._sent_at_s) * 1e3,
            tpot_ms=(self._last_at_s - first_at_s) / gaps * 1e3,
        )


def served_model(reply: router_pb2.ModelInfoReply) -> ServedModel:
    return ServedModel(
        model=convert.model_from_proto(reply.model),
        max_output_tokens=reply.max_output_tokens,
        has_chat_template=reply.has_chat_template,
    )


def server_info(reply: router_pb2.ServerInfoReply) -> ServerInfo:
    return ServerInfo(
        name=reply.name,
        version=reply.version,
        pid=reply.pid,
        mode=reply.mode,
        uptime_s=reply.uptime_s,
        instances=tuple(_instance(view) for view in reply.instances),
        counters=dict(reply.counters),
    )


def _accepted(message: router_pb2.Accepted) -> Accepted:
    return Accepted(
        request_id=RequestId(message.request_id),
        client_request_id=message.client_request_id,
        seed=message.seed,
        prompt_tokens=message.prompt_tokens,
        model=message.model,
    )


def _timeline(message: router_pb2.Timeline) -> Timeline:
    return Timeline(
        queue_ms=message.queue_ms,
        prefill_queue_ms=message.prefill_queue_ms,
        prefill_ms=message.prefill_ms,
        transfer_ms=message.transfer_ms,
        transfer_bytes=message.transfer_bytes,
        transfer_exposed_ms=message.transfer_exposed_ms,
        decode_ms=message.decode_ms,
        first_token_at_ms=message.first_token_at_ms,
        finished_at_ms=message.finished_at_ms,
        preemptions=message.preemptions,
    )


def _instance(view: router_pb2.InstanceView) -> Instance:
    return Instance(
        name=InstanceName(view.name),
        role=convert.role_from_proto(view.role),
        incarnation=Incarnation(view.incarnation),
        address=view.address,
        state=view.state,
        pid=view.pid,
        queued_tokens=view.queued_tokens,
        since_unix_s=view.since_unix_s,
        legs=view.legs,
        running=view.running,
        free_blocks=view.free_blocks,
        num_blocks=view.num_blocks,
        block_size=view.block_size,
        threads=view.threads,
        kv_bytes=view.kv_bytes,
    )
