"""What a step plan may ask of an engine. Pure: a plan that passes can be computed without a bounds check."""

from dataclasses import dataclass

from biphase.engine.step import SeqStep, StepPlan
from biphase.protos.errors import InvalidRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanLimits:
    """``num_blocks`` of ``block_size`` tokens in the pool; ``max_model_len`` tokens of a sequence."""

    block_size: int
    num_blocks: int
    vocab_size: int
    max_model_len: int

    def check(self, plan: StepPlan) -> None:
        """Raises InvalidRequest, naming value and limit."""
        if not plan.seqs:
            raise InvalidRequest("the step plan is empty, at least 1 sequence is needed")
        for seq in plan.seqs:
            self._check(seq)

    def _check(self, seq: SeqStep) -> None:
        count = len(seq.token_ids)
        end = seq.start + count
        if count < 1:
            raise InvalidRequest(f"sequence {seq.seq_id} has {count} tokens in the step, at least 1 is needed")
        if seq.start < 0:
            raise InvalidRequest(f"sequence {seq.seq_id} starts at {seq.start}, the first position is 0")
        if end > self.max_model_len:
            raise InvalidRequest(f"sequence {seq.seq_id} reaches {end} tokens, the context holds {self.max_model_len}")
        needed = -(-end // self.block_size)
        if len(seq.blocks) < needed:
            raise InvalidRequest(f"sequence {seq.seq_id} has {len(seq.blocks)} blocks, {end} tokens need {needed}")
        if min(seq.blocks) < 0 or max(seq.blocks) >= self.num_blocks:
            bad = next(block for block in seq.blocks if not 0 <= block < self.num_blocks)
            raise InvalidRequest(f"sequence {seq.seq_id} has block {bad}, the pool holds 0 .. {self.num_blocks - 1}")
        for token in seq.forbid_ids:
            if not 0 <= token < self.vocab_size:
                raise InvalidRequest(f"forbidden token id {token} is outside the vocabulary of {self.vocab_size}")
        if seq.sampling is not None and not seq.sampling.temperature >= 0:
            raise InvalidRequest(f"temperature is {seq.sampling.temperature}, must be at least 0")
        if min(seq.token_ids) < 0 or max(seq.token_ids) >= self.vocab_size:
            bad_token = next(token for token in seq.token_ids if not 0 <= token < self.vocab_size)
            raise InvalidRequest(f"token id {bad_token} is outside the vocabulary of {self.vocab_size}")
