"""Continuous batching on a decode instance. Pure: no clock, no gRPC, no torch, no threads.

Every step takes one token of each running sequence, oldest first, and beside them a bounded budget of local prefill
(the whole budget when nothing decodes). A waiting sequence gets all blocks of its known tokens at once or none, then
either pulls its KV (it has a ticket) or computes it here; it joins the batch at the step after.

Out of blocks, the youngest running sequence is preempted: its blocks are freed, it goes back to its place at the
front of the queue, and its known tokens, emitted ones included, are computed again here, so its output goes on where
it stood. A sequence under a pull is never preempted; the one that needs the block gives way itself when no younger
one runs. The oldest therefore always advances, and a request alone gets the whole pool.

The next step may be scheduled while those before it run: a sequence whose token is being drawn takes part again, that
token its input, unless it is certain to end with it. Steps are booked in order. One that turns out to end with step n
(a stop token, a cancel, an error) and is in step n + 1 already ran it in vain: its end is said with its last token,
what n + 1 draws for it is dropped, and its blocks are freed after n + 1. Nobody is preempted while a step is under
way: where blocks are short then, nothing is scheduled ahead.

Where the engine is a pipeline of stages, a token that is being drawn comes too late for the next step: ``may_continue`` is
off, and a sequence is in one step at a time. Those that decode are then dealt out over ``micro_batches`` steps, so that as
many are under way at once and every stage has work.
"""

from bisect import insort
from collections import deque
from typing import Literal

from biphase.decode_worker.requests import (
    CancelPull,
    DecodeEffect,
    DecodeRequest,
    DecodeSequence,
    Phase,
    StartPull,
)
from biphase.engine.block_pool import BlockPool
from biphase.engine.limits import Limits
from biphase.engine.sequence import Refusal, SeqEnded, TokenOut
from biphase.engine.step import SeqStep, StepPlan, StepResult
from biphase.protos.ids import SeqId
from biphase.protos.values import FinishReason, LegOutcome, Load

PREFILL_LOST = "prefill instance lost"


