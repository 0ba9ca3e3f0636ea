"""The lifecycle machine: every order of events that instances can produce, and what the router does then."""

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from biphase.protos.ids import Incarnation, InstanceName, TicketId
from biphase.protos.values import FinishReason, KvTicket, LegOutcome, LegStats, Role
from biphase.router.effects import CancelLeg, Effect, Emit, Fail, Replay, ReplayCause, Requeue, SeekDecode
from biphase.router.events import HandedOff, LegEnded, LegEvent, Lost, RefusalReason, Refused, Started, Token
from biphase.router.lifecycle import MAX_FAILED_HANDOFFS, Leg, Lifecycle

TICKET = KvTicket(
    id=TicketId(b"t" * 16),
    kv_address="127.0.0.1:1",
    instance=InstanceName("prefill-0"),
    incarnation=Incarnation(1),
    num_tokens=5,
)
SEEK = SeekDecode(ticket=TICKET, pull_epoch=1, refusals=0)
STARTED = Started(ticket=TICKET)
STOP, LENGTH = FinishReason.STOP, FinishReason.LENGTH


def from_p(token_id: int, finish: FinishReason | None = None) -> Token:
    return Token(role="prefill", index=0, token_id=token_id, finish=finish)


def from_d(index: int, token_id: int, finish: FinishReason | None = None) -> Token:
    return Token(role="decode", index=index, token_id=token_id, finish=finish)


def ended(role: Role, outcome: LegOutcome = "done", detail: str = "") -> LegEnded:
    return LegEnded(role=role, outcome=outcome, detail=detail, stats=LegStats())


def lost(role: Role) -> Lost:
    return Lost(role=role, detail=f"{role}-0 was lost")


def busy(role: Role, reason: RefusalReason = "busy", detail: str = "") -> Refused:
    return Refused(role=role, reason=reason, detail=detail)


def emit(first_index: int, ids: bytes, finish: FinishReason | None = None) -> Emit:
    return Emit(first_index=first_index, token_ids=tuple(ids), finish=finish)


def cancel(role: Role, reason: str, *, unless_handed_off: bool = False) -> CancelLeg:
    return CancelLeg(role=role, reason=reason, unless_handed_off=unless_handed_off)


def replay(detail: str, cause: ReplayCause = "lost", *, blames_pair: bool = False) -> Replay:
    return Replay(cause=cause, detail=detail, blames_pair=blames_pair)


def prefilling() -> Lifecycle:
    machine = Lifecycle()
    machine.opened_prefill()
    return machine


def pulling(first_token: bool = True) -> Lifecycle:
    """Started, decode leg open, the first token (A) out unless told otherwise."""
    machine = prefilling()
    assert machine.handle(STARTED) == [SEEK]
    machine.opened_decode()
    if first_token:
        assert machine.handle(from_p(65)) == [emit(0, b"A")]
    return machine


def decoding() -> Lifecycle:
    machine = pulling()
    assert machine.handle(HandedOff()) == []
    return machine


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


# ---- replays


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
