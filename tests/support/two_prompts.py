"""Two prompts through an engine's steps: one in two chunks, then both decode together. Greedy, so that engines compare."""

from collections.abc import Sequence
from dataclasses import dataclass

from biphase.engine.engine import Engine
from biphase.engine.step import SeqStep, StepPlan
from biphase.protos.ids import BlockId, SeqId
from biphase.protos.values import Sampling

GREEDY = Sampling()
CHUNK = 15  # of the first prompt: within its first block


@dataclass(frozen=True, slots=True, kw_only=True)
class TwoPrompts:
    """``blocks`` of each are room for its prompt and ``num_decoded`` tokens. The first prompt is longer than CHUNK."""

    prompts: tuple[list[int], list[int]]
    blocks: tuple[Sequence[int], Sequence[int]]
    num_decoded: int

    def part(self, number: int, tokens: Sequence[int], start: int, *, draws: bool = True) -> SeqStep:
        """A step of a sequence whose tokens so far are ``tokens``, those before ``start`` computed already."""
        return SeqStep(
            seq_id=SeqId(number),
            token_ids=list(tokens[start:]),
            start=start,
            blocks=[BlockId(block) for block in self.blocks[number]],
            sampling=GREEDY if draws else None,
            output_index=max(0, len(tokens) - len(self.prompts[number])),
        )

    def first_chunk(self) -> SeqStep:
        return self.part(0, self.prompts[0][:CHUNK], 0, draws=False)

    def rest_of_first(self) -> SeqStep:
        return self.part(0, self.prompts[0], CHUNK)

    def second(self) -> SeqStep:
        return self.part(1, self.prompts[1], 0)

    def tokens_of(self, engine: Engine, known: Sequence[Sequence[int]] | None = None) -> list[list[int]]:
        """Both sequences, prompts and drawn tokens: a chunk; the rest beside the other's only chunk; decodes together.

        ``known``: the sequences as they will be, for ranks that do not see what is drawn; what is seen has to be it.
        """
        assert engine.execute(StepPlan(seqs=(self.first_chunk(),))).tokens == (None,)
        first, second = (list(prompt) for prompt in self.prompts)
        drawn = engine.execute(StepPlan(seqs=(self.rest_of_first(), self.second()))).tokens
        for step in range(self.num_decoded):
            for number, (sequence, token) in enumerate(zip((first, second), drawn, strict=True)):
                if known is not None:
                    seen, token = token, known[number][len(sequence)]
                    assert seen in (None, token)
                assert token is not None
                sequence.append(token)
            if step < self.num_decoded - 1:
                decodes = self.part(0, first, len(first) - 1), self.part(1, second, len(second) - 1)
                drawn = engine.execute(StepPlan(seqs=decodes)).tokens
        return [first, second]
