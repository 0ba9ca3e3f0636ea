"""The lifecycle machine: requests that nothing happens to, refusals, and every order of two streams."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.lifecycle_events import (
    LENGTH,
    STARTED,
    STOP,
    TICKET,
    busy,
    cancel,
    decoding,
    emit,
    ended,
    from_d,
    from_p,
    lost,
    prefilling,
    pulling,
)

from biphase.protos.values import Role
from biphase.router.effects import Emit, Fail, Requeue, SeekDecode
from biphase.router.events import HandedOff, LegEvent, Started, Token
from biphase.router.lifecycle import Leg, Lifecycle

# ---- the good ways


def test_disaggregated_from_end_to_end() -> None:
    machine = decoding()
    assert machine.handle(ended("prefill")) == []
    assert machine.handle(from_d(1, 66)) == [emit(1, b"B")]
    assert machine.handle(from_d(2, 67, LENGTH)) == [emit(2, b"C", LENGTH)]
    assert machine.ended
    assert machine.handle(ended("decode")) == []
    assert (machine.prefill, machine.decode) == (Leg.CLOSED, Leg.CLOSED)


def test_local_from_end_to_end() -> None:
    machine = Lifecycle()
    machine.opened_decode()
    assert machine.handle(from_d(0, 65)) == [emit(0, b"A")]
    assert machine.handle(from_d(1, 66, STOP)) == [emit(1, b"B", STOP)]
    assert machine.handle(ended("decode")) == []
    assert repr(machine) == "<Lifecycle [ended, prefill none, decode closed, next token 2, 0 early]>"


def test_a_single_token_needs_no_decode_leg() -> None:
    machine = prefilling()
    assert machine.handle(Started(ticket=None)) == []
    assert machine.handle(from_p(65, LENGTH)) == [emit(0, b"A", LENGTH)]
    assert machine.handle(ended("prefill")) == []
    assert machine.decode is Leg.NONE


def test_a_first_token_that_finishes_calls_the_decode_leg_off() -> None:
    machine = pulling(first_token=False)
    assert machine.handle(from_p(0, STOP)) == [
        cancel("decode", "the first token ended the request"),
        emit(0, b"\0", STOP),
    ]


def test_a_first_token_that_finishes_while_no_decode_instance_has_room() -> None:
    machine = prefilling()
    machine.handle(STARTED)
    assert machine.decode is Leg.SEEKING
    assert machine.handle(from_p(0, STOP)) == [emit(0, b"\0", STOP)]
    assert machine.decode is Leg.CLOSED


def test_tokens_wait_for_the_first_one_from_the_other_link() -> None:
    machine = pulling(first_token=False)
    machine.handle(HandedOff())
    assert machine.handle(from_d(1, 66)) == []
    assert machine.handle(from_d(2, 67, LENGTH)) == []
    assert machine.pending == [1, 2]
    assert machine.handle(ended("decode")) == []
    assert machine.handle(from_p(65)) == [emit(0, b"ABC", LENGTH)]


def test_the_first_token_may_come_with_the_handoff_and_again_from_the_prefill_instance() -> None:
    machine = pulling(first_token=False)
    assert machine.handle(HandedOff(first_token=65)) == [emit(0, b"A")]
    assert machine.handle(from_p(65)) == []
    assert machine.handle(from_d(1, 66)) == [emit(1, b"B")]


def test_each_index_is_emitted_once() -> None:
    machine = decoding()
    machine.handle(from_d(1, 66))
    assert machine.handle(from_d(1, 66)) == []
    assert machine.handle(from_d(0, 65)) == []


def test_forced_tokens_come_before_the_first_index() -> None:
    machine = Lifecycle(first_index=5)
    machine.opened_prefill()
    machine.handle(STARTED)
    machine.opened_decode()
    assert machine.handle(Token(role="prefill", index=5, token_id=65)) == [emit(5, b"A")]
    assert machine.handle(from_d(6, 66)) == [emit(6, b"B")]


# ---- refusals


def test_a_refused_prompt_goes_back_to_the_queue_with_the_count() -> None:
    machine = prefilling()
    assert machine.handle(busy("prefill")) == [Requeue(refusals=1)]
    machine.opened_prefill()
    assert machine.handle(busy("prefill", "draining")) == [Requeue(refusals=2)]
    machine.opened_decode()  # this time locally
    assert machine.handle(busy("decode")) == [Requeue(refusals=1)]


def test_a_refused_ticket_is_offered_again_with_the_next_epoch() -> None:
    machine = pulling()
    assert machine.handle(busy("decode")) == [SeekDecode(ticket=TICKET, pull_epoch=2, refusals=1)]
    machine.opened_decode()
    assert machine.handle(HandedOff()) == []
    assert machine.pull_epoch == 2


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_what_can_never_fit_ends_the_request(role: Role) -> None:
    machine = pulling() if role == "decode" else prefilling()
    effects = machine.handle(busy(role, "invalid", "too long"))
    assert effects[-1] == Fail(kind="invalid", detail="too long")
    assert effects[:-1] == ([cancel("prefill", "too long")] if role == "decode" else [])


# ---- endings of the router's own


@pytest.mark.parametrize("machine", [prefilling(), pulling(), decoding()], ids=["prefilling", "pulling", "decoding"])
def test_an_ending_calls_off_what_is_open(machine: Lifecycle) -> None:
    had_decode = machine.decode is not Leg.NONE
    expected = [cancel("prefill", "why")] + ([cancel("decode", "why")] if had_decode else [])
    assert machine.end("why") == expected
    assert machine.end("again") == []
    assert machine.handle(from_d(1, 66)) == []
    assert machine.handle(HandedOff()) == []
    assert machine.handle(ended("prefill", "cancelled")) == []
    assert machine.handle(lost("decode")) == []
    assert machine.prefill is Leg.CLOSED


def test_an_ending_before_any_leg() -> None:
    assert Lifecycle().end("why") == []


def test_legs_open_in_order_or_not_at_all() -> None:
    machine = prefilling()
    with pytest.raises(RuntimeError, match="cannot open this leg now"):
        machine.opened_prefill()
    machine.handle(STARTED)
    machine.opened_decode()
    with pytest.raises(RuntimeError, match="cannot open this leg now"):
        machine.opened_decode()


def test_whose_token_is_due() -> None:
    machine = prefilling()
    assert machine.awaits is None  # queued there: nothing is owed yet
    machine.handle(STARTED)
    assert machine.awaits == "prefill"
    machine.opened_decode()
    machine.handle(from_p(65))
    assert machine.awaits is None  # it may wait for room
    machine.handle(HandedOff())
    assert machine.awaits == "decode"
    machine.end("why")
    assert machine.awaits is None


# ---- any interleaving of two instances' streams

P_STREAM: list[LegEvent] = [from_p(65), ended("prefill")]
D_STREAM: list[LegEvent] = [
    HandedOff(first_token=65),
    from_d(1, 66),
    from_d(2, 67),
    from_d(3, 68, LENGTH),
    ended("decode"),
]


@given(seed=st.integers(0, 10_000), lose_p_at=st.integers(0, 8))
def test_any_interleaving_gives_the_same_tokens_even_if_prefill_dies(seed: int, lose_p_at: int) -> None:
    """Two ordered streams merged at random; the prefill instance may die anywhere, and the handoff is complete."""
    chance = random.Random(seed)
    machine = prefilling()
    machine.handle(STARTED)
    machine.opened_decode()
    p_left, d_left = list(P_STREAM), list(D_STREAM)
    out: list[int] = []
    step = 0
    while p_left or d_left:
        if step == lose_p_at and p_left:
            p_left = [lost("prefill")]
        step += 1
        stream = chance.choice([one for one in (p_left, d_left) if one])
        for effect in machine.handle(stream.pop(0)):
            assert not isinstance(effect, Fail)
            if isinstance(effect, Emit):
                assert effect.first_index == len(out)
                out.extend(effect.token_ids)
    assert bytes(out) == b"ABCD"
    assert (machine.ended, machine.prefill, machine.decode) == (True, Leg.CLOSED, Leg.CLOSED)
