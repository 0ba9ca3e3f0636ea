"""Wanted and observed to actions: which process to start, kill, publish or give up. Pure: no clock, no processes, no gRPC.

Each wanted process has a slot; a slot goes through lives, told apart by the incarnation:

    waiting -> starting -> loading -> ready -> (ended) -> waiting ...

A life ends when its process is gone; a life whose link is lost is killed first, and the next one starts only when the
old process is seen gone. Death drops an instance from the membership at once. Repeated deaths wait longer and longer;
until the deployment has been ready once, a bad set-up or the third crash of a process ends it with the reason.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from biphase.cluster.backend import Kind
from biphase.protos.process import Announcement

Phase = Literal["waiting", "starting", "loading", "ready", "lost", "draining"]

FIRST_BACKOFF_S = 0.5
MAX_BACKOFF_S = 30.0
STABLE_S = 10.0
"""A process that was ready for this long is started again at once, its earlier deaths forgotten."""
MAX_FIRST_CRASHES = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """A process that should run."""

    name: str
    kind: Kind


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    name: str
    incarnation: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Kill:
    name: str
    incarnation: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class GiveUp:
    """The deployment cannot start."""

    reason: str


Action = Start | Kill | GiveUp


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberView:
    """An instance that routers may use."""

    name: str
    kind: Kind
    incarnation: int
    address: str
    draining: bool


@dataclass(slots=True, kw_only=True)
class Slot:
    """What is known of one wanted process. Owned by the Reconciler."""

    wanted: Wanted
    phase: Phase = "waiting"
    incarnation: int = 0
    since_s: float = 0.0
    """When the phase began."""
    ready_since_s: float | None = None
    not_before_s: float = 0.0
    failures: int = 0
    restarts: int = 0
    linked: bool = False
    killed: bool = False
    """The current life was killed (by us) and is not yet seen gone."""
    reason: str = ""
    """Why the last life ended, or the current one is being ended."""
    announcement: Announcement | None = None

    @property
    def is_up(self) -> bool:
        """Ready, and, where it is an instance, held by a link."""
        return self.phase in ("ready", "draining") and (self.linked or self.wanted.kind == "router")


@dataclass(slots=True)
class Reconciler:
    """Owns the slots. Events come in by method, ``decide`` gives the actions; ``version`` counts membership changes."""

    wanted: Sequence[Wanted]
    start_timeout_s: float
    slots: dict[str, Slot] = field(init=False)
    was_ready: bool = False
    """Whether all was up at once, ever (also in an earlier life of the controller)."""
    version: int = 0
    _members: tuple[MemberView, ...] = ()

    def __post_init__(self) -> None:
        self.slots = {wanted.name: Slot(wanted=wanted) for wanted in self.wanted}

    def adopt(self, name: str, incarnation: int, now_s: float) -> None:
        """A process of this deployment runs already."""
        slot = self.slots[name]
        slot.incarnation, slot.phase, slot.since_s = incarnation, "starting", now_s

    def announced(self, announcement: Announcement, now_s: float) -> None:
        slot = self._current(announcement.name, announcement.incarnation)
        if slot is None or slot.killed or slot.phase == "waiting":
            return
        slot.announcement = announcement
        phase: Phase | None = None
        match announcement.state:
            case "starting" | "loading" | "ready" | "draining":
                phase = announcement.state
            case "stopped":
                phase = "draining"
            case "failed":
                slot.reason = announcement.detail
        if phase is not None and phase != slot.phase:
            slot.phase, slot.since_s = phase, now_s
            if phase == "ready" and slot.ready_since_s is None:
                slot.ready_since_s = now_s
        self._refresh(now_s)

    def linked(self, name: str, incarnation: int, now_s: float) -> None:
        """The controller's own link to the instance stands."""
        slot = self._current(name, incarnation)
        if slot is not None and not slot.killed and slot.phase != "waiting":
            slot.linked = True
            self._refresh(now_s)

    def lost(self, name: str, incarnation: int, reason: str, now_s: float) -> None:
        """The instance's link broke and it does not answer: to be killed."""
        slot = self._current(name, incarnation)
        if slot is not None and slot.phase not in ("lost", "waiting"):
            slot.phase, slot.since_s, slot.linked, slot.reason = "lost", now_s, False, reason
            self._refresh(now_s)

    def gone(self, name: str, incarnation: int, reason: str, now_s: float) -> None:
        """The process is seen gone."""
        slot = self._current(name, incarnation)
        if slot is None or slot.phase == "waiting":
            return
        failed_setup = slot.announcement is not None and slot.announcement.state == "failed"
        if not (slot.reason and (slot.killed or failed_setup)):
            slot.reason = reason
        stable = slot.ready_since_s is not None and now_s - slot.ready_since_s >= STABLE_S
        slot.failures = 0 if stable else slot.failures + 1
        # the first death of a process that had been ready is repaired at once
        tries = slot.failures - (1 if slot.ready_since_s is not None else 0)
        delay_s = 0.0 if tries <= 0 else min(MAX_BACKOFF_S, FIRST_BACKOFF_S * 2 ** (tries - 1))
        if failed_setup and not self.was_ready:
            slot.failures = MAX_FIRST_CRASHES  # the same again would fail the same
        slot.phase, slot.since_s, slot.not_before_s = "waiting", now_s, now_s + delay_s
        slot.linked, slot.killed, slot.ready_since_s, slot.announcement = False, False, None, None
        self._refresh(now_s)

    def decide(self, now_s: float) -> list[Action]:
        """What to do now. A Start counts as done (the slot is ``starting``); a Kill is given once per life."""
        actions: list[Action] = []
        for slot in self.slots.values():
            name = slot.wanted.name
            if slot.phase == "waiting":
                if not self.was_ready and slot.failures >= MAX_FIRST_CRASHES:
                    return [GiveUp(reason=f"{name}: {slot.reason}")]
                if now_s >= slot.not_before_s:
                    slot.restarts += 1 if slot.incarnation else 0
                    slot.incarnation += 1
                    slot.phase, slot.since_s = "starting", now_s
                    actions.append(Start(name=name, incarnation=slot.incarnation))
            elif slot.phase in ("starting", "loading") and now_s - slot.since_s >= self.start_timeout_s:
                doing = slot.announcement.detail if slot.announcement is not None else ""
                slot.reason = f"not ready within {self.start_timeout_s:g} s" + (
                    f", its last word: {doing}" if doing else ""
                )
                slot.phase, slot.since_s = "lost", now_s
            if slot.phase == "lost" and not slot.killed:
                slot.killed = True
                actions.append(Kill(name=name, incarnation=slot.incarnation, reason=slot.reason))
        return actions

    def next_due_s(self) -> float | None:
        """When ``decide`` has something to do by the passing of time alone."""
        due = [slot.not_before_s for slot in self.slots.values() if slot.phase == "waiting"]
        due += [
            slot.since_s + self.start_timeout_s
            for slot in self.slots.values()
            if slot.phase in ("starting", "loading") and not slot.killed
        ]
        return min(due, default=None)

    @property
    def members(self) -> tuple[MemberView, ...]:
        return self._members

    @property
    def all_up(self) -> bool:
        return all(slot.is_up and slot.phase == "ready" for slot in self.slots.values())

    def incarnations(self) -> dict[str, int]:
        return {name: slot.incarnation for name, slot in self.slots.items()}

    def _current(self, name: str, incarnation: int) -> Slot | None:
        """The slot, unless the event is about another life."""
        slot = self.slots.get(name)
        return slot if slot is not None and slot.incarnation == incarnation else None

    def _refresh(self, now_s: float) -> None:
        members = tuple(
            MemberView(
                name=slot.wanted.name,
                kind=slot.wanted.kind,
                incarnation=slot.incarnation,
                address=slot.announcement.address,
                draining=slot.phase == "draining",
            )
            for slot in self.slots.values()
            if slot.wanted.kind != "router" and slot.is_up and slot.announcement is not None
        )
        if members != self._members:
            self._members = members
            self.version += 1
        self.was_ready = self.was_ready or self.all_up

    def __repr__(self) -> str:
        up = sum(slot.is_up for slot in self.slots.values())
        return f"<Reconciler [{up} up of {len(self.slots)}, version {self.version}]>"
