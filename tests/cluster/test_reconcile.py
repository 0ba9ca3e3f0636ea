"""The controller's decisions, under a clock that the test turns."""

from biphase.cluster.actions import GiveUp, Kill, Start
from biphase.cluster.controller_state import ControllerState, restore, slots_of
from biphase.cluster.planner_view import members_of
from biphase.cluster.reconcile import FIRST_BACKOFF_S, MAX_BACKOFF_S, STABLE_S, Reconciler
from biphase.cluster.slot import Slot, Wanted
from biphase.protos.process import Announcement, ProcessState

WANTED = (
    Wanted(name="prefill-0", kind="prefill"),
    Wanted(name="decode-0", kind="decode"),
    Wanted(name="router-0", kind="router"),
)


def make(start_timeout_s: float = 100.0) -> Reconciler:
    return Reconciler(WANTED, start_timeout_s)


def say(core: Reconciler, name: str, incarnation: int, state: ProcessState, now_s: float, *, detail: str = "") -> None:
    address = f"host:{incarnation}" if state in ("ready", "draining") else ""
    kind = name.partition("-")[0]
    word = Announcement(
        name=name, kind=kind, incarnation=incarnation, pid=1, state=state, detail=detail, address=address
    )
    core.announced(word, now_s)


def bring_up(core: Reconciler, now_s: float = 0.0) -> None:
    core.decide(now_s)
    for wanted in WANTED:
        say(core, wanted.name, 1, "ready", now_s)
    core.linked("prefill-0", 1, now_s)
    core.linked("decode-0", 1, now_s)


def names(core: Reconciler) -> list[tuple[str, int]]:
    return [(member.name, member.incarnation) for member in core.members]


def test_everything_starts_at_once() -> None:
    core = make()
    assert core.decide(0.0) == [Start(name=wanted.name, incarnation=1) for wanted in WANTED]
    assert core.decide(0.0) == []


def test_a_member_is_ready_and_linked() -> None:
    core = make()
    core.decide(0.0)
    say(core, "prefill-0", 1, "loading", 1.0)
    say(core, "prefill-0", 1, "ready", 2.0)
    assert names(core) == []
    core.linked("prefill-0", 1, 2.1)
    assert names(core) == [("prefill-0", 1)]
    assert (core.version, core.all_up) == (1, False)


def test_death_leaves_the_membership_at_once_and_is_repaired_at_once() -> None:
    core = make()
    bring_up(core)
    assert core.was_ready
    core.gone("decode-0", 1, "killed by SIGKILL", 20.0)
    assert names(core) == [("prefill-0", 1)]
    assert core.decide(20.0) == [Start(name="decode-0", incarnation=2)]
    assert core.slots["decode-0"].restarts == 1


def test_a_lost_link_kills_first_and_starts_when_seen_gone() -> None:
    core = make()
    bring_up(core)
    core.lost("decode-0", 1, "link lost: silent", 5.0)
    assert names(core) == [("prefill-0", 1)]
    assert core.decide(5.0) == [Kill(name="decode-0", incarnation=1, reason="link lost: silent")]
    assert core.decide(6.0) == []
    core.gone("decode-0", 1, "killed by SIGKILL", 7.0)
    assert core.decide(7.0) == [Start(name="decode-0", incarnation=2)]
    assert core.slots["decode-0"].reason == "link lost: silent"


def test_words_of_a_former_life_change_nothing() -> None:
    core = make()
    bring_up(core)
    core.gone("decode-0", 1, "gone", 20.0)
    say(core, "decode-0", 1, "ready", 20.0)
    assert names(core) == [("prefill-0", 1)]
    core.decide(20.0)
    say(core, "decode-0", 1, "ready", 21.0)
    core.linked("decode-0", 1, 21.0)
    core.lost("decode-0", 1, "late", 21.0)
    core.gone("decode-0", 1, "late", 21.0)
    assert core.slots["decode-0"].phase == "starting"


