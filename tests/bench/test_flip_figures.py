"""What bench/flip.py makes of streams that a flip's grace has cut short."""

from dataclasses import replace
from typing import Any

import pytest
from flip_replay import judge
from report import Report

from biphase.client.bench.measured import DONE, Measured


def stream(index: int, replays: int, decode_instance: str = "decode-1#1 (pid 8)") -> Measured:
    return Measured(
        index=index,
        phase=0,
        due_s=0.0,
        sent_s=0.0,
        ended_s=9.0,
        token_at_s=(1.0, 9.0),
        input_tokens=10,
        asked_tokens=2,
        kind=DONE,
        checked=True,
        replays=replays,
        decode_instance=decode_instance,
    )


GOOD = [stream(0, 1), stream(1, 1), stream(2, 0)]


def missed(measured: list[Measured], **values: Any) -> set[str]:
    found = Report("flip", ())
    judge(found, measured, **{"at_s": 2.0, "aboard": 2, "turned": True, **values})
    return {goal.name for goal in found.goals if not goal.met}


def test_what_was_aboard_and_went_on_elsewhere_meets_every_goal() -> None:
    assert missed(GOOD) == set()


@pytest.mark.parametrize(
    ("measured", "values", "goals"),
    [
        (GOOD, {"aboard": 0}, {"cut_short_aboard"}),
        (GOOD, {"aboard": 3}, {"cut_short_replayed_elsewhere_of_aboard"}),
        (GOOD, {"turned": False}, {"cut_short_turned"}),
        (GOOD, {"at_s": 9.5}, {"cut_short_replayed_elsewhere_of_aboard"}),
        ([*GOOD[:1], stream(1, 1, "decode-0#1 (pid 7)")], {}, {"cut_short_replayed_elsewhere_of_aboard"}),
        ([*GOOD, replace(stream(3, 0), kind="ABORTED")], {}, {"cut_short_not_done"}),
        ([*GOOD, replace(stream(3, 0), wrong=True)], {}, {"cut_short_wrong"}),
        ([*GOOD, replace(stream(3, 0), checked=False)], {}, {"cut_short_wrong"}),
    ],
)
def test_each_harm_is_a_goal_missed(measured: list[Measured], values: dict[str, Any], goals: set[str]) -> None:
    assert missed(measured, **values) == goals
