"""One wanted process as the reconciler knows it, and what it says of it to others. Pure: values only.

A slot goes through lives, told apart by the incarnation:

    waiting -> starting -> loading -> ready (-> draining) -> (ended) -> waiting ...

``life`` is the incarnation its process was started with; a flip gives the same process a new incarnation and role.
"""

from dataclasses import dataclass
from typing import Literal

from biphase.cluster.backend import Kind
from biphase.protos.process import Announcement

Phase = Literal["waiting", "starting", "loading", "ready", "lost", "draining"]
Ending = Literal["", "remove", "again"]
"""What follows the end of a life that we ask for: nothing (the process is wanted no more), or another one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """A process that should run."""

    name: str
    kind: Kind


@dataclass(frozen=True, slots=True, kw_only=True)
class FlipTo:
    """A change of role under way: what the same process is going to be."""

    kind: Kind
    incarnation: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What an instance holds, by its last word on the controller's link."""

    queued: int = 0
    queued_tokens: int = 0
    running: int = 0
    running_tokens: int = 0
    free_blocks: int = 0
    room_blocks: int = 0
    draining: bool = False
    legs: int = 0
    """Requests aboard; prompts that wait to be pulled neither queue nor run."""

    @property
    def is_idle(self) -> bool:
        return self.legs == 0 and self.queued == 0 and self.running == 0

    @property
    def left(self) -> int:
        """How much has to be waited for, for comparing: tokens, with a token for each request of unknown size."""
        return self.queued_tokens + self.running_tokens + self.queued + self.running


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberView:
    """An instance that routers may use."""

    name: str
    kind: Kind
    incarnation: int
    address: str
    draining: bool
    generation: str = ""
    node: str = ""


