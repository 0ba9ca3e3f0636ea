"""What a row of logits is drawn with, and what comes of it: the values that both backends take and give."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

MAX_TOP_LOGPROBS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class DrawRow:
    """How one row's token is chosen. ``temperature`` 0 is greedy; top_k 0, top_p 1, min_p 0 are off.

    Penalties: ``repetition`` (1 is off) divides the positive and multiplies the negative logits of every token of
    ``prompt_ids`` and ``output_ids`` (CTRL, Keskar et al. 2019, section 4.1, as Hugging Face); ``frequency`` and
    ``presence`` (0 is off) are OpenAI's: per occurrence, and once, for tokens of ``output_ids``. Histories may be
    left empty where no penalty is on; arrays of int32 are read fastest. ``logit_bias``: (id, value), added after the
    penalties, no id twice. ``allowed``: int32 words [ceil(vocab / 32)], bit i % 32 of word i // 32 set where token i
    may be drawn. ``logprobs``: None is off, n asks for the chosen token's and the n best (up to 20).
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    branch: int = 0
    position: int = 0
    forbid_ids: tuple[int, ...] = ()
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    prompt_ids: Sequence[int] | np.ndarray = field(default=(), compare=False)
    output_ids: Sequence[int] | np.ndarray = field(default=(), compare=False)
    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed: np.ndarray | None = field(default=None, compare=False)
    logprobs: int | None = None

    @property
    def penalised(self) -> bool:
        return self.repetition_penalty != 1 or self.frequency_penalty != 0 or self.presence_penalty != 0

    @property
    def edited(self) -> bool:
        """Whether the row's logits differ from the model's before the draw."""
        return self.penalised or bool(self.logit_bias) or bool(self.forbid_ids) or self.allowed is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """A row's token. Log-probabilities are those of the model's own logits: before penalties, bias, masks,
    temperature and filters. ``top``: (id, log-probability), best first, the lower id first among equals."""

    token_id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
