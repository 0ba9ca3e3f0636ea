"""The controller's history of signals: what is written is read back over its lives, and its size is bounded."""

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest

from biphase.cluster.signal_history import SignalHistory
from biphase.planner.capacity import RoleShape, Setup
from biphase.planner.history import Moment, read_history
from biphase.planner.reports import Member

SETUP = Setup(strict=True)
OTHER = replace(SETUP, decode=RoleShape(kv_tokens=4096))


def make_moment(unix_s: float) -> Moment:
    return Moment(unix_s=unix_s, members=(Member(name="decode-0", role="decode"),))


def read(path: Path) -> list[tuple[float, Setup]]:
    """Each moment and the set-up that holds for it."""
    setup, moments = read_history(path.read_text().splitlines(), source=str(path))
    found = []
    for moment in moments:
        setup = moment.setup or setup
        found.append((moment.unix_s, setup))
    return found


def times(path: Path) -> list[float]:
    return [unix_s for unix_s, _ in read(path)]


def test_another_setup_holds_from_its_moment_on_and_costs_nothing_of_what_was_before(tmp_path: Path) -> None:
    path = tmp_path / "signals.jsonl"
    history = SignalHistory(path)
    wanted = [(1.0, SETUP), (2.0, SETUP), (3.0, OTHER), (4.0, OTHER), (5.0, SETUP)]
    for second, setup in wanted:
        history.add(make_moment(second), setup)
    assert read(path) == wanted
    assert not history.former.exists()
    assert sum("setup" in json.loads(line) for line in path.read_text().splitlines()) == 3, "told where it changes"


def test_the_next_life_goes_on_with_the_file_and_a_new_deployment_begins_another(tmp_path: Path) -> None:
    path = tmp_path / "signals.jsonl"
    for second in (1.0, 2.0, 3.0):
        SignalHistory(path).add(make_moment(second), OTHER if second == 3.0 else SETUP)
    assert read(path) == [(1.0, SETUP), (2.0, SETUP), (3.0, OTHER)]
    anew = SignalHistory(path, anew=True)
    anew.add(make_moment(4.0), SETUP)
    assert (times(path), times(anew.former)) == ([4.0], [1.0, 2.0, 3.0])


@pytest.mark.parametrize("left", ['{"unix_s":2.0,"mem', '{"setup": {"pre'])
def test_a_line_that_a_killed_life_has_not_ended_is_cut_off(tmp_path: Path, left: str) -> None:
    path = tmp_path / "signals.jsonl"
    SignalHistory(path).add(make_moment(1.0), SETUP)
    with path.open("a") as file:
        file.write(left)
    SignalHistory(path).add(make_moment(3.0), SETUP)
    assert times(path) == [1.0, 3.0]
    path.write_text(left)
    SignalHistory(path).add(make_moment(4.0), SETUP)
    assert times(path) == [4.0]


@pytest.mark.parametrize("strange", ["", "what is this\n"])
def test_a_clock_that_was_set_back_and_a_file_that_is_no_history_make_a_new_one(tmp_path: Path, strange: str) -> None:
    path = tmp_path / "signals.jsonl"
    SignalHistory(path).add(make_moment(100.0), SETUP)
    with path.open("a") as file:
        file.write(strange)
    again = SignalHistory(path)
    again.add(make_moment(50.0), SETUP)
    again.add(make_moment(55.0), SETUP)
    assert times(path) == [50.0, 55.0]
    assert "100.0" in again.former.read_text()


def test_its_size_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "signals.jsonl"
    history = SignalHistory(path, max_bytes=4000)
    for second in range(200):
        history.add(make_moment(float(second)), OTHER if second % 3 == 0 else SETUP)
    assert max(path.stat().st_size, history.former.stat().st_size) <= 4000
    assert times(path)[-1] == 199.0
    assert times(history.former)[-1] + 1.0 == times(path)[0]


def test_what_cannot_be_written_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    history = SignalHistory(tmp_path / "no" / "signals.jsonl")
    with caplog.at_level(logging.WARNING):
        history.add(make_moment(1.0), SETUP)
        history.add(make_moment(2.0), SETUP)
    assert len(caplog.records) == 1
