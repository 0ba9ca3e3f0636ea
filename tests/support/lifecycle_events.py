"""Events and effects of the lifecycle machine in short, and machines in the states that tests begin in."""

from biphase.protos.ids import Incarnation, InstanceName, TicketId
from biphase.protos.values import FinishReason, KvTicket, LegOutcome, LegStats, Role
from biphase.router.effects import CancelLeg, Emit, Replay, ReplayCause, SeekDecode
from biphase.router.events import HandedOff, LegEnded, Lost, RefusalReason, Refused, Started, Token
from biphase.router.lifecycle import Lifecycle

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
