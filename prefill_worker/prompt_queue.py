"""The order in which waiting prompts start. Pure.

First come, first served, with one exception. A replay, here a prompt whose answer has begun, has a client in mid-sentence:
it passes those at the end that wait for their first token. That takes nothing from them but time, and bounded: a replay
passes only where its blocks are free and promised to nobody, so that it waits for no memory in front of the others; it
does not pass what has started, nor another replay; and each prompt lets a given number of tokens pass (one replay of any
length), so that a mass loss keeps no new work out. What a replay that ends unstarted had of that is given back.
"""

from biphase.engine.sequence import Sequence
from biphase.protos.ids import SeqId


class PromptQueue:
    """Sequences that have no blocks yet. ``passing_tokens``: how many tokens each lets pass."""

    def __init__(self, *, passing_tokens: int) -> None:
        self.passing_tokens = passing_tokens
        self._waiting: list[Sequence] = []
        self._let_pass_tokens: dict[SeqId, int] = {}
        """By those waiting prompts that replays have passed."""
        self._has_passed: dict[SeqId, list[SeqId]] = {}
        """Those that a waiting replay has passed."""

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def first(self) -> Sequence:
        """The one that starts next. Raises IndexError when none waits."""
        return self._waiting[0]

    def join(self, sequence: Sequence, *, has_room: bool) -> None:
        """At the end, or as a replay that ``has_room`` before those that let it pass."""
        place = len(self._waiting)
        if has_room and sequence.has_begun:
            tokens = len(sequence.token_ids)
            while place and self._lets_pass(self._waiting[place - 1], tokens):
                place -= 1
            passed = [other.seq_id for other in self._waiting[place:]]
            for seq_id in passed:
                self._let_pass_tokens[seq_id] = self._let_pass_tokens.get(seq_id, 0) + tokens
            self._has_passed[sequence.seq_id] = passed
        self._waiting.insert(place, sequence)

    def _lets_pass(self, other: Sequence, tokens: int) -> bool:
        so_far = self._let_pass_tokens.get(other.seq_id, 0)
        return not other.has_begun and (so_far == 0 or so_far + tokens <= self.passing_tokens)

    def start_first(self) -> None:
        """The first one waits no more: what passed it is of no concern any more, what it passed stays passed."""
        sequence = self._waiting.pop(0)
        self._let_pass_tokens.pop(sequence.seq_id, None)
        self._has_passed.pop(sequence.seq_id, None)

    def remove(self, sequence: Sequence) -> None:
        """One that ends unstarted. Raises ValueError when it does not wait."""
        self._waiting.remove(sequence)
        self._let_pass_tokens.pop(sequence.seq_id, None)
        for seq_id in self._has_passed.pop(sequence.seq_id, ()):
            if seq_id in self._let_pass_tokens:
                self._let_pass_tokens[seq_id] -= len(sequence.token_ids)

    def __repr__(self) -> str:
        return f"<PromptQueue [{len(self._waiting)} waiting]>"