def test_repeated_deaths_wait_longer_and_longer_up_to_a_bound() -> None:
    core = make()
    bring_up(core)
    now_s, delays = 0.0, []
    core.gone("decode-0", 1, "boom", now_s)
    for incarnation in range(2, 12):
        due_s = core.next_due_s()
        assert due_s is not None
        delays.append(due_s - now_s)
        now_s = due_s
        assert core.decide(now_s) == [Start(name="decode-0", incarnation=incarnation)]
        core.gone("decode-0", incarnation, "boom", now_s)
    assert delays[:4] == [0.0, FIRST_BACKOFF_S * 2, FIRST_BACKOFF_S * 4, FIRST_BACKOFF_S * 8]
    assert delays[-1] == MAX_BACKOFF_S


def test_a_long_good_life_forgets_earlier_deaths() -> None:
    core = make()
    bring_up(core)
    for incarnation in (1, 2, 3):
        core.gone("decode-0", incarnation, "boom", 100.0)
        core.decide(200.0)
    say(core, "decode-0", 4, "ready", 300.0)
    core.gone("decode-0", 4, "boom", 300.0 + STABLE_S)
    assert core.decide(300.0 + STABLE_S) == [Start(name="decode-0", incarnation=5)]


def test_a_bad_set_up_ends_the_first_start() -> None:
    core = make()
    core.decide(0.0)
    say(core, "decode-0", 1, "failed", 1.0, detail="no such model")
    core.gone("decode-0", 1, "ended with exit code 2", 1.0)
    assert core.decide(1.0) == [GiveUp(reason="decode-0: no such model")]


def test_a_bad_set_up_later_is_tried_again() -> None:
    core = make()
    bring_up(core)
    core.gone("decode-0", 1, "boom", 50.0)
    core.decide(50.0)
    say(core, "decode-0", 2, "failed", 51.0, detail="no such model")
    core.gone("decode-0", 2, "ended with exit code 2", 51.0)
    due_s = core.next_due_s()
    assert due_s is not None
    assert core.decide(due_s) == [Start(name="decode-0", incarnation=3)]


def fail(core: Reconciler, name: str, now_s: float) -> None:
    life = core.slots[name].life
    say(core, name, life, "failed", now_s, detail="out of memory")
    core.gone(name, life, "ended with exit code 2", now_s)


def test_who_has_been_ready_ends_no_deployment_by_failing() -> None:
    core = make()
    core.decide(0.0)
    say(core, "decode-0", 1, "ready", 1.0)
    fail(core, "decode-0", 2.0)
    assert not core.was_ready
    now_s, delays = 2.0, []
    for incarnation in range(2, 7):  # in a life that was ready, then in lives that are not
        due_s = core.next_due_s()
        assert due_s is not None
        delays.append(due_s - now_s)
        now_s = due_s
        assert core.decide(now_s) == [Start(name="decode-0", incarnation=incarnation)]
        fail(core, "decode-0", now_s)
    assert delays == [FIRST_BACKOFF_S * 2**number for number in range(5)]


def test_a_failure_after_a_long_good_life_is_tried_again_after_a_moment() -> None:
    core = make()
    bring_up(core)
    fail(core, "decode-0", 100.0)
    assert core.decide(100.0) == []
    assert core.next_due_s() == 100.0 + FIRST_BACKOFF_S
    assert core.decide(100.0 + FIRST_BACKOFF_S) == [Start(name="decode-0", incarnation=2)]


def test_that_one_had_been_ready_is_known_to_the_next_controller() -> None:
    core = make()
    core.decide(0.0)
    say(core, "decode-0", 1, "ready", 1.0)
    kept = ControllerState.from_json(ControllerState(slots=slots_of(core)).to_json())
    again = make()
    restore(again, kept)
    for name in ("prefill-0", "decode-0", "router-0"):
        again.adopt(name, 1, 2.0)
    fail(again, "prefill-0", 2.0)
    fail(again, "decode-0", 2.0)
    assert again.decide(2.0) == [GiveUp(reason="prefill-0: out of memory")]
    again.slots["prefill-0"].failures = 0
    assert GiveUp not in [type(action) for action in again.decide(50.0)]