class DecodeScheduler:
    """Owns the queue, the batch and the pulls' blocks. ``watermark_blocks`` stay free while anything is active."""

    def __init__(
        self,
        pool: BlockPool,
        limits: Limits,
        *,
        max_num_seqs: int = 64,
        max_num_batched_tokens: int = 512,
        local_prefill_tokens: int = 128,
        watermark_blocks: int | None = None,
        micro_batches: int = 1,
        may_continue: bool = True,
    ) -> None:
        self.pool = pool
        self.limits = limits
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.local_prefill_tokens = local_prefill_tokens
        self.watermark_blocks = max(1, pool.num_blocks // 100) if watermark_blocks is None else watermark_blocks
        self.micro_batches = micro_batches
        self.may_continue = may_continue
        self.draining = False
        self.superfluous_tokens = 0
        self.preemptions = 0
        self.preemptions_handed_off = 0
        self._waiting: deque[DecodeSequence] = deque()
        self._pulling: dict[SeqId, DecodeSequence] = {}
        self._running: list[DecodeSequence] = []
        self._by_id: dict[SeqId, DecodeSequence] = {}
        self._next_order = 0
        self._steps_in_flight = 0

    def __len__(self) -> int:
        """Sequences that it knows."""
        return len(self._by_id)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_pulling(self) -> int:
        return len(self._pulling)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def queued_tokens(self) -> int:
        """Tokens that wait for blocks or for local prefill."""
        waiting = sum(len(sequence.token_ids) for sequence in self._waiting)
        return waiting + sum(sequence.remaining for sequence in self._running if sequence.remaining > 1)

    @property
    def running_tokens(self) -> int:
        """Context held by the batch and by the pulls."""
        return sum(sequence.num_tokens for sequence in (*self._running, *self._pulling.values()))

    def load(self) -> Load:
        promised = sum(self._blocks_of(sequence) for sequence in self._waiting)
        kept = self.watermark_blocks if self._by_id else 0
        return Load(
            queued_tokens=self.queued_tokens,
            queued=len(self._waiting),
            running=len(self._running) + len(self._pulling),
            free_blocks=self.pool.num_free,
            room_blocks=max(0, self.pool.num_free - promised - kept),
            draining=self.draining,
        )

    def offer(self, request: DecodeRequest, now_s: float) -> Refusal | None:
        """Queue the request (None), or say why not. Never blocks, changes nothing when it refuses."""
        invalid = self.limits.reason_against(request.token_ids, request.num_prompt_tokens, request.sampling)
        tokens = len(request.token_ids)
        if invalid is None and request.ticket is not None and request.ticket.num_tokens != tokens:
            invalid = f"the ticket is for {request.ticket.num_tokens} tokens, {tokens} were sent"
        if invalid is not None:
            return Refusal(reason="invalid", detail=invalid)
        if self.draining:
            return Refusal(reason="draining", detail="the instance takes no new work", queued_tokens=self.queued_tokens)
        if len(self._waiting) >= self.max_num_seqs:
            detail = f"{len(self._waiting)} requests wait already, the limit is {self.max_num_seqs}"
            return Refusal(reason="busy", detail=detail, queued_tokens=self.queued_tokens)
        sequence = DecodeSequence(
            seq_id=request.seq_id,
            token_ids=list(request.token_ids),
            num_prompt_tokens=request.num_prompt_tokens,
            sampling=request.sampling,
            arrived_s=now_s,
            order=self._next_order,
            ticket=request.ticket,
            pull_epoch=request.pull_epoch,
        )
        self._next_order += 1
        self._waiting.append(sequence)
        self._by_id[sequence.seq_id] = sequence
        return None

    def schedule(self, now_s: float) -> tuple[StepPlan | None, list[DecodeEffect]]:
        """The next step, None when nothing can be computed now, and the pulls to start. Steps may be under way."""
        decoding = self._with_room_to_decode()
        if decoding is None:
            return None, []
        steps: list[SeqStep] = []
        for sequence in decoding:
            if sequence.joined_s is None:
                sequence.joined_s = now_s
                if sequence.handed_off_s is not None:
                    sequence.exposed_ms += sequence.elapsed_ms(sequence.handed_off_s, now_s)
            steps.append(sequence.step(1, self.limits))
        effects = self._admit(now_s)
        if len(steps) < len(self._running):
            steps += self._prefill_steps(self._prefill_budget(decodes=bool(steps)))
        if not steps:
            return None, effects
        self._steps_in_flight += 1
        return StepPlan(seqs=tuple(steps)), effects

    def _prefill_budget(self, *, decodes: bool) -> int:
        """Prompt tokens of the next step, which ``decodes`` or not."""
        if decodes:
            return self.local_prefill_tokens
        if self.may_continue or not any(sequence.drawing for sequence in self._running):
            return self.max_num_batched_tokens
        # all that decode are in other steps, and wait for this one too
        return self.local_prefill_tokens if self._steps_in_flight < self.micro_batches else 0

    def _prefill_steps(self, budget: int) -> list[SeqStep]:
        """Chunks of those that do not decode yet, oldest first."""
        steps: list[SeqStep] = []
        for sequence in self._running:
            if budget == 0:
                break
            unscheduled = sequence.unscheduled
            if (unscheduled == 1 and sequence.scheduled) or sequence.ending is not None:
                continue
            chunk = min(budget, unscheduled)
            steps.append(sequence.step(chunk, self.limits))
            budget -= chunk
        return steps

    def _with_room_to_decode(self) -> list[DecodeSequence] | None:
        """Those that decode, each with a block to write to; may preempt from the young end.

        None: a block is missing, and whoever would have to give way may be in a step under way.
        """
        decoding: list[DecodeSequence] = []
        most = -(-sum(self._decodes(sequence) for sequence in self._running) // self.micro_batches)
        position = 0
        while position < len(self._running) and len(decoding) < most:
            sequence = self._running[position]
            if not self._decodes(sequence) or (sequence.drawing and not self._may_go_on(sequence)):
                position += 1
            elif self._grow(sequence):
                decoding.append(sequence)
                position += 1
            elif self._steps_in_flight:
                return None
            else:
                self._preempt(self._running[-1])
        return decoding

    def _decodes(self, sequence: DecodeSequence) -> bool:
        return sequence.unscheduled == 1 and sequence.ending is None

    def _may_go_on(self, sequence: DecodeSequence) -> bool:
        """Whether the next step may take the token that is being drawn: not where it is certain to be the last."""
        return self.may_continue and not self.limits.is_last(
            num_prompt=sequence.num_prompt_tokens, num_output=sequence.next_index, sampling=sequence.sampling
        )

    def _grow(self, sequence: DecodeSequence) -> bool:
        """Make its blocks cover all its tokens; False when none is free."""
        held = len(sequence.blocks)
        if held * self.pool.block_size < sequence.num_tokens:
            blocks = self.pool.allocate(self._blocks_of(sequence) - held)
            if blocks is None:
                return False
            sequence.blocks += blocks
        return True

    def _preempt(self, sequence: DecodeSequence) -> None:
        self._running.remove(sequence)
        sequence.free(self.pool)
        sequence.phase = Phase.WAITING
        sequence.preemptions += 1
        self.preemptions += 1
        self.preemptions_handed_off += sequence.handed_off
        self._waiting.appendleft(sequence)

    def _admit(self, now_s: float) -> list[DecodeEffect]:
        """Give blocks to the queue's head as long as there are enough; nobody overtakes it."""
        effects: list[DecodeEffect] = []
        while self._waiting:
            active = len(self._running) + len(self._pulling)
            sequence = self._waiting[0]
            needed = self._blocks_of(sequence)
            kept = self.watermark_blocks if active else 0
            if active >= self.max_num_seqs or needed + kept > self.pool.num_free:
                break
            blocks = self.pool.allocate(needed)
            assert blocks is not None
            self._waiting.popleft()
            sequence.blocks = blocks
            if sequence.started_s is None:
                sequence.started_s = now_s
            if sequence.ticket is None or sequence.handed_off:
                self._join(sequence)
                continue
            sequence.phase = Phase.PULLING
            self._pulling[sequence.seq_id] = sequence
            effects.append(
                StartPull(
                    seq_id=sequence.seq_id,
                    ticket=sequence.ticket,
                    epoch=sequence.pull_epoch,
                    blocks=tuple(blocks),
                    num_tokens=len(sequence.token_ids),
                )
            )
        return effects

    def _join(self, sequence: DecodeSequence) -> None:
        sequence.phase = Phase.RUNNING
        insort(self._running, sequence, key=lambda other: other.order)

    def handed_off(
        self, seq_id: SeqId, first_token: int, now_s: float, *, num_bytes: int, transfer_ms: float, exposed_ms: float
    ) -> list[DecodeEffect]:
        """The pull is complete, checked and released; ``first_token`` is what the prefill instance drew.

        A sequence cancelled meanwhile ends here, unless it was to be left alone once handed off.
        """
        sequence = self._pulling.pop(seq_id)
        sequence.computed = sequence.scheduled = len(sequence.token_ids)
        sequence.transfer_bytes, sequence.transfer_ms, sequence.exposed_ms = num_bytes, transfer_ms, exposed_ms
        if sequence.ending is not None and sequence.ending[0] != "handoff_failed":
            return [self._end(sequence, now_s)]
        sequence.ending = None
        sequence.handed_off = True
        sequence.handed_off_s = now_s
        sequence.record_hashes(self.pool)
        index = sequence.next_index
        sequence.token_ids.append(first_token)
        self._join(sequence)
        if self._finish_of(sequence, first_token, index) is not None:
            sequence.ending = ("done", "")
            return [self._end(sequence, now_s)]
        return []

    def pull_failed(self, seq_id: SeqId, detail: str, now_s: float) -> list[DecodeEffect]:
        """The pull has ended without success and nothing writes into its blocks any more."""
        sequence = self._pulling.pop(seq_id)
        if sequence.ending is None:
            sequence.ending = ("handoff_failed", detail)
        return [self._end(sequence, now_s)]

    def complete(self, plan: StepPlan, result: StepResult, now_s: float) -> list[DecodeEffect]:
        """Book the oldest step under way. Sequences cancelled meanwhile end with their last one, their tokens unsaid."""
        effects: list[DecodeEffect] = []
        self._steps_in_flight -= 1
        for step, token in zip(plan.seqs, result.tokens, strict=True):
            sequence = self._by_id[step.seq_id]
            sequence.step_over(step)
            sequence.computed += len(step.token_ids)
            if sequence.ending is None:
                sequence.record_hashes(self.pool)
                if step.sampling is not None:
                    self._drawn(sequence, step.output_index, token, now_s, effects)
            elif sequence.ended_s is not None:
                self.superfluous_tokens += step.sampling is not None
            if sequence.ending is not None and sequence.may_go(now_s):
                effects.append(self._end(sequence, now_s))
        return effects

    def _drawn(
        self, sequence: DecodeSequence, index: int, token: int | None, now_s: float, effects: list[DecodeEffect]
    ) -> None:
        if token is None:
            sequence.ending = ("failed", "the engine drew no token")
            return
        if sequence.first_token_s is None:
            sequence.first_token_s = now_s
        finish = self._finish_of(sequence, token, index)
        if finish is not None:
            sequence.ending = ("done", "")
        sequence.token_ids.append(token)
        effects.append(TokenOut(seq_id=sequence.seq_id, index=index, token_id=token, finish=finish))

    def fail(self, plan: StepPlan, detail: str, now_s: float, *, outcome: LegOutcome = "failed") -> list[DecodeEffect]:
        """The oldest step under way raised: every sequence in it ends so, the cancelled ones as they were."""
        effects: list[DecodeEffect] = []
        self._steps_in_flight -= 1
        for step in plan.seqs:
            sequence = self._by_id[step.seq_id]
            sequence.step_over(step)
            if sequence.ending is None:
                sequence.ending = (outcome, detail)
            if sequence.may_go(now_s):
                effects.append(self._end(sequence, now_s))
        return effects

    def cancel(
        self,
        seq_id: SeqId,
        now_s: float,
        *,
        outcome: LegOutcome = "cancelled",
        detail: str = "",
        unless_handed_off: bool = False,
    ) -> list[DecodeEffect]:
        """End a sequence: now, or when its last step or its pull is over. Unknown ones are left alone.

        ``unless_handed_off``: its prefill instance is lost; one that has its KV, or computes it here, goes on.
        """
        sequence = self._by_id.get(seq_id)
        if sequence is None or (unless_handed_off and sequence.local):
            return []
        ending: tuple[LegOutcome, str] = ("handoff_failed", PREFILL_LOST) if unless_handed_off else (outcome, detail)
        if sequence.ending is not None:
            if unless_handed_off or sequence.ending[0] != "handoff_failed":
                return []
            sequence.ending = ending
            return [CancelPull(seq_id=seq_id)]
        sequence.ending = ending
        if sequence.phase is Phase.PULLING:
            return [CancelPull(seq_id=seq_id, source_lost=unless_handed_off)]
        return [] if sequence.in_steps else [self._end(sequence, now_s)]

    def phase_of(self, seq_id: SeqId) -> Literal["queued", "pulling", "local_prefill", "first_step", "decoding"]:
        """Where a sequence that it knows is; a preempted one is queued."""
        sequence = self._by_id[seq_id]
        match sequence.phase:
            case Phase.WAITING:
                return "queued"
            case Phase.PULLING:
                return "pulling"
            case Phase.RUNNING if sequence.first_token_s is not None:
                return "decoding"
        return "local_prefill" if sequence.ticket is None else "first_step"

    def _finish_of(self, sequence: DecodeSequence, token: int, index: int) -> FinishReason | None:
        return self.limits.finish_of(
            token, num_prompt=sequence.num_prompt_tokens, num_output=index + 1, sampling=sequence.sampling
        )

    def _end(self, sequence: DecodeSequence, now_s: float) -> SeqEnded:
        """Forget an ending sequence."""
        assert sequence.ending is not None
        outcome, detail = sequence.ending
        stats = sequence.stats(now_s if sequence.ended_s is None else sequence.ended_s)
        del self._by_id[sequence.seq_id]
        if sequence.phase is Phase.WAITING:
            self._waiting.remove(sequence)
        elif sequence.phase is Phase.RUNNING:
            self._running.remove(sequence)
        sequence.free(self.pool)
        return SeqEnded(seq_id=sequence.seq_id, outcome=outcome, detail=detail, stats=stats)

    def _blocks_of(self, sequence: DecodeSequence) -> int:
        return self.pool.blocks_for(sequence.num_tokens)

    def __repr__(self) -> str:
        counts = f"{len(self._waiting)} waiting, {len(self._pulling)} pulling, {len(self._running)} running"
        return f"<DecodeScheduler [{counts}]>"
