"""What the benches of faults make of what they measured."""

import math

from fault_case import Fault, Outcome
from live_shift import reversals, settled_ratios

from biphase.client.bench.measured import DONE, Measured


def one(index: int, *token_at_s: float, kind: str = DONE, replays: int = 0, address: str = "a:1") -> Measured:
    return Measured(
        index=index,
        phase=0,
        due_s=0.0,
        sent_s=0.5,
        ended_s=max((0.5, *token_at_s)),
        token_at_s=token_at_s,
        input_tokens=10,
        asked_tokens=4,
        kind=kind,
        replays=replays,
        address=address,
    )


def outcome(victim: str, *measured: Measured) -> Outcome:
    return Outcome(fault=Fault(kind="kill", victim=victim), at_s=2.0, measured=list(measured), address="a:1")


def test_gap_and_displaced_tokens_are_those_of_replayed_streams() -> None:
    found = outcome("decode-0", one(0, 1.0, 1.5, 4.0, 4.5, replays=1), one(1, 1.0, 9.0), one(2, 0.6, 1.9, replays=1))
    assert found.gap_s == 2.5
    assert found.displaced_tokens == 10 + 2
    assert (len(found.lost), found.replays) == (0, 2)


def test_a_first_token_that_came_late_counts_from_the_sending() -> None:
    assert outcome("prefill-0", one(0, 4.0, replays=1)).gap_s == 3.5


def test_without_displaced_streams_there_is_no_gap() -> None:
    assert math.isnan(outcome("decode-0", one(0, 1.0, 9.0)).gap_s)


def test_only_streams_of_the_faulted_router_are_excused() -> None:
    streams = (
        one(0, kind="UNAVAILABLE"),
        one(1, kind="UNAVAILABLE", address="b:1"),
        one(2, kind="INTERNAL"),
        one(3, 1.0),
    )
    assert [lost.index for lost in outcome("router-0", *streams).lost] == [1, 2]
    assert [lost.index for lost in outcome("decode-0", *streams).lost] == [0, 1, 2]


def test_a_change_that_is_taken_back_at_once_is_a_reversal() -> None:
    there_and_back = [(0.0, 2, 1), (40.0, 1, 1), (41.0, 1, 2), (60.0, 1, 1), (61.0, 2, 1)]
    assert settled_ratios(there_and_back) == [(0.0, 2, 1), (41.0, 1, 2), (61.0, 2, 1)]
    assert reversals(there_and_back) == 1
    assert reversals([(0.0, 2, 1), (41.0, 1, 2), (90.0, 2, 1)]) == 0
