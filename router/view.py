"""What the dispatch policy sees: an immutable snapshot of the instances. Pure values."""

from dataclasses import dataclass, replace
from typing import Literal, NewType

from biphase.protos.ids import Incarnation, RequestId
from biphase.protos.values import Mode, Role

InstanceKey = NewType("InstanceKey", str)
"""Names a member within one router: its name, or its address when that is all we were told."""

LinkState = Literal["connecting", "ready", "lost"]
ShownState = Literal["connecting", "ready", "lost", "draining"]


@dataclass(frozen=True, slots=True, kw_only=True)
class InState:
    """What an instance is for people and benches, and since when."""

    state: ShownState
    since_s: float

    def then(self, state: ShownState, now_s: float) -> "InState":
        """Seen in ``state`` at ``now_s``; the same state again is no change."""
        return self if state == self.state else InState(state=state, since_s=now_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """A prefill and a decode instance between which KV goes."""

    prefill: InstanceKey
    decode: InstanceKey


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceView:
    """One instance as this router knows it: its last Load, plus what we sent there that no Load has shown yet."""

    key: InstanceKey
    role: Role
    state: LinkState = "ready"
    since_s: float = 0.0
    """When it came into ``state``, or began to drain."""
    draining: bool = False
    full: bool = False
    """It answered BUSY, and nothing it said since shows room."""
    queued_tokens: int = 0
    requests: int = 0
    """Queued, running and promised."""
    room_blocks: int = 0
    """Free and promised to nobody; below zero when more was promised than there is."""
    num_blocks: int = 0
    block_size: int = 1
    max_num_seqs: int = 0
    """0: unknown."""
    max_queued_tokens: int = 0
    """0: unknown."""
    generation: str = ""
    """Of its weights and plan."""

    @property
    def takes_work(self) -> bool:
        return self.state == "ready" and not self.draining

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterView:
    """All instances at one moment. The ``*_since_s`` say since when none of that role is ready; None: one is.

    ``broken``: pairs that cannot be used now; ``retry_s``: when the first of them may be tried again.
    """

    instances: tuple[InstanceView, ...]
    now_s: float
    no_prefill_since_s: float | None = None
    no_decode_since_s: float | None = None
    broken: frozenset[Pair] = frozenset()
    retry_s: float | None = None

    def of_role(self, role: Role) -> tuple[InstanceView, ...]:
        return tuple(instance for instance in self.instances if instance.role == role)

    @property
    def generations(self) -> list[str]:
        """All that are there, by name."""
        return sorted({instance.generation for instance in self.instances})

    def of_generation(self, generation: str) -> "ClusterView":
        """As if there were no other."""
        return replace(self, instances=tuple(one for one in self.instances if one.generation == generation))


@dataclass(frozen=True, slots=True, kw_only=True)
class PlaceRequest:
    """What of a request matters for its placement.

    ``prompt_tokens``: all that has to be prefilled, emitted output too. ``arrived_s``: since when it waits; of a replay,
    since it was cut off. ``generation``: the only one that may go on with it; None: any.
    """

    request_id: RequestId
    prompt_tokens: int
    max_tokens: int
    arrived_s: float
    deadline_s: float | None = None
    is_replay: bool = False
    generation: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """The part of the configuration that the policy obeys; see RouterConfig and Waits for the meanings."""

    mode: Mode = "auto"
    colocated: bool = False
    local_prefill_max_tokens: int = 0
    no_prefill_s: float = 3.0
    no_decode_s: float = 30.0
    no_generation_s: float = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Disaggregated:
    """Prefill on one instance, decode on another. ``decode`` is None when there is nothing to decode."""

    prefill: InstanceKey
    decode: InstanceKey | None
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Local:
    """A decode instance does both."""

    decode: InstanceKey
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Wait:
    """Nothing takes it now. ``until_s``: when to look again even if no instance has said anything; None: never.

    ``alone``: what it waits for says nothing about those behind it.
    """

    reason: str
    until_s: float | None = None
    alone: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Refuse:
    """Nothing will take it; ends UNAVAILABLE with ``detail``, or ABORTED where its weights are gone for good."""

    reason: str
    detail: str
    aborted: bool = False


Placement = Disaggregated | Local | Wait | Refuse


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """An instance as the controller, or the command line, names it. ``incarnation`` 0: whichever answers."""

    key: InstanceKey
    role: Role
    address: str
    incarnation: Incarnation
    draining: bool = False
    generation: str = ""
    node: str = ""
