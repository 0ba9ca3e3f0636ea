"""Which prompts a prefill instance computes next. Pure: no clock, no gRPC, no torch, no threads.

Packed and chunked: each step takes up to max_num_batched_tokens tokens of the prompts that started first. They start
in the order of prompt_queue.py: as they came, but answers that have begun go first, within bounds. A prompt's blocks are
reserved whole before its first chunk, so a prompt that has started never waits for memory. The queue is short, the long
one is the router's: an offer is refused when the queued tokens would pass max_queued_tokens or when the blocks that are
not promised yet do not suffice. A prompt refused three times gets a place all the same, and its blocks count as promised,
so that none younger takes what it waits for.

Exported blocks are held by their tickets as well: a full pool of prompts that nobody has pulled starts no new ones.

The next step may be scheduled while those before it run: the next chunk of a prompt follows the one under way. They
are booked in order, and a prompt's blocks are freed only after the last step that has it.
"""

from dataclasses import dataclass
from typing import Literal

from biphase.engine.block_pool import BlockPool
from biphase.engine.limits import Limits
from biphase.engine.sequence import Refusal, SeqEnded, Sequence, TokenOut
from biphase.engine.step import SeqStep, StepPlan, StepResult
from biphase.prefill_worker.prompt_queue import PromptQueue
from biphase.protos.ids import BlockId, SeqId
from biphase.protos.values import LegOutcome, LegStats, Load, Sampling

