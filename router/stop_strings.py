"""Stop strings over a stream of text. Pure.

Text that may begin a stop string is held back until it is known not to. The stop string that is complete first ends
the output, whatever pieces the text came in; of several complete at the same character the one that began first. It
is not part of the output.
"""

from collections.abc import Sequence


class _Search:
    """How much of one stop string the text so far ends with (Knuth, Morris, Pratt: constant work per character)."""

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self.matched = 0
        self._border = [0] * len(stop)
        length = 0
        for index in range(1, len(stop)):
            while length and stop[index] != stop[length]:
                length = self._border[length - 1]
            if stop[index] == stop[length]:
                length += 1
            self._border[index] = length

    def step(self, character: str) -> bool:
        """Take the next character; True when the stop string is complete."""
        while self.matched and self.stop[self.matched] != character:
            self.matched = self._border[self.matched - 1]
        if self.stop[self.matched] == character:
            self.matched += 1
        return self.matched == len(self.stop)


class StopStrings:
    """Owned by one request's output. ``stops``: non-empty strings, any number of them."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._searches = [_Search(stop) for stop in dict.fromkeys(stops)]
        self._held = ""
        self.found: str | None = None
        """The stop string that ended the output."""

    def push(self, text: str) -> str:
        """Take the next text; return what is sure to be output. After ``found`` is set everything is dropped."""
        if self.found is not None:
            return ""
        if not self._searches:
            return text
        whole = self._held + text
        for index, character in enumerate(text):
            complete = [search.stop for search in self._searches if search.step(character)]
            if complete:
                self.found = max(complete, key=len)
                self._held, end = "", len(whole) - len(text) + index + 1
                return whole[: end - len(self.found)]
        keep = max(search.matched for search in self._searches)
        self._held = whole[len(whole) - keep :]
        return whole[: len(whole) - keep]

    def flush(self) -> str:
        """The output has ended: what was held back is output after all."""
        held, self._held = self._held, ""
        return held

    def __repr__(self) -> str:
        return f"<StopStrings [{len(self._searches)} strings, {len(self._held)} characters held, found {self.found!r}]>"
