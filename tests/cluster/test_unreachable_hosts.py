"""Hosts that could not be reached: who avoids them, for how long, and who gets another chance after that."""

from support.wanted import made, say, up

from biphase.cluster.actions import Abandon, Kill, Start
from biphase.cluster.controller_messages import avoided_line
from biphase.cluster.reconcile import MAX_BACKOFF_S, Reconciler
from biphase.cluster.unreachable_hosts import AVOID_S
from biphase.cluster.wanted_set import add
from biphase.protos.process import Announcement


def lose_host(core: Reconciler, name: str, now_s: float, *, unreached: bool = False) -> None:
    """Its next life has been started 2 s later."""
    slot = core.slots[name]
    core.lost(name, slot.incarnation, "link lost", now_s, unreached=unreached)
    core.decide(now_s)
    core.decide(now_s + 2.0)
    assert core.decide(now_s + 2.0) == [Start(name=name, incarnation=slot.incarnation)]


def wait_for_room(core: Reconciler, name: str, now_s: float) -> None:
    slot = core.slots[name]
    word = Announcement(name=name, kind=slot.kind, incarnation=slot.incarnation, pid=0, detail="waits for room")
    core.announced(word, now_s)


def test_a_host_that_could_not_be_reached_gets_nobody_for_a_while() -> None:
    core = made(kill_patience_s=2.0)
    lose_host(core, "decode-1", 10.0)
    assert core.slots["decode-1"].avoids == {"decode-1"}
    add(core, "decode", "", 20.0)
    assert core.decide(20.0) == [Start(name="decode-2", incarnation=1)]
    assert core.slots["decode-2"].avoids == {"decode-1"}
    up(core, "decode-1", 21.0, node="spare")
    assert core.slots["decode-1"].is_up
    up(core, "decode-2", 21.0, node="spare")
    assert core.next_due_s() == 12.0 + AVOID_S
    core.decide(12.0 + AVOID_S)
    assert not core.avoided and core.next_due_s() is None


def test_a_host_that_is_heard_again_is_avoided_no_more() -> None:
    for heard in ("announced", "linked", "reached"):
        core = made(kill_patience_s=2.0)
        up(core, "decode-0", 5.0, node="decode-1")
        lose_host(core, "decode-1", 10.0)
        assert core.avoided == {"decode-1"}
        match heard:
            case "announced":
                say(core, "router-0", "ready", 20.0, node="decode-1")
            case "linked":
                core.linked("decode-0", 1, 20.0)
            case _:
                core.reached("decode-1")
        assert not core.avoided, heard


def test_who_waits_for_room_is_placed_anew_when_the_avoidance_ends() -> None:
    core = made(kill_patience_s=2.0)
    lose_host(core, "decode-1", 10.0)
    wait_for_room(core, "decode-1", 13.0)
    assert core.decide(13.0) == []
    assert core.next_due_s() == 12.0 + AVOID_S
    failures = core.slots["decode-1"].failures
    kills = core.decide(12.0 + AVOID_S)
    assert [(type(kill), kill.name) for kill in kills] == [(Kill, "decode-1")]
    core.gone("decode-1", 2, "was never placed", 102.1)
    assert core.decide(102.1) == [Start(name="decode-1", incarnation=3)]
    assert core.slots["decode-1"].failures == failures
    assert core.slots["decode-1"].avoids == frozenset()
    wait_for_room(core, "decode-1", 103.0)
    assert core.decide(103.0) == [], "it is started where it may be now"


def test_who_waits_for_room_is_not_left_to_a_host_that_is_lost_meanwhile() -> None:
    core = made(kill_patience_s=2.0)
    add(core, "decode", "", 5.0)
    core.decide(5.0)
    wait_for_room(core, "decode-2", 6.0)
    core.lost("decode-1", 1, "link lost", 10.0)
    core.decide(10.0)
    actions = [*core.decide(12.0), *core.decide(12.0)]
    kill = Kill(name="decode-2", incarnation=1, reason="to be placed anew, it may go to other hosts now")
    assert kill in actions and Start(name="decode-1", incarnation=2) in actions


