"""From tokens in order to text, usage and the reason an output ended. Pure but for the detokenizer it drives."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from biphase.protos.values import FinishReason
from biphase.router.stop_strings import StopStrings


class TextMaker(Protocol):
    """What a detokenizer does: whole characters only."""

    def push(self, token_ids: Sequence[int]) -> str: ...

    def flush(self) -> str: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """New output: ``token_ids`` from output index ``first_index`` on, and the text that is sure by now."""

    first_index: int
    token_ids: tuple[int, ...]
    text: str
    finish: FinishReason | None = None
    stop_reason: str = ""
    """The stop string, or token:ID, that ended it."""


class Output:
    """One request's output. A token that ends it by STOP (EOS, a stop token id) counts, but makes no text."""

    def __init__(self, detokenizer: TextMaker, stops: Sequence[str], *, min_tokens: int = 0) -> None:
        self._detokenizer = detokenizer
        self._stops = StopStrings(stops)
        self._min_tokens = min_tokens
        self.num_tokens = 0
        """Up to and including the token that ended the output."""

    def push(self, first_index: int, token_ids: Sequence[int], finish: FinishReason | None) -> Piece:
        """Take the next tokens in order; with ``finish`` they are the last. Tokens behind a stop string are dropped."""
        text: list[str] = []
        taken: list[int] = []
        for position, token_id in enumerate(token_ids):
            is_last = finish is not None and position == len(token_ids) - 1
            taken.append(token_id)
            self.num_tokens += 1
            if is_last and finish is FinishReason.STOP:
                break
            text.append(self._take(self._detokenizer.push([token_id])))
            if self._stops.found is not None:
                return self._piece(first_index, taken, text, FinishReason.STOP, self._stops.found)
        if finish is None:
            return self._piece(first_index, taken, text, None, "")
        text.append(self._take(self._detokenizer.flush()))
        if self._stops.found is not None:
            return self._piece(first_index, taken, text, FinishReason.STOP, self._stops.found)
        text.append(self._stops.flush())
        stop_reason = f"token:{taken[-1]}" if finish is FinishReason.STOP else ""
        return self._piece(first_index, taken, text, finish, stop_reason)

    def _take(self, text: str) -> str:
        """Before min_tokens nothing stops the output, so its text is not searched."""
        return text if self.num_tokens < self._min_tokens else self._stops.push(text)

    def _piece(
        self, first_index: int, taken: list[int], text: list[str], finish: FinishReason | None, stop_reason: str
    ) -> Piece:
        return Piece(
            first_index=first_index,
            token_ids=tuple(taken),
            text="".join(text),
            finish=finish,
            stop_reason=stop_reason,
        )
