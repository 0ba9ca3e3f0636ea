"""What a router knows of an instance's load between two of its Loads."""

from biphase.protos.ids import RequestId
from biphase.protos.values import Load
from biphase.router.account import Account

A, B = RequestId("a"), RequestId("b")


def account(**load: int) -> Account:
    return Account(Load(**load))


def test_a_promise_counts_until_a_load_can_have_counted_it() -> None:
    known = account(room_blocks=10, running=1)
    known.promise(A, tokens=20, blocks=4)
    assert (known.room_blocks, known.requests, known.queued_tokens) == (6, 2, 20)
    known.on_load(Load(room_blocks=9, running=1))
    assert (known.room_blocks, known.requests) == (5, 2)  # no leg was opened: no Load counts it
    known.opened(A)
    known.on_load(Load(room_blocks=5, running=2))
    assert (known.room_blocks, known.requests) == (5, 2)


def test_a_settled_promise_is_free_again() -> None:
    known = account(room_blocks=10)
    known.promise(A, tokens=20, blocks=4)
    known.promise(B, tokens=20, blocks=7)
    assert known.room_blocks == -1
    assert known.has_promise(A)
    assert known.settle(A)
    assert not known.settle(A)
    assert known.room_blocks == 3


def test_full_until_the_queue_shrinks() -> None:
    known = account(queued_tokens=100)
    known.on_busy(1000)
    known.on_load(Load(queued_tokens=1000))
    assert known.full
    known.on_load(Load(queued_tokens=500))
    assert not known.full


def test_full_until_there_is_more_room_than_at_the_worst() -> None:
    known = account(room_blocks=5)
    known.on_busy(0)
    known.on_load(Load(room_blocks=2))
    assert known.full
    known.on_load(Load(room_blocks=3))
    assert not known.full


def test_asked_again_whatever_the_load() -> None:
    known = account()
    known.on_busy(0)
    known.ask_again()
    assert not known.full


def test_draining_until_a_load_says_otherwise() -> None:
    known = account()
    known.on_draining()
    assert known.draining
    known.on_load(Load())
    assert not known.draining
    known.on_load(Load(draining=True))
    assert known.draining


def test_repr_tells_the_counts() -> None:
    known = account(queued_tokens=3, room_blocks=9)
    known.promise(A, tokens=4, blocks=1)
    assert repr(known) == "<Account [7 tokens queued, 1 requests, 8 blocks of room, 1 promised, open]>"