def test_a_start_without_room_is_tried_again_at_once_when_a_host_is_back() -> None:
    core = made(kill_patience_s=2.0)
    lose_host(core, "decode-1", 10.0)
    for incarnation in range(2, 9):
        core.no_room("decode-1", incarnation, "no room", 13.0 + incarnation)
        core.slots["decode-1"].not_before_s = 0.0
        core.decide(13.0 + incarnation)
    core.no_room("decode-1", 9, "no room", 23.0)
    assert core.decide(23.1) == []
    core.reached("decode-1")
    assert core.decide(23.1) == [Start(name="decode-1", incarnation=10)]


def test_what_an_earlier_controller_avoided_is_not_known_so_it_is_placed_anew_once() -> None:
    core = made(kill_patience_s=2.0)
    add(core, "decode", "", 5.0)
    core.slots["decode-2"].incarnation = core.slots["decode-2"].life = 4
    core.adopt("decode-2", 4, 5.0)
    assert core.decide(5.0) == []
    wait_for_room(core, "decode-2", 6.0)
    assert [type(action) for action in core.decide(6.0)] == [Kill]
    core.gone("decode-2", 4, "was never placed", 6.1)
    core.decide(6.1)
    wait_for_room(core, "decode-2", 7.0)
    assert core.decide(7.0) == []


def test_a_silent_host_is_avoided_even_where_its_end_is_told_in_time() -> None:
    core = made(kill_patience_s=2.0)
    core.lost("decode-1", 1, "link lost", 10.0, unreached=True)
    core.decide(10.0)
    core.gone("decode-1", 1, "killed", 10.5)
    assert core.avoided == {"decode-1"}
    assert core.unreachable.silent == {"decode-1": "decode-1:1"}
    assert core.decide(10.5) == [Start(name="decode-1", incarnation=2)]
    assert core.slots["decode-1"].avoids == {"decode-1"}


def test_where_every_host_can_be_reached_none_is_avoided() -> None:
    core = made()
    core.lost("decode-1", 1, "link lost", 10.0, unreached=True)
    core.decide(10.0)
    core.gone("decode-1", 1, "killed", 10.5)
    assert not core.avoided


def test_the_second_host_lost_in_a_row_is_replaced_as_soon_as_the_first() -> None:
    core = made(kill_patience_s=2.0)
    now_s = 10.0
    for host in ("b", "c", "d"):
        lose_host(core, "decode-1", now_s)
        up(core, "decode-1", now_s + 3.0, node=host)
        now_s += 4.0  # ready for a second only
    assert core.avoided == {"decode-1", "b", "c"}
    assert core.slots["decode-1"].failures == 0


def test_the_last_host_that_can_be_reached_is_never_cordoned() -> None:
    core = made(kill_patience_s=2.0)
    for name in core.slots:
        up(core, name, 1.0, node="one")
    core.node_failures.known = {"one", "two"}
    core.unreachable.avoid("two", 100.0)
    now_s = 100.0
    for _ in range(5):
        core.gone("decode-1", core.slots["decode-1"].life, "boom", now_s)
        now_s += MAX_BACKOFF_S
        core.decide(now_s)
        say(core, "decode-1", "loading", now_s, node="one")
        core.unreachable.avoid("two", now_s)
    assert core.node_failures.cordoned == {}
    core.unreachable.reached("two")
    core.gone("decode-1", core.slots["decode-1"].life, "boom", now_s)
    assert set(core.node_failures.cordoned) == {"one"}


def test_status_names_the_hosts_that_it_may_not_wait_for() -> None:
    line = avoided_line({"b", "a"}, {"a": "by hand"})
    assert line == "a (cordoned), b (could not be reached)"


def test_an_instance_that_is_removed_meanwhile_leaves_the_warning_behind() -> None:
    core = made(kill_patience_s=2.0)
    core.slots["decode-1"].ending = "remove"
    core.lost("decode-1", 1, "link lost", 10.0)
    core.decide(10.0)
    assert core.decide(12.0) == [Abandon(name="decode-1", incarnation=1, node="decode-1")]
    assert "decode-1" not in core.slots and core.avoided == {"decode-1"}
