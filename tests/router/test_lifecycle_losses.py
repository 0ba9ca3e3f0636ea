"""The lifecycle machine when an instance is lost, or ends a leg early: who goes on, from what."""

import pytest
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
    replay,
)

from biphase.protos.values import LegOutcome
from biphase.router.effects import Effect, Fail, Replay, SeekDecode
from biphase.router.events import HandedOff, LegEvent
from biphase.router.lifecycle import Leg

# ---- deaths


def test_prefill_lost_before_it_started() -> None:
    assert prefilling().handle(lost("prefill")) == [replay("prefill-0 was lost")]


def test_prefill_lost_while_a_decode_instance_is_sought() -> None:
    machine = prefilling()
    machine.handle(STARTED)
    assert machine.handle(lost("prefill")) == [replay("prefill-0 was lost")]


def ask_decode() -> list[Effect]:
    return [cancel("decode", "prefill instance lost", unless_handed_off=True)]


def test_prefill_lost_and_the_handoff_was_complete() -> None:
    machine = pulling()
    assert machine.handle(lost("prefill")) == ask_decode()
    assert machine.decode is Leg.IN_DOUBT
    assert machine.handle(HandedOff()) == []
    assert machine.handle(from_d(1, 66, LENGTH)) == [emit(1, b"B", LENGTH)]


def test_prefill_lost_and_the_handoff_was_not_complete() -> None:
    machine = pulling()
    machine.handle(lost("prefill"))
    assert machine.handle(ended("decode", "handoff_failed", "prefill instance lost")) == [replay("prefill-0 was lost")]


def test_prefill_lost_and_the_decode_instance_refused_meanwhile() -> None:
    machine = pulling()
    machine.handle(lost("prefill"))
    assert machine.handle(busy("decode")) == [replay("prefill-0 was lost")]


def test_prefill_lost_after_the_handoff_changes_nothing() -> None:
    machine = decoding()
    assert machine.handle(lost("prefill")) == []
    assert machine.handle(from_d(1, 66)) == [emit(1, b"B")]


def test_prefill_lost_before_its_first_token_arrived_but_the_handoff_brought_it() -> None:
    machine = pulling(first_token=False)
    machine.handle(lost("prefill"))
    assert machine.handle(HandedOff(first_token=65)) == [emit(0, b"A")]
    assert machine.handle(from_d(1, 66, LENGTH)) == [emit(1, b"B", LENGTH)]


@pytest.mark.parametrize("lost_first", [True, False])
def test_prefill_lost_and_nobody_brings_the_first_token(lost_first: bool) -> None:
    machine = pulling(first_token=False)
    effects: list[Effect] = []
    for event in [lost("prefill"), HandedOff()] if lost_first else [HandedOff(), lost("prefill")]:
        effects = machine.handle(event)
    assert effects == [cancel("decode", "prefill-0 was lost"), replay("prefill-0 was lost")]


def test_prefill_lost_while_a_finished_output_waits_for_the_first_token() -> None:
    machine = pulling(first_token=False)
    for event in (HandedOff(), from_d(1, 66, LENGTH), ended("decode")):
        assert machine.handle(event) == []
    assert machine.handle(lost("prefill")) == [replay("prefill-0 was lost")]


def test_decode_lost() -> None:
    assert decoding().handle(lost("decode")) == [
        cancel("prefill", "decode-0 was lost"),
        replay("decode-0 was lost"),
    ]


def seek_again(instead: Replay, pull_epoch: int = 2) -> SeekDecode:
    return SeekDecode(ticket=TICKET, pull_epoch=pull_epoch, refusals=0, instead=instead, gone=True)


@pytest.mark.parametrize("first_token", [True, False])
@pytest.mark.parametrize(
    ("end", "instead"),
    [
        (lost("decode"), replay("decode-0 was lost")),
        (ended("decode", "drained", "grace is over"), replay("grace is over", "drained")),
        (ended("decode", "cancelled", "it stops"), replay("it stops")),
    ],
    ids=["lost", "drained", "cancelled"],
)
def test_decode_gone_under_a_pull_and_another_one_pulls(first_token: bool, end: LegEvent, instead: Replay) -> None:
    """What the prefill instance has computed is not lost with it."""
    machine = pulling(first_token)
    assert machine.handle(end) == [seek_again(instead)]
    assert machine.decode is Leg.SEEKING
    machine.opened_decode()
    assert machine.handle(HandedOff(first_token=65)) == ([] if first_token else [emit(0, b"A")])
    assert machine.handle(ended("prefill")) == []
    assert machine.handle(from_d(1, 66, LENGTH)) == [emit(1, b"B", LENGTH)]
    assert (machine.replays, machine.losses) == (0, int(instead.cause == "lost"))


def test_decode_gone_under_a_pull_and_nobody_else_can() -> None:
    machine = pulling()
    machine.handle(lost("decode"))
    assert machine.begin_anew() == [cancel("prefill", "decode-0 was lost"), replay("decode-0 was lost")]
    assert (machine.phase, machine.replays, machine.losses) == ("queue", 1, 1)


def test_decode_gone_under_a_pull_and_the_next_one_refuses() -> None:
    machine = pulling()
    machine.handle(lost("decode"))
    machine.opened_decode()
    again = SeekDecode(ticket=TICKET, pull_epoch=3, refusals=1, instead=replay("decode-0 was lost"))
    assert machine.handle(busy("decode")) == [again]
    assert machine.begin_anew()[-1] == replay("decode-0 was lost")


