"""Stop strings over a stream, beside a search through the whole text."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from biphase.router.stop_strings import StopStrings


def naive(text: str, stops: list[str]) -> tuple[str, str | None]:
    """Grow the text by one character at a time; the first end of a stop string ends it."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            longest = max(complete, key=len)
            return text[: end - len(longest)], longest
    return text, None


@given(
    text=st.text(alphabet="ab", max_size=40),
    stops=st.lists(st.text(alphabet="ab", min_size=1, max_size=6), max_size=4),
    cuts=st.lists(st.integers(0, 40), max_size=8),
)
def test_any_pieces_give_what_the_whole_text_gives(text: str, stops: list[str], cuts: list[int]) -> None:
    stream = StopStrings(stops)
    edges = sorted({0, len(text), *(min(cut, len(text)) for cut in cuts)})
    out = ""
    for start, end in pairwise(edges):
        out += stream.push(text[start:end])
        expected, _ = naive(text[:end], stops)
        assert expected.startswith(out)
    out += stream.flush()
    assert (out, stream.found) == naive(text, stops)


@given(text=st.text(alphabet="abc", max_size=30), stops=st.lists(st.text("abc", min_size=1, max_size=5), min_size=1))
def test_no_more_is_held_back_than_may_begin_a_stop(text: str, stops: list[str]) -> None:
    stream = StopStrings(stops)
    out = "".join(stream.push(character) for character in text)
    if stream.found is None:
        held = text[len(out) :]
        assert held == "" or any(stop.startswith(held) for stop in stops)
        longer = text[len(out) - 1 :] if out else None
        assert longer is None or not any(stop.startswith(longer) and stop != longer for stop in stops)


def test_text_that_may_begin_one_is_held_back_until_it_does_not() -> None:
    stream = StopStrings(["END"])
    assert [stream.push(text) for text in ("a", "E", "N", "x", "EN")] == ["a", "", "", "ENx", ""]
    assert repr(stream) == "<StopStrings [1 strings, 2 characters held, found None]>"
    assert stream.flush() == "EN"


def test_the_one_that_is_complete_first_wins_and_is_not_output() -> None:
    stream = StopStrings(["bcd", "c"])
    assert stream.push("abcd") == "ab"
    assert stream.found == "c"
    assert stream.push("more") == ""
    assert stream.flush() == ""


def test_of_two_that_end_together_the_longer_wins() -> None:
    stream = StopStrings(["c", "abc"])
    assert stream.push("xab") == "x"
    assert stream.push("c!") == ""
    assert stream.found == "abc"


def test_without_stop_strings_everything_passes() -> None:
    stream = StopStrings([])
    assert stream.push("anything") == "anything"
    assert stream.flush() == ""


@pytest.mark.parametrize("stop", ["\n\n", "ü", "👩‍👩‍👧"], ids=["newlines", "umlaut", "joined emoji"])
def test_characters_of_any_kind(stop: str) -> None:
    stream = StopStrings([stop])
    assert "".join(stream.push(character) for character in f"before{stop}after") == "before"
    assert stream.found == stop
