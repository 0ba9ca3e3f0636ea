"""Where one request's time went and who served it, gathered while it runs. Pure: times come in as arguments."""

from dataclasses import dataclass, field

from biphase.protos.values import FinishReason, LegStats, Role
from biphase.router.events import HandedOff


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """The last word to the client. Milliseconds since arrival for ``*_at_ms``, durations otherwise."""

    finish: FinishReason
    stop_reason: str
    prompt_tokens: int
    output_tokens: int
    cached_tokens: int
    seed: int
    decision: str
    decision_reason: str
    prefill_instance: str
    decode_instance: str
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
    replays: int = 0


@dataclass(slots=True, kw_only=True)
class Record:
    """Owned by one request. ``instances``: labels of who served it, by role."""

    arrived_s: float
    decision: str = ""
    decision_reason: str = ""
    opened_s: float | None = None
    """When the first leg that was not refused was opened."""
    started_s: float | None = None
    prefill_queue_ms: float | None = None
    first_token_s: float | None = None
    last_token_s: float | None = None
    replays: int = 0
    """How often it went on elsewhere after it was cut off from an instance. The figures of instances are the last ones'."""
    finished_s: float | None = None
    handoff: HandedOff | None = None
    ended_in: str = ""
    """The phase in which it was cut short, when it was."""
    instances: dict[Role, str] = field(default_factory=dict)
    stats: dict[Role, LegStats] = field(default_factory=dict)

    def placed(self, decision: str, reason: str, now_s: float) -> None:
        self.decision, self.decision_reason = decision, reason
        if self.first_token_s is None:
            self.opened_s = now_s
        self.instances.clear()

    def cut_off(self) -> None:
        """It is to go on elsewhere."""
        self.replays += 1
        self.stats.clear()
        self.handoff = None

    def summary(
        self, *, finish: FinishReason, stop_reason: str, prompt_tokens: int, output_tokens: int, seed: int
    ) -> Summary:
        """What is known now; an instance's own figures where they have come, the router's view where not."""
        nothing = LegStats()
        decode = self.stats.get("decode", nothing)
        local = self.decision == "local"
        prefill = decode if local else self.stats.get("prefill", nothing)
        finished_s = self.finished_s if self.finished_s is not None else self.arrived_s
        first_s = self.first_token_s if self.first_token_s is not None else finished_s
        prefill_ms = prefill.prefill_ms
        if prefill_ms == 0.0 and self.started_s is not None:
            prefill_ms = _ms(self.started_s, first_s)
        handoff = self.handoff or HandedOff(
            num_bytes=decode.transfer_bytes, ms=decode.transfer_ms, exposed_ms=decode.exposed_ms
        )
        return Summary(
            finish=finish,
            stop_reason=stop_reason,
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
            cached_tokens=prefill.cached_tokens,
            seed=seed,
            decision=self.decision,
            decision_reason=self.decision_reason,
            prefill_instance=self.instances.get("decode" if local else "prefill", ""),
            decode_instance=self.instances.get("decode", ""),
            queue_ms=_ms(self.arrived_s, self.opened_s),
            prefill_queue_ms=self.prefill_queue_ms if self.prefill_queue_ms is not None else prefill.queue_ms,
            prefill_ms=prefill_ms,
            transfer_ms=handoff.ms,
            transfer_bytes=handoff.num_bytes,
            transfer_exposed_ms=handoff.exposed_ms,
            decode_ms=(decode.decode_ms if not self.replays else 0.0) or _ms(first_s, finished_s),
            first_token_at_ms=_ms(self.arrived_s, first_s),
            finished_at_ms=_ms(self.arrived_s, finished_s),
            preemptions=decode.preemptions,
            replays=self.replays,
        )


def _ms(start_s: float, end_s: float | None) -> float:
    return 0.0 if end_s is None else max(0.0, (end_s - start_s) * 1000)
