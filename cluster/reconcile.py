"""Wanted and observed to actions: which process to start, tell, stop, kill or give up. Pure: no clock, no processes, no gRPC.

The slots are the wanted set: one per process, added, removed, flipped and drained by ``wanted_set``. A life
whose link is lost is killed first, and the next one starts when the old process is seen gone, or, where its host cannot
be reached, once that is plain. Death drops an instance from the membership at once. Repeated deaths wait longer and
longer, and are counted by host, too: what fails to start there, or dies by itself within ``STABLE_S`` of being ready
(``start_failures``). Until the deployment has been ready once, a bad set-up or the third crash of a process that has never
been ready ends it with the reason.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from biphase.cluster.actions import Abandon, Action, AskToStop, GiveUp, Kill, Start, TellDrain, TellFlip, TellResume
from biphase.cluster.backend import CONTROLLER, Kind
from biphase.cluster.reach import AGAIN_S, CUT_OFF, MIN_OTHERS, Reach
from biphase.cluster.slot import MemberView, Phase, Slot, Wanted, Work
from biphase.cluster.start_failures import StartFailures
from biphase.cluster.unreachable_hosts import UnreachableHosts
from biphase.protos.process import Announcement

FIRST_BACKOFF_S = 0.5
MAX_BACKOFF_S = 30.0
PUT_OFF_S = 2.0
STABLE_S = 10.0
"""A process that was ready for this long is started again at once, its earlier deaths forgotten."""
MAX_FIRST_CRASHES = 3
STOP_S = 10.0
"""How long an instance or router may take to end, or to turn, after its legs or requests are gone."""
LAST_WORDS_S = 1.0
"""When its grace is over an instance tells the routers what is left, which then goes on elsewhere as an orderly move. It is
asked to stop only so much later, so that these words are out first whatever its host and the link are busy with."""


@dataclass(slots=True)
class Reconciler:
    """Owns the slots. Events come in by method, ``decide`` gives the actions; ``version`` counts membership changes."""

    wanted: Sequence[Wanted]
    start_timeout_s: float
    kill_patience_s: float | None = None
    """After this a killed life that is not seen gone is on a host that cannot be reached; None: every host can be."""
    slots: dict[str, Slot] = field(init=False)
    former: dict[str, int] = field(default_factory=dict)
    """The last incarnation of names that are wanted no more."""
    was_ready: bool = False
    """Whether all was up at once, ever (also in an earlier life of the controller)."""
    version: int = 0
    node_failures: StartFailures = field(default_factory=StartFailures)
    unreachable: UnreachableHosts = field(default_factory=UnreachableHosts)
    reach: Reach = field(default_factory=Reach)
    notes: list[tuple[str, str, str]] = field(default_factory=list)
    """(kind, subject, text): what has happened, for people; whoever reads them takes them away."""
    _members: tuple[MemberView, ...] = ()

    def __post_init__(self) -> None:
        self.slots = {wanted.name: Slot(name=wanted.name, kind=wanted.kind) for wanted in self.wanted}

    # -- what is seen -----------------------------------------------------------------------------------------------

    def adopt(self, name: str, incarnation: int, now_s: float) -> None:
        """A process of this deployment runs already; ``incarnation`` is the one that it was started with."""
        slot = self.slots[name]
        if slot.life != incarnation or not slot.incarnation:
            slot.incarnation = slot.life = incarnation
            slot.address = ""
        slot.phase, slot.since_s, slot.adopted, slot.ran_before = "starting", now_s, True, True

    def announced(self, announcement: Announcement, now_s: float) -> None:
        slot = self.slots.get(announcement.name)
        if slot is None or slot.phase in ("waiting", "lost"):
            return
        if slot.flip is not None and announcement.incarnation == slot.flip.incarnation:
            self._turned(slot, now_s)
        if announcement.incarnation != slot.incarnation:
            return
        if not slot.is_placed and announcement.pid:
            slot.since_s = now_s
        slot.announcement, slot.node, slot.adopted = announcement, announcement.node or slot.node, False
        slot.ran_before = slot.ran_before and announcement.state not in ("starting", "loading")
        slot.address = announcement.address or slot.address
        self.node_failures.seen(slot.node)
        self.unreachable.reached(announcement.node)
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
            slot.resumes = slot.resumes and phase != "ready"
            if phase == "ready" and slot.ready_since_s is None:
                slot.ready_since_s, slot.down_since_s, slot.ever_ready = now_s, None, True
                self.notes.append(("ready", slot.name, f"{slot.name}#{slot.incarnation} is ready as {slot.kind}"))
        self._refresh(now_s)

    def linked(self, name: str, incarnation: int, now_s: float) -> None:
        """The controller's own link to the instance stands."""
        slot = self.slots.get(name)
        if slot is None or slot.killed or slot.phase == "waiting":
            return
        if slot.flip is not None and incarnation == slot.flip.incarnation:
            self._turned(slot, now_s)
        if incarnation == slot.incarnation:
            slot.linked, slot.told = True, False
            self.unreachable.reached(slot.node)
            self._refresh(now_s)

    def unlinked(self, name: str, incarnation: int, now_s: float) -> None:
        """The link is gone for a moment: the instance turns, or it is asked a second time."""
        slot = self._current(name, incarnation)
        if slot is not None and slot.flip is not None:
            slot.linked = False
            self._refresh(now_s)

    def worked(self, name: str, incarnation: int, work: Work) -> None:
        """What the instance holds, by its own word."""
        slot = self._current(name, incarnation)
        if slot is not None:
            slot.work = work

    def looked(self, answered: Mapping[str, bool], now_s: float) -> None:
        """Which other hosts have answered. While none of several does, this one is cut off, and no patience runs out."""
        since_s = self.reach.cut_off_since_s
        self.reach.looked(answered, now_s)
        if since_s is None and self.reach.is_cut_off:
            self.notes.append(("warning", CONTROLLER, CUT_OFF))
        elif since_s is not None and not self.reach.is_cut_off:
            self._discount(since_s, now_s)
            left = f"fewer than {MIN_OTHERS} other hosts are left"
            ends = "this host reaches others again" if any(answered.values()) else left
            words = f"{ends} after {now_s - since_s:.0f} s"
            self.notes.append(("warning", CONTROLLER, f"{words}: who does not answer for {AGAIN_S:g} s is given up"))

    def awake(self, now_s: float) -> None:
        """The controller runs, which is to be said every second. No patience runs out by a time in which it did not: what
        has happened meanwhile is heard first. A cut is discounted as a whole when it ends."""
        stopped_s = self.reach.awake(now_s)
        if stopped_s is not None and not self.reach.is_cut_off:
            self._discount(stopped_s, now_s)

    def _discount(self, from_s: float, to_s: float) -> None:
        for slot in self.slots.values():
            slot.discount(from_s, to_s)

    def reached(self, node: str) -> None:
        """The host answers again: instances may start there."""
        self.unreachable.reached(node)

    def lost(
        self,
        name: str,
        incarnation: int,
        reason: str,
        now_s: float,
        *,
        by_itself: bool = False,
        unreached: bool = False,
    ) -> None:
        """To be killed. ``by_itself``: its link broke and it does not answer; ``unreached``: nor does its host."""
        slot = self._current(name, incarnation)
        if slot is not None and slot.phase not in ("lost", "waiting"):
            slot.unreached = unreached and self.kill_patience_s is not None
            slot.died = by_itself and not slot.unreached
            slot.phase, slot.since_s, slot.linked, slot.reason = "lost", now_s, False, reason
            self._refresh(now_s)

    def gone(self, name: str, life: int, reason: str, now_s: float) -> None:
        """The process that was started as ``life`` is seen gone, or could not be started."""
        slot = self.slots.get(name)
        if slot is None or slot.life != life or slot.phase == "waiting":
            return
        failed_setup = slot.announcement is not None and slot.announcement.state == "failed"
        if not (slot.reason and (slot.killed or failed_setup)):
            slot.reason = reason
        self._ended(slot, now_s, failed_setup=failed_setup)

    def no_room(self, name: str, life: int, reason: str, now_s: float) -> None:
        """The backend has no place for it: tried again, later and later."""
        slot = self.slots.get(name)
        self.gone(name, life, reason, now_s)
        if slot is not None:
            slot.no_room = slot.phase == "waiting"

    def put_off(self, name: str, life: int, reason: str, now_s: float) -> None:
        """Its start was not even tried, which is no failure of it; it is due again in a while."""
        slot = self._current(name, life)
        if slot is not None and slot.phase == "starting":
            if slot.reason != reason:
                self.notes.append(("warning", name, f"{name}#{life} {reason}"))
            slot.reason = reason
            slot.end_life(now_s)
            slot.not_before_s = now_s + PUT_OFF_S
            self._refresh(now_s)

    def flip_refused(self, name: str, incarnation: int, reason: str, now_s: float) -> None:
        """The instance does not turn: it stays what it is."""
        slot = self._current(name, incarnation)
        if slot is not None and slot.flip is not None:
            self.notes.append(("flip", name, f"{name} does not turn to {slot.flip.kind}: {reason}"))
            slot.flip, slot.asked_s, slot.told, slot.resumes = None, None, False, slot.phase == "draining"
            self._refresh(now_s)

    def _ended(self, slot: Slot, now_s: float, *, failed_setup: bool = False, abandoned: bool = False) -> None:
        by_wish, ready_since_s = bool(slot.ending), slot.ready_since_s
        host_lost = bool(slot.node) and (abandoned or slot.unreached)
        if host_lost:
            at = slot.announcement.address if slot.announcement is not None and slot.unreached else ""
            self.unreachable.avoid(slot.node, now_s, silent_at=at)
        if by_wish and (slot.ending == "remove" or slot.stop_asked_s is not None):
            self.notes.append(("end", slot.name, f"{slot.name}#{slot.incarnation} has ended, as asked"))
        else:
            self.notes.append(("end", slot.name, f"{slot.name}#{slot.incarnation} is gone: {slot.reason}"))
        stable = by_wish or (ready_since_s is not None and now_s - ready_since_s >= STABLE_S)
        self._blame_node(slot, now_s, stable=stable, host_lost=host_lost)
        blameless = slot.moves or (host_lost and ready_since_s is not None)
        if by_wish or not blameless:  # what follows our wish begins without the failures before it
            slot.failures = 0 if stable else slot.failures + 1
        if failed_setup and not by_wish:  # the same again may fail the same
            slot.failures = max(1, slot.failures) if self.was_ready or slot.ever_ready else MAX_FIRST_CRASHES
        # the first death of a process that had been ready is repaired at once
        tries = slot.failures - (1 if ready_since_s is not None and not failed_setup else 0)
        delay_s = 0.0 if blameless or tries <= 0 else min(MAX_BACKOFF_S, FIRST_BACKOFF_S * 2 ** (tries - 1))
        if slot.ending == "remove":
            self.forget(slot)
        else:
            slot.not_before_s = now_s + delay_s
            slot.ending = ""
            slot.end_life(now_s)
            if slot.next_generation is not None:
                slot.generation, slot.next_generation = slot.next_generation, None
        self._refresh(now_s)

    def _blame_node(self, slot: Slot, now_s: float, *, stable: bool, host_lost: bool) -> None:
        """Count the end of a life against its host: of one that was never ready, or died by itself before it was stable. Whose
        end we decided, or is about to leave or turn, says nothing of the host, nor does one that has turned or that an earlier
        controller started: it ran before. Who is killed after its link broke had died, unless its whole host is lost."""
        self._clear_nodes(now_s)
        was_ready = slot.ready_since_s is not None
        decided = host_lost or slot.is_leaving or (slot.killed and not slot.died)
        excused = was_ready and (decided or slot.ran_before or slot.incarnation != slot.life)
        if stable or slot.moves or excused or not slot.is_instance:
            return
        problem = self.node_failures.failed(
            slot.node, slot.kind, name=slot.name, at_s=now_s, was_ready=was_ready, away=self.unreachable
        )
        if problem:
            self.notes.append(("node", slot.node, problem))

    def _clear_nodes(self, now_s: float) -> None:
        """Forget the failures on hosts where a life has become stable since. Looked at when the next life ends is early
        enough, nobody asks before."""
        for slot in self.slots.values():
            if slot.is_instance and slot.ready_since_s is not None and slot.ready_since_s + STABLE_S <= now_s:
                self.node_failures.steady(slot.node, slot.ready_since_s + STABLE_S)

    def forget(self, slot: Slot) -> None:
        """Drop a slot whose process is wanted no more and gone. Its incarnations are used no second time."""
        self.former[slot.name] = slot.flip.incarnation if slot.flip is not None else slot.incarnation
        del self.slots[slot.name]

    def _turned(self, slot: Slot, now_s: float) -> None:
        assert slot.flip is not None
        self._clear_nodes(now_s)  # how long it was ready before is not known afterwards
        self.notes.append(
            (
                "flip",
                slot.name,
                f"{slot.name} has turned from {slot.kind} to {slot.flip.kind} (#{slot.flip.incarnation})",
            )
        )
        slot.kind, slot.incarnation, slot.flip = slot.flip.kind, slot.flip.incarnation, None
        slot.phase, slot.since_s, slot.ready_since_s = "ready", now_s, now_s
        slot.linked, slot.asked_s, slot.told, slot.work = False, None, False, None

    # -- what follows -----------------------------------------------------------------------------------------------

    def decide(self, now_s: float) -> list[Action]:
        """What to do now. A Start counts as done (the slot is ``starting``); a Kill is given once per life."""
        actions: list[Action] = []
        self.unreachable.end(now_s)
        for slot in list(self.slots.values()):
            if slot.phase == "waiting":
                if not (self.was_ready or slot.ever_ready) and slot.failures >= MAX_FIRST_CRASHES:
                    return [GiveUp(reason=f"{slot.name}: {slot.reason}")]
                if slot.ending == "remove":
                    self.forget(slot)
                elif now_s >= slot.not_before_s or slot.waits_anew(self.avoided):
                    slot.begin_life(self._next_incarnation(slot), now_s, self.avoided)
                    actions.append(Start(name=slot.name, incarnation=slot.incarnation))
                continue
            if slot.phase != "lost" and not self.reach.is_cut_off:
                self._time_out(slot, now_s)
            if slot.phase != "lost":
                actions += self._bring_out(slot, now_s)
            if slot.phase == "lost" and not slot.killed:
                slot.killed_s = now_s
                actions.append(Kill(name=slot.name, incarnation=slot.incarnation, reason=slot.reason))
            elif slot.killed_s is not None and self._unreachable_at_s(slot) <= now_s:
                actions.append(Abandon(name=slot.name, incarnation=slot.incarnation, node=slot.node))
                self._ended(slot, now_s, abandoned=True)
        self._refresh(now_s)
        return actions

    def _time_out(self, slot: Slot, now_s: float) -> None:
        """Whoever takes longer than it may is lost."""
        if slot.phase in ("starting", "loading"):
            if slot.ending and not slot.adopted:
                self._lose(slot, "wanted no more" if slot.ending == "remove" else "to be started anew", now_s)
            elif slot.waits_anew(self.avoided):
                slot.moves = True
                self._lose(slot, "to be placed anew, it may go to other hosts now", now_s)
            elif slot.is_placed and slot.lasted_s(now_s) >= self.start_timeout_s:
                doing = slot.announcement.detail if slot.announcement is not None else ""
                said = f", its last word: {doing}" if doing else ""
                self._lose(slot, f"not ready within {self.start_timeout_s:g} s{said}", now_s)
        elif slot.stop_asked_s is not None and now_s - slot.stop_asked_s >= _stop_limit_s(slot):
            self._lose(slot, f"did not end within {_stop_limit_s(slot):g} s of being asked", now_s)
        elif slot.flip is not None and slot.asked_s is not None:
            limit_s = slot.grace_s + STOP_S
            if now_s - slot.asked_s >= limit_s:
                self._lose(slot, f"has not turned to {slot.flip.kind} within {limit_s:g} s", now_s)

    def _lose(self, slot: Slot, reason: str, now_s: float) -> None:
        slot.reason, slot.phase, slot.since_s = reason, "lost", now_s

    def _bring_out(self, slot: Slot, now_s: float) -> list[Action]:
        """The next word to an instance that is to drain, turn or stop; routers are just asked to stop."""
        name, incarnation = slot.name, slot.incarnation
        if slot.phase not in ("ready", "draining"):
            return []
        if not slot.is_instance:
            if slot.ending and slot.stop_asked_s is None:
                slot.stop_asked_s = now_s
                return [AskToStop(name=name, incarnation=incarnation)]
            return []
        actions: list[Action] = []
        if slot.linked and not slot.told:
            slot.told = True
            if slot.is_leaving and slot.asked_s is None:
                slot.asked_s = now_s
            left_s = max(0.0, slot.grace_s - (now_s - slot.asked_s)) if slot.asked_s is not None else 0.0
            if slot.ending or slot.held:
                actions.append(TellDrain(name=name, incarnation=incarnation, grace_s=max(left_s, 0.001)))
            elif slot.flip is not None:
                actions.append(TellFlip(name=name, incarnation=incarnation, to=slot.flip, grace_s=max(left_s, 0.001)))
            elif slot.resumes:
                actions.append(TellResume(name=name, incarnation=incarnation))
        if slot.ending and slot.stop_asked_s is None and slot.asked_s is not None:
            drained = slot.work is not None and slot.work.draining and slot.work.is_idle
            over = not self.reach.is_cut_off and now_s >= slot.asked_s + slot.grace_s + LAST_WORDS_S
            if drained or over:
                slot.stop_asked_s = now_s
                actions.append(AskToStop(name=name, incarnation=incarnation))
        return actions

    def next_due_s(self) -> float | None:
        """When ``decide`` has something to do by the passing of time alone."""
        due: list[float] = list(self.unreachable.values())
        for slot in self.slots.values():
            if slot.phase == "waiting":
                due.append(slot.not_before_s)
            elif self.reach.is_cut_off:
                continue
            elif slot.killed:
                due.append(self._unreachable_at_s(slot))
            elif slot.phase in ("starting", "loading"):
                if slot.is_placed and slot.since_s is not None:
                    due.append(slot.since_s + self.start_timeout_s)
            elif slot.stop_asked_s is not None:
                due.append(slot.stop_asked_s + _stop_limit_s(slot))
            elif slot.asked_s is not None and slot.ending:
                due.append(slot.asked_s + slot.grace_s + LAST_WORDS_S)
            elif slot.asked_s is not None and slot.flip is not None:
                due.append(slot.asked_s + slot.grace_s + STOP_S)
        finite = [at_s for at_s in due if at_s != float("inf")]
        return min(finite, default=None)

    def _unreachable_at_s(self, slot: Slot) -> float:
        if slot.killed_s is None or self.kill_patience_s is None or self.reach.is_cut_off:
            return float("inf")
        return slot.killed_s + self.kill_patience_s

    # -- what others read -------------------------------------------------------------------------------------------

    @property
    def members(self) -> tuple[MemberView, ...]:
        return self._members

    @property
    def avoided(self) -> frozenset[str]:
        """The hosts that get no instance now."""
        return frozenset(self.node_failures.cordoned) | frozenset(self.unreachable)

    @property
    def is_settled(self) -> bool:
        """All that was found running has been heard: who serves is a member."""
        return not any(slot.is_unheard for slot in self.slots.values())

    @property
    def all_up(self) -> bool:
        """All that is wanted takes work, but for what was drained by hand or is out for being slow."""
        kept = [slot for slot in self.slots.values() if slot.ending != "remove"]
        return all(
            slot.is_up and (slot.held or (slot.phase == "ready" and slot.flip is None and not slot.ending))
            for slot in kept
        )

    def incarnations(self) -> dict[str, int]:
        return {name: slot.incarnation for name, slot in self.slots.items()}

    def counts(self) -> dict[Kind, int]:
        """Wanted instances by the role they have or are turning into."""
        kept = [slot.role for slot in self.slots.values() if slot.is_instance and slot.ending != "remove"]
        return {"prefill": kept.count("prefill"), "decode": kept.count("decode")}

    def refresh(self, now_s: float) -> None:
        """Look at the members again after a change of the wanted set."""
        self._refresh(now_s)

    def _next_incarnation(self, slot: Slot) -> int:
        return max(slot.incarnation, self.former.get(slot.name, 0)) + 1

    def _current(self, name: str, incarnation: int) -> Slot | None:
        """The slot, unless the event is about another life."""
        slot = self.slots.get(name)
        return slot if slot is not None and slot.incarnation == incarnation else None

    def _refresh(self, now_s: float) -> None:
        members = tuple(
            slot.member()
            for slot in self.slots.values()
            if slot.is_instance and slot.is_up and slot.announcement is not None
        )
        if members != self._members:
            self._members = members
            self.version += 1
        self.was_ready = self.was_ready or self.all_up

    def __repr__(self) -> str:
        up = sum(slot.is_up for slot in self.slots.values())
        return f"<Reconciler [{up} up of {len(self.slots)}, version {self.version}]>"


def _stop_limit_s(slot: Slot) -> float:
    """From being asked to the end: an instance has drained before, a router drains then."""
    return STOP_S if slot.is_instance else slot.grace_s + STOP_S
