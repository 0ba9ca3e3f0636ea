"""What a scheduler asks of the engine for one step, and what it gets back. Pure values."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from biphase.protos.ids import BlockId, SeqId
from biphase.protos.values import Sampling


@dataclass(frozen=True, slots=True, kw_only=True)
class SeqStep:
    """One sequence's part in a step: compute ``token_ids`` at positions ``start`` .. ``start + len(token_ids) - 1``.

    ``blocks`` is the sequence's block table; it covers at least ``start + len(token_ids)`` tokens, and positions below
    ``start`` are already in it. With ``sampling`` set a token is drawn after the last position; ``output_index`` is
    its output position (counter of the draw); ``forbid_ids`` may not be drawn (EOS while min_tokens is not reached).

    ``continues``: its one input token is what the step launched before drew for this sequence, which the host does not
    know yet: ``token_ids`` is the placeholder ``(0,)``, and the engine takes the token from its own output row.
    """

    seq_id: SeqId
    token_ids: Sequence[int]
    start: int
    blocks: Sequence[BlockId]
    sampling: Sampling | None = None
    output_index: int = 0
    forbid_ids: tuple[int, ...] = ()
    continues: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """One engine step: prefill chunks and decode tokens mixed. Never empty."""

    seqs: tuple[SeqStep, ...]

    @property
    def num_tokens(self) -> int:
        return sum(len(seq.token_ids) for seq in self.seqs)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """``tokens`` is aligned with the plan's seqs: the sampled token, or None where none was asked for."""

    tokens: tuple[int | None, ...]
    step_ms: float


class PendingStep(Protocol):
    """A step that was launched. Any thread may wait for it, one at a time."""

    def wait(self) -> StepResult:
        """Block until it is over, not holding the interpreter's lock; raises what the step raised."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class DoneStep:
    """A step that was over when its launch returned, as on the CPU."""

    result: StepResult

    def wait(self) -> StepResult:
        return self.result
