"""An engine without arithmetic that runs launched steps as late as it may and knows whose every slot of KV memory is.

A draw is a hash of the tokens that the step reads from its blocks, so a wrong input token, a wrong output index and a
block that someone else wrote to each change the output, or are refused at once.
"""

import hashlib
from collections import deque
from collections.abc import Sequence

from biphase.engine.block_pool import BlockPool
from biphase.engine.limits import Limits
from biphase.engine.step import SeqStep, StepPlan, StepResult
from biphase.protos.ids import BlockId, SeqId
from biphase.protos.values import Sampling

EOS = 2
FIRST_TOKEN, LAST_TOKEN = 10, 40


def draw(context: Sequence[int], output_index: int, forbid_ids: Sequence[int] = ()) -> int:
    """The token after ``context``; EOS about one time in nine."""
    digest = hashlib.blake2b(repr((list(context), output_index)).encode(), digest_size=8).digest()
    number = int.from_bytes(digest, "little")
    if number % 9 == 0 and EOS not in forbid_ids:
        return EOS
    return FIRST_TOKEN + number // 9 % (LAST_TOKEN - FIRST_TOKEN)


def output_of(token_ids: Sequence[int], num_prompt: int, sampling: Sampling, limits: Limits) -> list[int]:
    """All tokens after ``token_ids`` (the prompt, then forced output), drawn one at a time."""
    tokens = list(token_ids)
    while True:
        index = len(tokens) - num_prompt
        token = draw(tokens, index, limits.forbidden(index, sampling))
        tokens.append(token)
        if limits.finish_of(token, num_prompt=num_prompt, num_output=index + 1, sampling=sampling) is not None:
            return tokens[len(token_ids) :]


class CheckedEngine:
    """``draws`` counts the tokens that its steps drew; ``plans`` are launched and not run."""

    def __init__(self, pool: BlockPool) -> None:
        self.plans: deque[StepPlan] = deque()
        self.draws = 0
        self._pool = pool
        self._slots: dict[tuple[BlockId, int], tuple[SeqId, int, int]] = {}
        self._launched: dict[SeqId, SeqStep] = {}
        self._drawn: dict[SeqId, int] = {}

    def launch(self, plan: StepPlan) -> None:
        for part in plan.seqs:
            assert len(part.blocks) >= self._pool.blocks_for(part.start + len(part.token_ids))
            if part.continues:
                assert self.plans, f"sequence {part.seq_id} continues, and no step is under way"
                assert tuple(part.token_ids) == (0,)
                assert self._launched[part.seq_id].sampling is not None
        self._launched = {part.seq_id: part for part in plan.seqs}
        assert len(self._launched) == len(plan.seqs), "a sequence is in the step twice"
        self.plans.append(plan)
        self.check()

    def check(self, others: dict[SeqId, Sequence[BlockId]] | None = None) -> None:
        """No block of a plan in flight is free or in another sequence's table there, or in the tables of ``others``."""
        owners: dict[BlockId, SeqId] = {}
        tables = [(part.seq_id, part.blocks) for plan in self.plans for part in plan.seqs]
        for seq_id, blocks in (*tables, *(others or {}).items()):
            for block in blocks:
                assert self._pool.references(block) > 0, f"block {block} of sequence {seq_id} is free"
                owner = owners.setdefault(block, seq_id)
                assert owner == seq_id, f"block {block} belongs to the sequences {owner} and {seq_id}"

    def write(self, seq_id: SeqId, blocks: Sequence[BlockId], start: int, token_ids: Sequence[int]) -> None:
        """What a step or a pull does to the memory."""
        size = self._pool.block_size
        for position, token in enumerate(token_ids, start=start):
            self._slots[blocks[position // size], position % size] = (seq_id, position, token)

    def run(self) -> tuple[StepPlan, StepResult]:
        """Run the oldest plan in flight."""
        plan = self.plans.popleft()
        tokens: list[int | None] = []
        before, self._drawn = self._drawn, {}
        for part in plan.seqs:
            self.write(
                part.seq_id, part.blocks, part.start, [before[part.seq_id]] if part.continues else part.token_ids
            )
        for part in plan.seqs:
            if part.sampling is None:
                tokens.append(None)
                continue
            token = draw(self._context(part), part.output_index, part.forbid_ids)
            self._drawn[part.seq_id] = token
            tokens.append(token)
            self.draws += 1
        return plan, StepResult(tokens=tuple(tokens), step_ms=1.0)

    def _context(self, part: SeqStep) -> list[int]:
        size = self._pool.block_size
        tokens = []
        for at in range(part.start + len(part.token_ids)):
            seq_id, position, token = self._slots[part.blocks[at // size], at % size]
            assert (seq_id, position) == (part.seq_id, at), f"sequence {part.seq_id} reads what {seq_id} wrote"
            tokens.append(token)
        return tokens
