"""The controller's history of signals: what is written is read back, and its size is bounded."""

import logging
from pathlib import Path

import pytest

from biphase.cluster.signal_history import SignalHistory
from biphase.planner.capacity import Setup
from biphase.planner.history import Moment, read_history
from biphase.planner.reports import Member


def make_moment(unix_s: float) -> Moment:
    return Moment(unix_s=unix_s, members=(Member(name="decode-0", role="decode"),))


def read(path: Path) -> list[float]:
    setup, moments = read_history(path.read_text().splitlines(), source=str(path))
    assert setup == Setup(strict=True)
    return [moment.unix_s for moment in moments]


def test_moments_are_read_back_and_a_new_life_begins_a_new_file(tmp_path: Path) -> None:
    path = tmp_path / "signals.jsonl"
    history = SignalHistory(path, Setup(strict=True))
    for second in (1.0, 2.0):
        history.add(make_moment(second))
    assert read(path) == [1.0, 2.0]
    again = SignalHistory(path, Setup(strict=True))
    again.add(make_moment(3.0))
    assert (read(path), read(again.former)) == ([3.0], [1.0, 2.0])


def test_its_size_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "signals.jsonl"
    history = SignalHistory(path, Setup(strict=True), max_bytes=4000)
    for second in range(200):
        history.add(make_moment(float(second)))
    assert max(path.stat().st_size, history.former.stat().st_size) <= 4000
    assert read(path)[-1] == 199.0
    assert read(history.former)[-1] + 1.0 == read(path)[0]


def test_what_cannot_be_written_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    history = SignalHistory(tmp_path / "no" / "signals.jsonl", Setup())
    with caplog.at_level(logging.WARNING):
        history.add(make_moment(1.0))
        history.add(make_moment(2.0))
    assert len(caplog.records) == 1
