"""The lifecycle machine when a request begins anew: behind what it has emitted, and only so often."""

from dataclasses import replace

from support.lifecycle_events import (
    LENGTH,
    STARTED,
    TICKET,
    cancel,
    decoding,
    emit,
    ended,
    from_d,
    lost,
    pulling,
    replay,
)

from biphase.protos.ids import TicketId
from biphase.router.effects import Fail, SeekDecode
from biphase.router.events import HandedOff, Started, Token
from biphase.router.lifecycle import MAX_FAILED_HANDOFFS, Leg, Lifecycle


def test_a_replay_goes_on_behind_the_emitted_tokens() -> None:
    machine = decoding()
    assert machine.handle(from_d(1, 66)) == [emit(1, b"B")]
    machine.handle(ended("prefill"))
    assert machine.handle(lost("decode")) == [replay("decode-0 was lost")]
    assert (machine.prefill, machine.decode, machine.phase) == (Leg.NONE, Leg.NONE, "queue")
    machine.opened_prefill()
    again = replace(TICKET, id=TicketId(b"u" * 16), num_tokens=7)
    assert machine.handle(Started(ticket=again)) == [SeekDecode(ticket=again, pull_epoch=2, refusals=0)]
    machine.opened_decode()
    assert machine.handle(Token(role="prefill", index=2, token_id=67)) == [emit(2, b"C")]
    machine.handle(HandedOff(first_token=67))
    machine.handle(ended("prefill"))
    assert machine.handle(from_d(3, 68, LENGTH)) == [emit(3, b"D", LENGTH)]
    assert (machine.replays, machine.losses) == (1, 1)


def test_a_replay_on_a_decode_instance_alone() -> None:
    machine = decoding()
    machine.handle(ended("prefill"))
    machine.handle(lost("decode"))
    machine.opened_decode()
    assert machine.handle(from_d(1, 66)) == [emit(1, b"B")]


def test_tokens_that_came_before_their_turn_are_made_again() -> None:
    machine = pulling(first_token=False)
    machine.handle(HandedOff())
    machine.handle(from_d(1, 66))
    assert machine.handle(lost("prefill"))[-1] == replay("prefill-0 was lost")
    assert machine.pending == []
    machine.opened_decode()
    assert machine.handle(from_d(0, 65)) == [emit(0, b"A")]
    assert machine.handle(from_d(1, 66)) == [emit(1, b"B")]


def test_the_loss_of_a_leg_that_was_given_up_is_nothing_new() -> None:
    machine = decoding()
    machine.handle(lost("decode"))
    assert machine.handle(lost("decode")) == []
    assert machine.handle(ended("prefill", "cancelled")) == []
    machine.opened_prefill()


def test_a_request_that_went_down_with_too_many_instances_is_a_suspect() -> None:
    machine = Lifecycle(max_replays=2)
    for _ in range(2):
        machine.opened_prefill()
        assert machine.handle(lost("prefill")) == [replay("prefill-0 was lost")]
    machine.opened_decode()
    assert machine.handle(lost("decode")) == [
        Fail(
            kind="suspect",
            detail="3 instances were lost with the request aboard, the limit is 2; the last: decode-0 was lost",
        )
    ]


def test_drains_count_against_nothing() -> None:
    machine = Lifecycle(max_replays=0)
    for number in range(20):
        machine.opened_decode()
        assert machine.handle(ended("decode", "drained", "grace is over")) == [replay("grace is over", "drained")]
        assert machine.replays == number + 1
    machine.opened_decode()
    effect = machine.handle(lost("decode"))[-1]
    assert isinstance(effect, Fail) and effect.kind == "suspect"


def test_handoffs_fail_only_so_often() -> None:
    machine = Lifecycle()
    for number in range(MAX_FAILED_HANDOFFS + 1):
        machine.opened_prefill()
        machine.handle(STARTED)
        machine.opened_decode()
        machine.handle(Token(role="prefill", index=number, token_id=65))
        effects = machine.handle(ended("decode", "handoff_failed", "unreachable"))
        assert effects[0] == cancel("prefill", effects[-1].detail)  # type: ignore[union-attr]
    assert effects[-1] == Fail(kind="handoff_failed", detail="9 handoffs failed; the last: unreachable")
