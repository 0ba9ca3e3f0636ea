"""The lifecycle machine: every order of events that instances can produce, and what the router does then."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from biphase.protos.ids import Incarnation, InstanceName, TicketId
from biphase.protos.values import FinishReason, KvTicket, LegOutcome, LegStats, Role
from biphase.router.events import HandedOff, LegEnded, LegEvent, Lost, RefusalReason, Refused, Started, Token
from biphase.router.lifecycle import CancelLeg, Effect, Emit, Fail, Leg, Lifecycle, Requeue, SeekDecode

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
    assert prefilling().handle(lost("prefill")) == [Fail(kind="unavailable", detail="prefill-0 was lost")]


def test_prefill_lost_while_a_decode_instance_is_sought() -> None:
    machine = prefilling()
    machine.handle(STARTED)
    assert machine.handle(lost("prefill")) == [Fail(kind="unavailable", detail="prefill-0 was lost")]


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
    assert machine.handle(ended("decode", "handoff_failed", "prefill instance lost")) == [
        Fail(kind="unavailable", detail="prefill-0 was lost")
    ]


def test_prefill_lost_and_the_decode_instance_refused_meanwhile() -> None:
    machine = pulling()
    machine.handle(lost("prefill"))
    assert machine.handle(busy("decode")) == [Fail(kind="unavailable", detail="prefill-0 was lost")]


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
    assert effects == [cancel("decode", "prefill-0 was lost"), Fail(kind="unavailable", detail="prefill-0 was lost")]


def test_prefill_lost_while_a_finished_output_waits_for_the_first_token() -> None:
    machine = pulling(first_token=False)
    for event in (HandedOff(), from_d(1, 66, LENGTH), ended("decode")):
        assert machine.handle(event) == []
    assert machine.handle(lost("prefill")) == [Fail(kind="unavailable", detail="prefill-0 was lost")]


@pytest.mark.parametrize("state", ["pulling", "decoding"])
def test_decode_lost(state: str) -> None:
    machine = pulling() if state == "pulling" else decoding()
    assert machine.handle(lost("decode")) == [
        cancel("prefill", "decode-0 was lost"),
        Fail(kind="unavailable", detail="decode-0 was lost"),
    ]


def test_both_lost() -> None:
    machine = pulling()
    machine.handle(lost("prefill"))
    assert machine.handle(lost("decode"))[-1] == Fail(kind="unavailable", detail="decode-0 was lost")
    assert machine.handle(lost("prefill")) == []


# ---- legs that end badly


def test_a_failed_handoff_revokes_the_ticket_before_the_client_hears_of_it() -> None:
    assert pulling().handle(ended("decode", "handoff_failed", "piece 3 is bad")) == [
        cancel("prefill", "piece 3 is bad"),
        Fail(kind="handoff_failed", detail="piece 3 is bad"),
    ]


def test_a_handoff_that_fails_as_the_first_token_ends_the_request_is_no_failure() -> None:
    """The prefill instance has revoked the ticket itself; its token comes over another link, later."""
    machine = pulling(first_token=False)
    assert machine.handle(ended("decode", "handoff_failed", "REVOKED")) == [cancel("prefill", "REVOKED")]
    assert machine.handle(from_p(65, STOP)) == [emit(0, b"A", STOP)]
    assert machine.handle(ended("prefill")) == []


@pytest.mark.parametrize("last_word", [ended("prefill", "cancelled"), ended("prefill"), lost("prefill")], ids=repr)
def test_a_handoff_that_fails_before_the_first_token_fails_when_the_prefill_leg_has_ended(last_word: LegEvent) -> None:
    machine = pulling(first_token=False)
    machine.handle(ended("decode", "handoff_failed", "piece 3 is bad"))
    assert machine.handle(last_word) == [Fail(kind="handoff_failed", detail="piece 3 is bad")]


@pytest.mark.parametrize(
    ("outcome", "kind", "detail"),
    [
        ("cancelled", "unavailable", "the decode instance ended the request"),
        ("failed", "internal", "the decode instance failed"),
        ("done", "internal", "the decode leg is done, but its output has no end"),
    ],
)
def test_a_decode_leg_that_ends_early(outcome: LegOutcome, kind: str, detail: str) -> None:
    machine = decoding()
    machine.handle(ended("prefill"))
    assert machine.handle(ended("decode", outcome)) == [Fail(kind=kind, detail=detail)]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("outcome", "kind", "detail"),
    [
        ("cancelled", "unavailable", "the prefill instance ended the request"),
        ("failed", "internal", "the prefill instance failed"),
        ("lease_expired", "handoff_failed", "the lease of the prompt's KV expired"),
        ("done", "internal", "the prefill leg is done, but its first token never came"),
    ],
)
def test_a_prefill_leg_that_ends_early(outcome: LegOutcome, kind: str, detail: str) -> None:
    assert prefilling().handle(ended("prefill", outcome)) == [Fail(kind=kind, detail=detail)]  # type: ignore[arg-type]


def test_a_prefill_leg_that_ends_badly_under_a_pull_asks_the_decode_instance() -> None:
    machine = pulling()
    assert machine.handle(ended("prefill", "failed", "step broke")) == ask_decode()
    assert machine.handle(ended("decode", "handoff_failed"))[-1] == Fail(kind="internal", detail="step broke")


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
