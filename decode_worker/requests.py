"""What enters and leaves the decode scheduler besides steps: requests on offer, effects, and its sequences. Pure."""

from dataclasses import dataclass
from enum import Enum, auto

from biphase.engine.sequence import SeqEnded, Sequence, TokenOut
from biphase.protos.ids import BlockId, SeqId
from biphase.protos.values import KvTicket, LegStats, Sampling


class Phase(Enum):
    """Where a sequence is. Only PULLING and RUNNING ones hold blocks."""

    WAITING = auto()
    PULLING = auto()
    RUNNING = auto()


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeRequest:
    """A request on offer. ``token_ids``: the prompt, then forced output. Without ``ticket`` it is prefilled here."""

    seq_id: SeqId
    token_ids: list[int]
    num_prompt_tokens: int
    sampling: Sampling
    ticket: KvTicket | None = None
    pull_epoch: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class StartPull:
    """Effect: ``blocks`` are reserved for ``num_tokens`` tokens; pull into them, then report handed_off or pull_failed."""

    seq_id: SeqId
    ticket: KvTicket
    epoch: int
    blocks: tuple[BlockId, ...]
    num_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CancelPull:
    """Effect: stop that pull and report once nothing writes into its blocks any more.

    ``source_lost``: its source is said to be dead; a pull that has all it needs may yet end well, and then counts.
    """

    seq_id: SeqId
    source_lost: bool = False


DecodeEffect = StartPull | CancelPull | TokenOut | SeqEnded


@dataclass(slots=True, kw_only=True)
class DecodeSequence(Sequence):
    """A sequence with its way here. ``order`` is its age: lower came first, and keeps its place when preempted."""

    order: int
    ticket: KvTicket | None
    pull_epoch: int
    phase: Phase = Phase.WAITING
    handed_off: bool = False
    preemptions: int = 0
    transfer_bytes: int = 0
    transfer_ms: float = 0.0
    exposed_ms: float = 0.0
    handed_off_s: float | None = None
    joined_s: float | None = None

    @property
    def local(self) -> bool:
        """Whether its KV is computed here: no ticket, or handed off once and lost to a preemption."""
        return self.ticket is None or self.handed_off

    def stats(self, now_s: float) -> LegStats:
        """Its timeline so far."""
        first_s = self.first_token_s
        decode_from_s = self.joined_s if self.ticket is not None else first_s
        local_prefill = self.ticket is None and self.started_s is not None
        return LegStats(
            queue_ms=self.elapsed_ms(self.arrived_s, now_s if self.started_s is None else self.started_s),
            prefill_ms=self.elapsed_ms(self.started_s, now_s if first_s is None else first_s) if local_prefill else 0.0,
            transfer_ms=self.transfer_ms,
            transfer_bytes=self.transfer_bytes,
            exposed_ms=self.exposed_ms,
            decode_ms=self.elapsed_ms(decode_from_s, now_s),
            preemptions=self.preemptions,
        )
