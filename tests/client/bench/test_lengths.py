"""Lengths as people write them."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from biphase.client.bench.lengths import MOST_TOKENS, parse_lengths
from biphase.client.bench.phases_file import read_lengths
from biphase.protos.errors import SetupError


def parsed(text: str):  # type: ignore[no-untyped-def]
    return parse_lengths(text, "--input-len", read_lengths)


@pytest.mark.parametrize(
    ("text", "mean", "tolerance"),
    [("7", 7, 0), ("uniform:64:256", 160, 3), ("normal:200:20", 200, 2), ("lognormal:100:50", 100, 3)],
)
def test_draws_have_the_mean_asked_for(text: str, mean: float, tolerance: float) -> None:
    lengths, draws = parsed(text), random.Random(3)
    found = [lengths.draw(draws) for _ in range(20_000)]
    assert sum(found) / len(found) == pytest.approx(mean, abs=tolerance)
    assert lengths.mean == mean
    assert min(found) >= 1 and max(found) <= lengths.most


def test_uniform_reaches_both_ends() -> None:
    lengths, draws = parsed("uniform:2:4"), random.Random(0)
    assert {lengths.draw(draws) for _ in range(200)} == {2, 3, 4}


def test_empirical_draws_what_was_seen(tmp_path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "seen").write_text("5\n9\n9\n")
    lengths, draws = parsed(f"empirical:{tmp_path / 'seen'}"), random.Random(0)
    assert {lengths.draw(draws) for _ in range(200)} == {5, 9}
    assert str(lengths) == "empirical (3 values)"


@given(kind=st.sampled_from(["normal", "lognormal"]), mean=st.integers(1, 9000), sd=st.integers(0, 9000))
def test_no_draw_is_below_one(kind: str, mean: int, sd: int) -> None:
    lengths = parsed(f"{kind}:{mean}:{sd}")
    assert lengths.draw(random.Random(mean)) >= 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("0", "in whole tokens from 1 to"),
        ("", "it must be one of N, uniform:LEAST:MOST"),
        ("1.5", "in whole tokens"),
        ("uniform:9:3", "the least, 9, is above the most, 3"),
        ("uniform:9", "it must be uniform:LEAST:MOST"),
        ("fixed:9", "it must be one of"),
        ("gamma:1:2", "it must be one of"),
        ("normal:nan:1", "'nan' is no finite number"),
        ("normal:0:1", f"the mean is 1 to {MOST_TOKENS}"),
        ("lognormal:5:-1", "the deviation 0 to"),
        ("empirical:/nowhere", "cannot read /nowhere"),
    ],
)
def test_what_is_no_length_is_one_line(text: str, words: str) -> None:
    with pytest.raises(SetupError, match=words) as caught:
        parsed(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("content", "words"), [("", "holds no value"), ("3\n0\n", "holds 0"), ("x", "one a line")])
def test_an_empirical_file_that_holds_no_lengths(tmp_path, content: str, words: str) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "seen").write_text(content)
    with pytest.raises(SetupError, match=words):
        parsed(f"empirical:{tmp_path / 'seen'}")
