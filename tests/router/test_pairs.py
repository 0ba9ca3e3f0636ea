"""Pairs that failed are left alone for longer and longer, one request at a time tries them again."""

from hypothesis import given
from hypothesis import strategies as st

from biphase.protos.ids import RequestId
from biphase.router.pairs import FIRST_BACKOFF_S, LAST_BACKOFF_S, PairTable, backoff_s
from biphase.router.view import InstanceKey, Pair

ONE, ANOTHER = RequestId("req-1"), RequestId("req-2")


def pair(prefill: str = "p0", decode: str = "d0") -> Pair:
    return Pair(prefill=InstanceKey(prefill), decode=InstanceKey(decode))


def test_a_pair_that_failed_is_broken_for_a_while() -> None:
    table = PairTable()
    assert (table.broken(0.0), table.next_retry_s(0.0)) == (frozenset(), None)
    table.failed(pair(), "unreachable", 10.0)
    assert table.broken(10.4) == {pair()}
    assert table.next_retry_s(10.4) == 10.0 + FIRST_BACKOFF_S
    assert table.broken(10.0 + FIRST_BACKOFF_S) == frozenset()
    assert table.troubles() == [(pair(), "1 handoffs failed, the last: unreachable")]


def test_those_that_fail_together_count_once() -> None:
    table = PairTable()
    for _ in range(5):
        table.failed(pair(), "unreachable", 10.0)
    assert table.next_retry_s(10.0) == 10.0 + FIRST_BACKOFF_S


def test_one_tries_and_the_others_wait_for_how_that_ends() -> None:
    table = PairTable()
    table.failed(pair(), "unreachable", 10.0)
    table.tried(pair(), ONE, 11.0)
    assert table.broken(11.0) == {pair()}
    table.failed(pair(), "still unreachable", 11.1)
    assert table.next_retry_s(11.1) == 11.1 + 2 * FIRST_BACKOFF_S
    table.tried(pair(), ONE, 13.0)
    table.worked(pair())
    assert (table.broken(13.0), table.troubles()) == (frozenset(), [])


def test_what_was_sent_over_a_pair_before_it_failed_does_not_follow() -> None:
    table = PairTable()
    assert table.is_open_to(pair(), ONE)
    table.failed(pair(), "unreachable", 10.0)
    assert not table.is_open_to(pair(), ONE)
    table.tried(pair(), ONE, 11.0)
    assert table.is_open_to(pair(), ONE) and not table.is_open_to(pair(), ANOTHER)
    table.worked(pair())
    assert table.is_open_to(pair(), ANOTHER)


def test_a_pair_that_never_failed_is_tried_by_all() -> None:
    table = PairTable()
    table.tried(pair(), ONE, 10.0)
    assert table.broken(10.0) == frozenset()


def test_another_life_of_either_end_begins_anew() -> None:
    table = PairTable()
    for one in (pair(), pair("p1"), pair("p0", "d1")):
        table.failed(one, "unreachable", 10.0)
    table.forget(InstanceKey("d0"))
    assert table.broken(10.0) == {pair("p0", "d1")}
    assert repr(table) == "<PairTable [1 troubled]>"


@given(failures=st.integers(1, 10_000))
def test_the_backoff_grows_and_is_bounded(failures: int) -> None:
    assert FIRST_BACKOFF_S <= backoff_s(failures) <= backoff_s(failures + 1) <= LAST_BACKOFF_S