def test_decode_gone_with_all_of_the_kv_and_the_next_one_is_busy() -> None:
    """Nothing is left to pull: it does not seek on for that."""
    machine = pulling()
    machine.handle(lost("decode"))
    machine.opened_decode()
    machine.handle(ended("prefill"))
    assert machine.handle(busy("decode")) == [replay("decode-0 was lost")]


@pytest.mark.parametrize("found", [True, False])
def test_decode_gone_once_it_had_released_the_ticket(found: bool) -> None:
    """The word that it had everything was still on its way: nobody will find anything to pull."""
    machine = pulling()
    machine.handle(lost("decode"))
    if found:
        machine.opened_decode()
        machine.handle(ended("prefill"))
        assert machine.handle(ended("decode", "handoff_failed", "released")) == [replay("released", "handoff_failed")]
    else:
        assert machine.handle(ended("prefill")) == [replay("decode-0 was lost")]


def test_only_who_seeks_for_a_lost_one_begins_anew() -> None:
    machine = prefilling()
    machine.handle(STARTED)
    with pytest.raises(RuntimeError, match="cannot open this leg now"):
        machine.begin_anew()


def test_decode_gone_under_too_many_pulls() -> None:
    machine = pulling()
    for number in range(3):
        assert machine.handle(lost("decode")) == [seek_again(replay("decode-0 was lost"), number + 2)]
        machine.opened_decode()
    effect = machine.handle(lost("decode"))[-1]
    assert isinstance(effect, Fail) and effect.kind == "suspect"


def test_both_lost() -> None:
    machine = pulling()
    machine.handle(lost("prefill"))
    assert machine.handle(lost("decode"))[-1] == replay("decode-0 was lost")
    assert machine.handle(lost("prefill")) == []


# ---- legs that end badly


def test_a_failed_handoff_revokes_the_ticket_before_the_prompt_is_computed_again() -> None:
    assert pulling().handle(ended("decode", "handoff_failed", "piece 3 is bad")) == [
        cancel("prefill", "piece 3 is bad"),
        replay("piece 3 is bad", "handoff_failed", blames_pair=True),
    ]


def test_a_handoff_that_fails_as_the_first_token_ends_the_request_is_no_failure() -> None:
    """The prefill instance has revoked the ticket itself; its token comes over another link, later."""
    machine = pulling(first_token=False)
    assert machine.handle(ended("decode", "handoff_failed", "REVOKED")) == [cancel("prefill", "REVOKED")]
    assert machine.handle(from_p(65, STOP)) == [emit(0, b"A", STOP)]
    assert machine.handle(ended("prefill")) == []


@pytest.mark.parametrize("last_word", [ended("prefill", "cancelled"), ended("prefill")], ids=repr)
def test_a_handoff_that_fails_before_the_first_token_is_judged_when_the_prefill_leg_has_ended(
    last_word: LegEvent,
) -> None:
    machine = pulling(first_token=False)
    machine.handle(ended("decode", "handoff_failed", "piece 3 is bad"))
    assert machine.handle(last_word) == [replay("piece 3 is bad", "handoff_failed", blames_pair=True)]


def test_a_handoff_that_failed_as_the_prefill_instance_died_blames_no_pair() -> None:
    machine = pulling(first_token=False)
    machine.handle(ended("decode", "handoff_failed", "reset"))
    assert machine.handle(lost("prefill")) == [replay("prefill-0 was lost")]


INTERNAL_OF_D = "the decode leg is done, but its output has no end"
INTERNAL_OF_P = "the prefill leg is done, but its first token never came"


@pytest.mark.parametrize(
    ("outcome", "effect"),
    [
        ("cancelled", replay("the decode instance ended the request")),
        ("drained", replay("the decode instance ended the request", "drained")),
        ("failed", Fail(kind="internal", detail="the decode instance failed")),
        ("done", Fail(kind="internal", detail=INTERNAL_OF_D)),
    ],
)
def test_a_decode_leg_that_ends_early(outcome: LegOutcome, effect: Effect) -> None:
    machine = decoding()
    machine.handle(ended("prefill"))
    assert machine.handle(ended("decode", outcome)) == [effect]


@pytest.mark.parametrize(
    ("outcome", "effect"),
    [
        ("cancelled", replay("the prefill instance ended the request")),
        ("drained", replay("the prefill instance drains", "drained")),
        ("failed", Fail(kind="internal", detail="the prefill instance failed")),
        ("lease_expired", replay("the lease of the prompt's KV expired", "handoff_failed")),
        ("done", Fail(kind="internal", detail=INTERNAL_OF_P)),
    ],
)
def test_a_prefill_leg_that_ends_early(outcome: LegOutcome, effect: Effect) -> None:
    assert prefilling().handle(ended("prefill", outcome)) == [effect]


def test_a_prefill_leg_that_ends_badly_under_a_pull_asks_the_decode_instance() -> None:
    machine = pulling()
    assert machine.handle(ended("prefill", "failed", "step broke")) == ask_decode()
    assert machine.handle(ended("decode", "handoff_failed"))[-1] == Fail(kind="internal", detail="step broke")