@dataclass(slots=True, kw_only=True)
class Slot:
    """What is known of one wanted process. Owned by the Reconciler."""

    name: str
    kind: Kind
    """Now; of an instance that flips the former until it has turned."""
    phase: Phase = "waiting"
    incarnation: int = 0
    life: int = 0
    since_s: float | None = None
    """When the phase began; None: none has."""
    ready_since_s: float | None = None
    ever_ready: bool = False
    """In this life or an earlier one."""
    down_since_s: float | None = None
    """Since when it is wanted and does not serve, over all tries; None: it serves."""
    no_room: bool = False
    """The last try found no place to start."""
    health: str = ""
    """Of an instance that is up, by its steps: slow, probing, stopped."""
    not_before_s: float = 0.0
    failures: int = 0
    restarts: int = 0
    generation: str = ""
    next_generation: str | None = None
    """What its next life is to serve, where that is another."""
    next_kind: Kind | None = None
    node: str = ""
    address: str = ""
    """Where the life has said that it listens, to this controller or an earlier one."""
    avoids: frozenset[str] | None = None
    """The hosts that the life was started to avoid; None: that is not known, an earlier controller started it."""
    moves: bool = False
    """Is ended only to be placed anew."""
    unreached: bool = False
    """Its host answered nothing when the life was lost."""
    died: bool = False
    """Was lost by its own fault: its host answered."""
    linked: bool = False
    killed_s: float | None = None
    """When the current life was killed (by us); it is not yet seen gone."""
    reason: str = ""
    """Why the last life ended, or the current one is being ended."""
    announcement: Announcement | None = None
    work: Work | None = None

    held: bool = False
    """Drained by hand: it stays, and takes no work."""
    resumes: bool = False
    """Is to be told that its drain is over, over every link until it takes work again."""
    slow: bool = False
    """Out for being slow: routers give it nothing new."""
    silent: bool = False
    """A router that has not reported for long."""
    ending: Ending = ""
    flip: FlipTo | None = None
    grace_s: float = 0.0
    """Of the drain, stop or flip under way."""
    asked_s: float | None = None
    """When the drain or flip under way was first told to the instance."""
    told: bool = False
    """The newest command has gone out over the present link."""
    stop_asked_s: float | None = None
    adopted: bool = False
    """Found running, and has not said a word yet."""
    ran_before: bool = False
    """Was ready when this controller found it: how long is not known."""

    @property
    def is_instance(self) -> bool:
        return self.kind in ("prefill", "decode")

    @property
    def role(self) -> Kind:
        """Wanted: what it is, or is turning into."""
        return self.flip.kind if self.flip is not None else self.next_kind or self.kind

    @property
    def is_up(self) -> bool:
        """Ready, and held by a link where it is an instance, heard where it is a router."""
        return self.phase in ("ready", "draining") and (not self.silent if self.kind == "router" else self.linked)

    @property
    def is_unheard(self) -> bool:
        """Found running, and may serve, though its link does not stand yet."""
        if not self.is_instance or self.linked or self.phase in ("waiting", "lost"):
            return False
        return self.adopted or self.phase in ("ready", "draining")

    @property
    def is_leaving(self) -> bool:
        """Takes no new work by our wish."""
        return self.held or bool(self.ending) or self.flip is not None

    @property
    def is_drained(self) -> bool:
        """Nothing is aboard and nothing comes any more, by its own word."""
        return self.is_leaving and self.work is not None and self.work.draining and self.work.is_idle

    def grace_left_s(self, now_s: float) -> float:
        """Until what is left aboard goes on elsewhere; 0 where it is over, or nothing leaves."""
        if not self.is_leaving:
            return 0.0
        return self.grace_s if self.asked_s is None else max(0.0, self.asked_s + self.grace_s - now_s)

    @property
    def serves(self) -> bool:
        """Takes new work now."""
        return self.is_up and self.phase == "ready" and not self.is_leaving and not self.slow

    @property
    def is_placed(self) -> bool:
        """False while it waits for a host with room: it has no process yet, and the time of its start does not run."""
        return self.announcement is None or self.announcement.pid != 0

    @property
    def killed(self) -> bool:
        return self.killed_s is not None

    def lasted_s(self, now_s: float) -> float:
        """How long the phase has lasted; 0 where none has begun."""
        return 0.0 if self.since_s is None else max(0.0, now_s - self.since_s)

    def waits_anew(self, avoided: frozenset[str]) -> bool:
        """It has found no room, and the hosts to avoid are others now than when it was started."""
        found_none = self.no_room if self.phase == "waiting" else self.phase == "starting" and not self.is_placed
        return self.is_instance and found_none and self.avoids != avoided

    def discount(self, from_s: float, to_s: float) -> None:
        """It could not be heard then: that is no part of the time that it has been given."""

        def later(at_s: float | None) -> float | None:
            return None if at_s is None else at_s + to_s - max(at_s, from_s)

        if self.phase in ("starting", "loading"):
            self.since_s = later(self.since_s)
        self.asked_s, self.stop_asked_s, self.killed_s = map(later, (self.asked_s, self.stop_asked_s, self.killed_s))

    def begin_life(self, incarnation: int, now_s: float, avoids: frozenset[str] = frozenset()) -> None:
        if self.next_kind is not None:
            self.kind, self.next_kind = self.next_kind, None
        self.restarts += 1 if self.incarnation else 0
        self.incarnation = self.life = incarnation
        self.phase, self.since_s, self.no_room = "starting", now_s, False
        self.node = self.address = ""
        self.avoids = avoids
        if self.down_since_s is None:
            self.down_since_s = now_s

    def end_life(self, now_s: float) -> None:
        """Nothing of the life that is over is left, but for why it ended."""
        self.phase, self.since_s, self.health = "waiting", now_s, ""
        self.moves, self.unreached, self.died, self.address = False, False, False, ""
        if self.ready_since_s is not None or self.down_since_s is None:
            self.down_since_s = now_s
        self.adopted = self.ran_before = self.silent = self.resumes = False
        self.linked, self.killed_s, self.ready_since_s, self.announcement = False, None, None, None
        self.work, self.asked_s, self.told, self.stop_asked_s, self.slow = None, None, False, None, False
        if self.next_kind is not None:
            self.kind, self.next_kind = self.next_kind, None
        if self.flip is not None:  # its next life begins in the new role
            self.kind, self.incarnation, self.flip = self.flip.kind, self.flip.incarnation, None

    def member(self) -> MemberView:
        assert self.announcement is not None
        return MemberView(
            name=self.name,
            kind=self.kind,
            incarnation=self.incarnation,
            address=self.announcement.address,
            draining=self.phase == "draining" or self.is_leaving or self.slow,
            generation=self.generation,
            node=self.node,
        )