def test_the_third_crash_ends_the_first_start() -> None:
    core, now_s = make(), 0.0
    for incarnation in (1, 2, 3):
        core.decide(now_s)
        core.gone("decode-0", incarnation, "ended with exit code 7", now_s)
        now_s += MAX_BACKOFF_S
    assert core.decide(now_s) == [GiveUp(reason="decode-0: ended with exit code 7")]


def test_who_is_not_ready_in_time_is_started_again() -> None:
    core = make(start_timeout_s=10.0)
    core.decide(0.0)
    assert core.next_due_s() == 10.0
    kills = core.decide(10.0)
    assert kills[0] == Kill(name="prefill-0", incarnation=1, reason="not ready within 10 s")


def test_who_is_not_ready_in_time_is_ended_with_what_it_said_last() -> None:
    core = make(start_timeout_s=10.0)
    core.decide(0.0)
    word = "1 of 2 ranks have loaded, waiting for rank 1"
    core.announced(
        Announcement(name="prefill-0", kind="prefill", incarnation=1, pid=1, state="loading", detail=word), 5.0
    )
    reasons = {kill.name: kill.reason for kill in core.decide(15.0) if isinstance(kill, Kill)}
    assert reasons["prefill-0"] == f"not ready within 10 s, its last word: {word}"


def test_the_time_of_a_start_does_not_run_while_it_waits_for_a_host() -> None:
    core = make(start_timeout_s=100.0)
    core.decide(0.0)
    for name in ("prefill-0", "decode-0", "router-0"):
        kind = name.partition("-")[0]
        core.announced(Announcement(name=name, kind=kind, incarnation=1, pid=0, detail="waits for room"), 1.0)
    assert core.decide(1000.0) == []
    assert core.next_due_s() is None
    say(core, "decode-0", 1, "starting", 1000.0)
    assert core.next_due_s() == 1100.0
    assert core.decide(1100.0) == [Kill(name="decode-0", incarnation=1, reason="not ready within 100 s")]


def test_the_next_controller_adopts() -> None:
    core = make()
    core.slots["decode-0"].incarnation = core.slots["decode-0"].life = 3
    for name, incarnation in (("prefill-0", 1), ("decode-0", 4), ("router-0", 1)):
        core.adopt(name, incarnation, 0.0)
    assert core.decide(0.0) == []
    say(core, "decode-0", 4, "ready", 0.0)
    core.linked("decode-0", 4, 0.0)
    assert names(core) == [("decode-0", 4)]


def test_draining_stays_a_member_that_says_so() -> None:
    core = make()
    bring_up(core)
    say(core, "decode-0", 1, "draining", 3.0)
    assert [(member.name, member.draining) for member in core.members] == [("prefill-0", False), ("decode-0", True)]
    assert not core.all_up


def test_a_phase_that_began_at_0_has_an_age_and_one_that_never_began_has_none() -> None:
    fresh = Slot(name="decode-1", kind="decode")
    assert (fresh.since_s, fresh.lasted_s(5.0)) == (None, 0.0)
    core = make()
    bring_up(core, 0.0)
    held, turning = core.slots["prefill-0"], core.slots["decode-0"]
    assert (held.since_s, held.lasted_s(5.0)) == (0.0, 5.0)
    held.held, held.asked_s, held.since_s = True, 0.0, 3.0
    ages = {member.name: (member.phase, member.age_s) for member in members_of([fresh, held, turning], 5.0)}
    assert ages == {"decode-1": ("starting", 0.0), "prefill-0": ("draining", 5.0), "decode-0": ("ready", 5.0)}


def test_repr_tells_the_counts() -> None:
    core = make()
    assert repr(core) == "<Reconciler [0 up of 3, version 0]>"
    bring_up(core)
    assert repr(core) == "<Reconciler [3 up of 3, version 2]>"