PLACE_AFTER_REFUSALS = 3
PASSING_SHARE = 0.5
"""Of max_queued_tokens: what may pass a prompt that waits for its first token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillRequest:
    """A prompt on offer. ``token_ids``: the prompt, then forced output tokens; ``refusals``: how often it was BUSY."""

    seq_id: SeqId
    token_ids: list[int]
    num_prompt_tokens: int
    sampling: Sampling
    refusals: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillStarted:
    """Effect: the first chunk is scheduled into ``blocks``; with ``handoff`` a decode instance will want them."""

    seq_id: SeqId
    blocks: tuple[BlockId, ...]
    num_tokens: int
    handoff: bool
    queue_ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkComputed:
    """Effect: positions below ``computed_tokens`` are in the blocks."""

    seq_id: SeqId
    computed_tokens: int


PrefillEffect = PrefillStarted | ChunkComputed | TokenOut | SeqEnded


class PrefillScheduler:
    """Owns the queue and the prompts under computation; takes blocks from ``pool``, which transfers share."""

    def __init__(
        self,
        pool: BlockPool,
        limits: Limits,
        *,
        max_num_batched_tokens: int = 512,
        max_num_seqs: int = 64,
        max_queued_tokens: int | None = None,
    ) -> None:
        self.pool = pool
        self.limits = limits
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_num_seqs = max_num_seqs
        self.max_queued_tokens = 2 * max_num_batched_tokens if max_queued_tokens is None else max_queued_tokens
        self.draining = False
        self.superfluous_tokens = 0
        self._waiting = PromptQueue(passing_tokens=int(PASSING_SHARE * self.max_queued_tokens))
        self._running: list[Sequence] = []
        self._by_id: dict[SeqId, Sequence] = {}
        self._queued_tokens = 0
        self._promised_blocks = 0

    @property
    def queued_tokens(self) -> int:
        """Tokens of all prompts that wait or are partly computed."""
        return self._queued_tokens

    @property
    def running_tokens(self) -> int:
        """Context held by the prompts under computation."""
        return sum(sequence.computed for sequence in self._running)

    def __len__(self) -> int:
        """Sequences that it knows."""
        return len(self._by_id)

    def load(self) -> Load:
        return Load(
            queued_tokens=self._queued_tokens,
            queued=len(self._waiting),
            running=len(self._running),
            free_blocks=self.pool.num_free,
            room_blocks=self._room(),
            draining=self.draining,
        )

    def offer(self, request: PrefillRequest, now_s: float) -> Refusal | None:
        """Queue the prompt (None), or say why not. Never blocks, changes nothing when it refuses."""
        invalid = self.limits.reason_against(request.token_ids, request.num_prompt_tokens, request.sampling)
        if invalid is not None:
            return Refusal(reason="invalid", detail=invalid)
        if self.draining:
            return Refusal(
                reason="draining", detail="the instance takes no new work", queued_tokens=self._queued_tokens
            )
        busy = self._reason_to_wait(request)
        if busy is not None:
            return Refusal(reason="busy", detail=busy, queued_tokens=self._queued_tokens)
        sequence = Sequence(
            seq_id=request.seq_id,
            token_ids=list(request.token_ids),
            num_prompt_tokens=request.num_prompt_tokens,
            sampling=request.sampling,
            arrived_s=now_s,
        )
        self._waiting.join(sequence, has_room=self._blocks_of(sequence) <= self._room())
        self._by_id[sequence.seq_id] = sequence
        self._queued_tokens += sequence.remaining
        self._promised_blocks += self._blocks_of(sequence)
        return None

    def _reason_to_wait(self, request: PrefillRequest) -> str | None:
        if len(self._waiting) >= self.max_num_seqs:
            return f"{len(self._waiting)} prompts wait already, the limit is {self.max_num_seqs}"
        if request.refusals >= PLACE_AFTER_REFUSALS:
            return None
        tokens = len(request.token_ids)
        if self._queued_tokens and self._queued_tokens + tokens > self.max_queued_tokens:
            return f"{self._queued_tokens} tokens are queued, {tokens} more would pass {self.max_queued_tokens}"
        needed = self.pool.blocks_for(tokens)
        if needed > self._room():
            return f"the prompt needs {needed} blocks, {self._room()} are not promised yet"
        return None

    def schedule(self, now_s: float) -> tuple[StepPlan | None, list[PrefillEffect]]:
        """The next step, None when nothing can be computed now. Steps may be under way."""
        effects: list[PrefillEffect] = []
        steps: list[SeqStep] = []
        budget = self.max_num_batched_tokens
        for sequence in self._running:
            if budget == 0 or len(steps) == self.max_num_seqs:
                break
            if sequence.drawing or sequence.ending is not None:
                continue
            chunk = min(budget, sequence.unscheduled)
            steps.append(sequence.step(chunk, self.limits))
            budget -= chunk
        while budget and self._waiting and len(steps) < self.max_num_seqs:
            sequence = self._waiting.first
            blocks = self.pool.allocate(self._blocks_of(sequence))
            if blocks is None:
                break
            self._waiting.start_first()
            self._promised_blocks -= len(blocks)
            sequence.blocks = blocks
            sequence.started_s = now_s
            self._running.append(sequence)
            effects.append(
                PrefillStarted(
                    seq_id=sequence.seq_id,
                    blocks=tuple(blocks),
                    num_tokens=len(sequence.token_ids),
                    handoff=not self._ends_with_first_token(sequence),
                    queue_ms=sequence.elapsed_ms(sequence.arrived_s, now_s),
                )
            )
            chunk = min(budget, sequence.unscheduled)
            steps.append(sequence.step(chunk, self.limits))
            budget -= chunk
        return (StepPlan(seqs=tuple(steps)) if steps else None), effects

    def complete(self, plan: StepPlan, result: StepResult, now_s: float) -> list[PrefillEffect]:
        """Book the oldest step under way. Sequences cancelled meanwhile end with their last one."""
        effects: list[PrefillEffect] = []
        for step, token in zip(plan.seqs, result.tokens, strict=True):
            sequence = self._by_id[step.seq_id]
            sequence.step_over(step)
            sequence.computed += len(step.token_ids)
            self._queued_tokens -= len(step.token_ids)
            if sequence.ending is None:
                sequence.record_hashes(self.pool)
                effects.append(ChunkComputed(seq_id=sequence.seq_id, computed_tokens=sequence.computed))
                if step.sampling is not None:
                    effects += self._drawn(sequence, step.output_index, token)
            elif sequence.ended_s is not None:
                self.superfluous_tokens += step.sampling is not None
            if sequence.ending is not None and sequence.may_go(now_s):
                effects.append(self._end(sequence, now_s))
        return effects

    def _drawn(self, sequence: Sequence, index: int, token: int | None) -> list[PrefillEffect]:
        """The first token of a prompt: the prompt's end here."""
        if token is None:
            sequence.ending = ("failed", "the engine drew no token")
            return []
        sequence.ending = ("done", "")
        finish = self.limits.finish_of(
            token, num_prompt=sequence.num_prompt_tokens, num_output=index + 1, sampling=sequence.sampling
        )
        return [TokenOut(seq_id=sequence.seq_id, index=index, token_id=token, finish=finish)]

    def fail(self, plan: StepPlan, detail: str, now_s: float, *, outcome: LegOutcome = "failed") -> list[PrefillEffect]:
        """The oldest step under way raised: every sequence in it ends so, the cancelled ones as they were."""
        effects: list[PrefillEffect] = []
        for step in plan.seqs:
            sequence = self._by_id[step.seq_id]
            sequence.step_over(step)
            if sequence.ending is None:
                sequence.ending = (outcome, detail)
            if sequence.may_go(now_s):
                effects.append(self._end(sequence, now_s))
        return effects

    def cancel(
        self, seq_id: SeqId, now_s: float, *, outcome: LegOutcome = "cancelled", detail: str = ""
    ) -> list[PrefillEffect]:
        """End a sequence: now, or with the last step under way that has it. Unknown and ending ones are left alone."""
        sequence = self._by_id.get(seq_id)
        if sequence is None or sequence.ending is not None:
            return []
        sequence.ending = (outcome, detail)
        return [] if sequence.in_steps else [self._end(sequence, now_s)]

    def phase_of(self, seq_id: SeqId) -> Literal["queued", "computing"]:
        """Where a sequence that it knows is."""
        return "queued" if self._by_id[seq_id].started_s is None else "computing"

    def _end(self, sequence: Sequence, now_s: float) -> SeqEnded:
        """Forget an ending sequence."""
        assert sequence.ending is not None
        outcome, detail = sequence.ending
        ended_s = now_s if sequence.ended_s is None else sequence.ended_s
        del self._by_id[sequence.seq_id]
        self._queued_tokens -= sequence.remaining
        if sequence.started_s is None:
            self._waiting.remove(sequence)
            self._promised_blocks -= self._blocks_of(sequence)
        else:
            self._running.remove(sequence)
        sequence.free(self.pool)
        started_s = sequence.started_s
        stats = LegStats(
            queue_ms=sequence.elapsed_ms(sequence.arrived_s, ended_s if started_s is None else started_s),
            prefill_ms=sequence.elapsed_ms(started_s, ended_s),
        )
        return SeqEnded(seq_id=sequence.seq_id, outcome=outcome, detail=detail, stats=stats)

    def _blocks_of(self, sequence: Sequence) -> int:
        return self.pool.blocks_for(len(sequence.token_ids))

    def _room(self) -> int:
        return max(0, self.pool.num_free - self._promised_blocks)

    def _ends_with_first_token(self, sequence: Sequence) -> bool:
        return self.limits.is_last(
            num_prompt=sequence.num_prompt_tokens, num_output=sequence.next_index + 1, sampling=sequence.sampling
        )

    def __repr__(self) -> str:
        return f"<PrefillScheduler [{len(self._waiting)} waiting, {len(self._running)} running]>"
