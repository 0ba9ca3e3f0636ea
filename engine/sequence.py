"""One request inside an instance, and the values that pass between a scheduler and its shell. Pure."""

from collections.abc import Sequence as TokenSequence
from dataclasses import dataclass, field
from typing import Literal

from biphase.engine.block_pool import NO_PARENT, BlockHash, BlockPool
from biphase.engine.limits import Limits
from biphase.engine.step import SeqStep
from biphase.protos.ids import BlockId, SeqId
from biphase.protos.values import FinishReason, LegOutcome, LegStats, Sampling


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """A request that is not taken. ``detail`` is one line; ``queued_tokens`` is what waits here."""

    reason: Literal["busy", "draining", "invalid"]
    detail: str
    queued_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenOut:
    """Effect: output token ``index`` of a sequence; ``finish`` says that it is the last one, and why."""

    seq_id: SeqId
    index: int
    token_id: int
    finish: FinishReason | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SeqEnded:
    """Effect: the scheduler has forgotten the sequence and holds none of its blocks. The last effect of each one."""

    seq_id: SeqId
    outcome: LegOutcome
    detail: str = ""
    stats: LegStats = field(default_factory=LegStats)


@dataclass(slots=True, kw_only=True)
class Sequence:
    """A request as its scheduler, the only owner, sees it.

    ``token_ids``: prompt, then output. ``computed``: how many of them have their KV in ``blocks``. Steps in flight hold
    it ``in_steps`` times: they compute its positions up to ``scheduled`` and draw ``drawing`` tokens that nobody knows
    yet. ``ending`` is set when it must go as soon as nothing uses its blocks, ``ended_s`` by the step that it ended
    with; what later steps draw for it is superfluous. Times are seconds of the scheduler's ``now_s``.
    """

    seq_id: SeqId
    token_ids: list[int]
    num_prompt_tokens: int
    sampling: Sampling
    arrived_s: float
    blocks: list[BlockId] = field(default_factory=list)
    computed: int = 0
    scheduled: int = 0
    in_steps: int = 0
    drawing: int = 0
    ending: tuple[LegOutcome, str] | None = None
    ended_s: float | None = None
    started_s: float | None = None
    first_token_s: float | None = None
    num_hashed: int = 0
    last_hash: BlockHash = NO_PARENT

    @property
    def num_tokens(self) -> int:
        """Prompt and output, with what is being drawn."""
        return len(self.token_ids) + self.drawing

    @property
    def remaining(self) -> int:
        """Tokens that are known and not computed yet; 1 for a sequence that decodes."""
        return len(self.token_ids) - self.computed

    @property
    def unscheduled(self) -> int:
        """Tokens that the next step may take; 1 for a sequence that decodes, whether that one is known or being drawn."""
        return len(self.token_ids) + self.drawing - self.scheduled

    @property
    def has_begun(self) -> bool:
        """Whether output is among its known tokens. In a prefill queue, where nothing is drawn yet: it is a replay."""
        return len(self.token_ids) > self.num_prompt_tokens

    @property
    def next_index(self) -> int:
        """Output index of the token that is drawn next."""
        return self.num_tokens - self.num_prompt_tokens

    def step(self, num_tokens: int, limits: Limits) -> SeqStep:
        """Its part in the next step: ``num_tokens`` more of its tokens, a draw when these are its last known ones."""
        start = self.scheduled
        known = len(self.token_ids) + self.drawing
        index = known - self.num_prompt_tokens
        draws = start + num_tokens == known
        continues = self.drawing > 0
        part = SeqStep(
            seq_id=self.seq_id,
            token_ids=(0,) if continues else tuple(self.token_ids[start : start + num_tokens]),
            start=start,
            blocks=tuple(self.blocks),
            sampling=self.sampling if draws else None,
            output_index=index if draws else 0,
            forbid_ids=limits.forbidden(index, self.sampling) if draws else (),
            continues=continues,
        )
        self.scheduled += num_tokens
        self.in_steps += 1
        self.drawing += draws
        return part

    def step_over(self, part: SeqStep) -> None:
        """A step that held it is in flight no more."""
        self.in_steps -= 1
        self.drawing -= part.sampling is not None

    def may_go(self, now_s: float) -> bool:
        """After a step of an ending one: whether nothing uses its blocks any more."""
        if self.ended_s is None:
            self.ended_s = now_s
        return not self.in_steps

    def record_hashes(self, pool: BlockPool) -> None:
        """Give every block that has become full and computed its hash."""
        size = pool.block_size
        while (self.num_hashed + 1) * size <= self.computed:
            start = self.num_hashed * size
            tokens: TokenSequence[int] = self.token_ids[start : start + size]
            self.last_hash = pool.record_full(self.blocks[self.num_hashed], self.last_hash, tokens)
            self.num_hashed += 1

    def free(self, pool: BlockPool) -> None:
        """Give all its blocks back; what was computed is forgotten."""
        pool.release(self.blocks)
        self.blocks = []
        self.computed = self.scheduled = 0
        self.num_hashed = 0
        self.last_hash = NO_PARENT

    def elapsed_ms(self, since_s: float | None, now_s: float) -> float:
        return 0.0 if since_s is None else (now_s - since_s) * 1e3
