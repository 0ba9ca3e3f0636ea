"""Whatever dies and whenever: every output index is emitted once and in order, and the request ends.

Two made-up instances compute token i of the output as TOKENS[i]; hypothesis chooses what they say in which order, over
two links that keep their own order, and what they die of.
"""

from collections import deque

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from biphase.protos.ids import Incarnation, InstanceName, TicketId
from biphase.protos.values import FinishReason, KvTicket, LegStats
from biphase.router.effects import CancelLeg, Effect, Emit, Fail, Replay, Requeue, SeekDecode
from biphase.router.events import HandedOff, LegEnded, LegEvent, Lost, Refused, Started, Token
from biphase.router.lifecycle import MAX_FAILED_HANDOFFS, Leg, Lifecycle

MAX_REPLAYS = 3


def ended(role: str, outcome: str) -> LegEnded:
    return LegEnded(role=role, outcome=outcome, stats=LegStats())  # type: ignore[arg-type]


class ReplayMachine(RuleBasedStateMachine):
    """The world around one lifecycle: what each instance is about to say waits in ``said``."""

    @initialize(length=st.integers(1, 6))
    def begin(self, length: int) -> None:
        self.length = length
        self.machine = Lifecycle(max_replays=MAX_REPLAYS)
        self.out: list[int] = []
        self.said: dict[str, deque[LegEvent]] = {"prefill": deque(), "decode": deque()}
        self.ways = 0
        self.losses = 0
        self.failure: Fail | None = None
        self.ticket: KvTicket | None = None
        self.instead: Replay | None = None
        self.done = False

    @precondition(lambda self: self.machine.ended and not any(self.said.values()))
    @rule(length=st.integers(1, 6))
    def next_request(self, length: int) -> None:
        self.begin(length)

    def token(self, role: str, index: int) -> Token:
        finish = FinishReason.LENGTH if index == self.length - 1 else None
        return Token(role=role, index=index, token_id=100 + index, finish=finish)  # type: ignore[arg-type]

    def perform(self, effects: list[Effect]) -> None:
        for position, effect in enumerate(effects):
            match effect:
                case Emit():
                    assert effect.first_index == len(self.out)
                    self.out += effect.token_ids
                    self.done = effect.finish is not None
                case CancelLeg():
                    if not effect.unless_handed_off:
                        self.said[effect.role].clear()
                        self.said[effect.role].append(ended(effect.role, "cancelled"))
                    elif not any(isinstance(event, HandedOff) for event in self.said["decode"]):
                        self.said["decode"].clear()
                        self.said["decode"].append(ended("decode", "handoff_failed"))
                case SeekDecode():
                    self.ticket, self.instead = effect.ticket, effect.instead
                    self.losses += effect.gone and effect.instead is not None and effect.instead.cause == "lost"
                case Requeue():
                    self.said = {"prefill": deque(), "decode": deque()}
                case Replay():
                    assert position == len(effects) - 1
                    assert (self.machine.prefill, self.machine.decode) == (Leg.NONE, Leg.NONE)
                    self.losses += effect.cause == "lost" and effect is not self.instead
                    self.said = {"prefill": deque(), "decode": deque()}  # what legs given up say is not passed on
                case Fail():
                    assert position == len(effects) - 1
                    self.failure = effect

    def is_live(self) -> bool:
        return not self.machine.ended

    @precondition(lambda self: self.is_live() and self.machine.phase == "queue")
    @rule(local=st.booleans())
    def place(self, local: bool) -> None:
        self.ways += 1
        first = len(self.out)
        if local:
            self.machine.opened_decode()
            self.said["decode"] = deque(self.token("decode", index) for index in range(first, self.length))
            self.said["decode"].append(ended("decode", "done"))
            return
        self.machine.opened_prefill()
        ticket = None
        if first + 1 < self.length:
            ticket = KvTicket(
                id=TicketId(bytes([self.ways % 256]) * 16),
                kv_address="",
                instance=InstanceName("p"),
                incarnation=Incarnation(1),
                num_tokens=first,
            )
        self.said["prefill"] = deque([Started(ticket=ticket), self.token("prefill", first), ended("prefill", "done")])

    @precondition(lambda self: self.is_live() and self.machine.decode is Leg.SEEKING)
    @rule(brings_token=st.booleans())
    def find_decode(self, brings_token: bool) -> None:
        self.machine.opened_decode()
        first = self.machine._first_index
        token = 100 + first if brings_token else None
        self.said["decode"] = deque([HandedOff(first_token=token)])
        self.said["decode"] += [self.token("decode", index) for index in range(first + 1, self.length)]
        self.said["decode"].append(ended("decode", "done"))

    @precondition(lambda self: self.is_live() and self.machine.decode is Leg.SEEKING and self.instead is not None)
    @rule()
    def find_nobody(self) -> None:
        self.perform(self.machine.begin_anew())

    @precondition(lambda self: any(self.said.values()))
    @rule(prefer=st.sampled_from(["prefill", "decode"]))
    def say(self, prefer: str) -> None:
        role = prefer if self.said[prefer] else ("decode" if prefer == "prefill" else "prefill")
        self.perform(self.machine.handle(self.said[role].popleft()))

    @precondition(lambda self: self.is_live() and self.open_roles())
    @rule(data=st.data(), how=st.sampled_from(["lost", "drained", "cancelled", "handoff_failed", "refused"]))
    def harm(self, data: st.DataObject, how: str) -> None:
        role = data.draw(st.sampled_from(self.open_roles()))
        under_pull = role == "decode" and self.said["decode"] and isinstance(self.said["decode"][0], HandedOff)
        event: LegEvent
        if how == "handoff_failed":
            if not under_pull:
                return
            event = ended("decode", "handoff_failed")
        elif how == "refused":
            started = role == "decode" and not under_pull
            if started or (role == "prefill" and self.machine.prefill is not Leg.OPEN):
                return
            event = Refused(role=role, reason="busy")
        elif how == "lost":
            event = Lost(role=role, detail="gone")
        else:
            event = ended(role, how)
        self.said[role].clear()
        self.perform(self.machine.handle(event))

    def open_roles(self) -> list[str]:
        closed = (Leg.NONE, Leg.CLOSED, Leg.SEEKING)
        legs = {"prefill": self.machine.prefill, "decode": self.machine.decode}
        return [role for role, leg in legs.items() if leg not in closed and self.said[role]]

    @invariant()
    def every_index_once_and_in_order(self) -> None:
        if hasattr(self, "out"):
            assert self.out == [100 + index for index in range(len(self.out))]
            assert len(self.out) <= self.length

    @invariant()
    def it_ends_for_a_reason(self) -> None:
        if not hasattr(self, "out") or not self.machine.ended:
            return
        if self.failure is None:
            assert self.done and len(self.out) == self.length
        elif self.failure.kind == "suspect":
            assert self.machine.losses == MAX_REPLAYS + 1 == self.losses + 1
        else:
            assert self.failure.kind == "handoff_failed" and self.machine.replays >= MAX_FAILED_HANDOFFS

    def teardown(self) -> None:
        """Left alone, it ends well: nothing waits for what will not come."""
        if not hasattr(self, "out"):
            return
        for _ in range(100):
            if self.machine.ended:
                return
            if self.machine.phase == "queue":
                self.place(local=False)
            elif self.machine.decode is Leg.SEEKING:
                self.find_decode(brings_token=False)
            else:
                self.say("prefill")
        raise AssertionError(f"{self.machine!r} waits for nothing")


TestReplayMachine = ReplayMachine.TestCase
TestReplayMachine.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)
