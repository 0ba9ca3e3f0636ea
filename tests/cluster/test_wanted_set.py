"""Changes of the wanted set, and what they lead to, under a clock that the test turns."""

import pytest
from support.wanted import idle, made, say, up

from biphase.cluster import wanted_set
from biphase.cluster.actions import Abandon, AskToStop, Kill, Start, TellDrain, TellFlip, TellResume
from biphase.cluster.controller_state import ControllerState, restore, slots_of
from biphase.cluster.planner_view import members_of
from biphase.cluster.reconcile import LAST_WORDS_S, STABLE_S, STOP_S, Reconciler
from biphase.cluster.slot import FlipTo, Wanted, Work
from biphase.cluster.start_failures import MAX_FAILED_STARTS
from biphase.protos.errors import InvalidRequest
from biphase.protos.values import Mode


def test_a_new_instance_has_the_first_free_number_and_starts() -> None:
    core = made()
    assert wanted_set.add(core, "decode", "g", 5.0) == "decode-2"
    (young,) = [member for member in members_of(core.slots.values(), 6.0) if member.name == "decode-2"]
    assert (young.phase, young.age_s) == ("starting", 1.0), (
        "the policy must not give it up for an age that it does not have"
    )
    assert core.decide(5.0) == [Start(name="decode-2", incarnation=1)]
    assert core.counts() == {"prefill": 1, "decode": 3}


def test_a_stop_drains_then_asks_then_forgets() -> None:
    core = made()
    wanted_set.stop(core, "decode-1", 30.0, 10.0)
    assert [member.draining for member in core.members] == [False, False, True], "routers know it at once"
    assert core.decide(10.0) == [TellDrain(name="decode-1", incarnation=1, grace_s=30.0)]
    core.worked("decode-1", 1, Work(draining=True, running=1))
    assert core.decide(11.0) == []
    idle(core, "decode-1")
    assert core.decide(12.0) == [AskToStop(name="decode-1", incarnation=1)]
    core.gone("decode-1", 1, "ended", 13.0)
    assert "decode-1" not in core.slots
    assert core.decide(13.0) == []
    assert core.counts() == {"prefill": 1, "decode": 1}


def test_what_does_not_drain_has_its_last_words_after_the_grace_then_is_asked_and_killed_later() -> None:
    core = made()
    wanted_set.stop(core, "decode-1", 30.0, 10.0)
    core.decide(10.0)
    core.worked("decode-1", 1, Work(draining=True, running=1))
    asked_s = 40.0 + LAST_WORDS_S
    assert core.next_due_s() == asked_s
    assert core.decide(asked_s - 0.01) == [], "the routers hear of what is left before it is told to end"
    assert core.decide(asked_s) == [AskToStop(name="decode-1", incarnation=1)]
    assert core.next_due_s() == asked_s + STOP_S
    kills = core.decide(asked_s + STOP_S)
    assert [type(action) for action in kills] == [Kill]


def test_what_is_drained_by_its_last_words_is_asked_to_stop_at_once() -> None:
    core = made()
    wanted_set.stop(core, "decode-1", 30.0, 10.0)
    core.decide(10.0)
    core.worked("decode-1", 1, Work(draining=True, legs=1))
    assert core.decide(40.1) == [], "a prompt that waits to be pulled neither queues nor runs"
    idle(core, "decode-1")
    assert core.decide(40.2) == [AskToStop(name="decode-1", incarnation=1)]


def test_a_name_that_comes_back_uses_no_incarnation_twice() -> None:
    core = made()
    wanted_set.stop(core, "decode-1", 30.0, 10.0)
    core.decide(10.0)
    core.gone("decode-1", 1, "ended", 11.0)
    assert wanted_set.add(core, "decode", "g", 12.0) == "decode-1"
    assert core.decide(12.0) == [Start(name="decode-1", incarnation=2)]


def test_a_flip_keeps_the_name_and_takes_a_new_incarnation() -> None:
    core = made()
    wanted_set.flip(core, "decode-1", "prefill", 5.0, 10.0)
    assert core.counts() == {"prefill": 2, "decode": 1}
    told = core.decide(10.0)
    assert told == [TellFlip(name="decode-1", incarnation=1, to=FlipTo(kind="prefill", incarnation=2), grace_s=5.0)]
    core.unlinked("decode-1", 1, 11.0)
    assert "decode-1" not in [member.name for member in core.members]
    core.linked("decode-1", 2, 11.2)
    say(core, "decode-1", "ready", 11.2, incarnation=2)
    member = next(member for member in core.members if member.name == "decode-1")
    assert (member.kind, member.incarnation, member.draining) == ("prefill", 2, False)
    assert core.all_up
    core.gone("decode-1", 1, "killed by SIGKILL", 50.0)
    assert core.decide(50.0) == [Start(name="decode-1", incarnation=3)]
    assert core.slots["decode-1"].kind == "prefill", "the next life has the role it had"


def test_a_flip_that_does_not_come_about_is_a_new_life_in_the_new_role() -> None:
    core = made()
    wanted_set.flip(core, "decode-1", "prefill", 5.0, 10.0)
    core.decide(10.0)
    assert core.next_due_s() == 15.0 + STOP_S
    assert [type(action) for action in core.decide(15.0 + STOP_S)] == [Kill]
    core.gone("decode-1", 1, "killed by SIGKILL", 26.0)
    assert core.decide(26.0) == [Start(name="decode-1", incarnation=3)]
    assert core.slots["decode-1"].kind == "prefill"


def test_a_drain_by_hand_stays_and_is_taken_back() -> None:
    core = made()
    wanted_set.hold(core, "decode-1", 30.0, 10.0)
    assert core.decide(10.0) == [TellDrain(name="decode-1", incarnation=1, grace_s=30.0)]
    say(core, "decode-1", "draining", 10.1)
    idle(core, "decode-1")
    assert core.decide(100.0) == []
    assert core.all_up, "people wanted it so"
    wanted_set.resume(core, "decode-1", 101.0)
    assert core.decide(101.0) == [TellResume(name="decode-1", incarnation=1)]
    say(core, "decode-1", "ready", 101.1)
    assert not core.members[-1].draining


def test_the_end_of_a_drain_is_told_until_it_is_obeyed() -> None:
    """The word may be lost with its link, or with the controller's life."""
    core = made()
    wanted_set.hold(core, "decode-1", 30.0, 10.0)
    core.decide(10.0)
    say(core, "decode-1", "draining", 10.1)
    wanted_set.resume(core, "decode-1", 20.0)
    told = [TellResume(name="decode-1", incarnation=1)]
    assert core.decide(20.0) == told
    assert core.decide(21.0) == []
    core.linked("decode-1", 1, 22.0)
    assert core.decide(22.0) == told
    text = ControllerState(epoch=1, slots=slots_of(core), was_ready=True).to_json()
    again = Reconciler([], 100.0)
    restore(again, ControllerState.from_json(text))
    for name in again.slots:
        again.adopt(name, 1, 30.0)
        say(again, name, "draining" if name == "decode-1" else "ready", 30.0)
        again.linked(name, 1, 30.0)
    assert again.decide(30.0) == told
    say(again, "decode-1", "ready", 31.0)
    again.linked("decode-1", 1, 32.0)
    assert again.decide(32.0) == []
    assert again.all_up


def test_a_link_that_comes_again_is_told_again_with_the_grace_that_is_left() -> None:
    core = made()
    wanted_set.hold(core, "decode-1", 30.0, 10.0)
    core.decide(10.0)
    core.linked("decode-1", 1, 20.0)
    assert core.decide(20.0) == [TellDrain(name="decode-1", incarnation=1, grace_s=20.0)]


def test_what_is_under_way_goes_on_in_the_next_life_of_the_controller() -> None:
    core = made(2, 2)
    wanted_set.stop(core, "prefill-1", 30.0, 10.0)
    wanted_set.hold(core, "decode-0", 30.0, 10.0)
    wanted_set.flip(core, "decode-1", "prefill", 30.0, 10.0)
    core.former["decode-9"] = 4
    core.decide(10.0)
    text = ControllerState(epoch=1, slots=slots_of(core), former=core.former, was_ready=True).to_json()
    again = Reconciler([Wanted(name="prefill-0", kind="prefill")], 100.0)
    restore(again, ControllerState.from_json(text))
    for name in again.slots:
        again.adopt(name, 1, 20.0)
    assert again.decide(20.0) == [], "nothing is reverted, nothing is killed for being new to us"
    for name in again.slots:
        up(again, name, 20.0)
    assert again.decide(20.0) == [
        TellDrain(name="prefill-1", incarnation=1, grace_s=20.0),
        TellDrain(name="decode-0", incarnation=1, grace_s=20.0),
        TellFlip(name="decode-1", incarnation=1, to=FlipTo(kind="prefill", incarnation=2), grace_s=20.0),
    ]
    assert again.counts() == {"prefill": 2, "decode": 1}
    assert again.former == {"decode-9": 4}


def test_a_new_start_is_taken_back_until_it_was_asked_to_end() -> None:
    core = made()
    core.slots["decode-1"].generation = "old"
    wanted_set.renew(core, "decode-1", 30.0, 10.0, generation="new", role=None)
    assert core.decide(10.0) == [TellDrain(name="decode-1", incarnation=1, grace_s=30.0)]
    core.worked("decode-1", 1, Work(draining=True, running=1))
    assert wanted_set.take_back(core, "decode-1", 11.0)
    assert core.decide(11.0) == [TellResume(name="decode-1", incarnation=1)]
    assert core.slots["decode-1"].serves
    core.gone("decode-1", 1, "gone", 12.0)
    core.decide(12.0)
    assert core.slots["decode-1"].generation == "old", "its next life is not that of the update"
    up(core, "decode-1", 13.0)

    wanted_set.renew(core, "decode-1", 30.0, 20.0, generation="new", role=None)
    core.decide(20.0)
    idle(core, "decode-1")
    assert core.decide(21.0) == [AskToStop(name="decode-1", incarnation=2)]
    assert not wanted_set.take_back(core, "decode-1", 22.0)
    assert not wanted_set.take_back(core, "decode-0", 22.0), "it is not draining"


def test_a_new_start_that_is_taken_back_leaves_a_drain_by_hand() -> None:
    core = made()
    wanted_set.hold(core, "decode-1", 30.0, 10.0)
    wanted_set.renew(core, "decode-1", 30.0, 11.0, generation="new", role=None)
    assert wanted_set.take_back(core, "decode-1", 12.0)
    assert (core.slots["decode-1"].held, core.slots["decode-1"].ending) == (True, "")


def test_who_has_no_life_takes_another_generation_at_once() -> None:
    core = made()
    core.gone("decode-1", 1, "boom", 5.0)
    core.decide(5.0)
    core.no_room("decode-1", 2, "no room", 6.0)
    wanted_set.renew(core, "decode-1", 30.0, 7.0, generation="new", role="prefill")
    assert core.decide(7.0) == [Start(name="decode-1", incarnation=3)]
    assert (core.slots["decode-1"].generation, core.slots["decode-1"].kind) == ("new", "prefill")


def test_who_was_flipped_is_adopted_by_the_life_it_was_started_as() -> None:
    core = made()
    wanted_set.flip(core, "decode-1", "prefill", 5.0, 10.0)
    core.decide(10.0)
    core.linked("decode-1", 2, 11.0)
    again = Reconciler([], 100.0)
    restore(again, ControllerState.from_json(ControllerState(slots=slots_of(core)).to_json()))
    again.adopt("decode-1", 1, 20.0)
    up(again, "decode-1", 20.0)
    assert [(member.name, member.kind, member.incarnation) for member in again.members] == [("decode-1", "prefill", 2)]


def test_a_host_that_cannot_be_reached_does_not_hold_up_the_next_life() -> None:
    core = made(kill_patience_s=2.0)
    core.lost("decode-1", 1, "link lost", 10.0)
    assert core.decide(10.0) == [Kill(name="decode-1", incarnation=1, reason="link lost")]
    assert core.next_due_s() == 12.0
    assert core.decide(12.0) == [Abandon(name="decode-1", incarnation=1, node="decode-1")]
    assert core.next_due_s() == 12.0, "at once, no matter how often it was lost before"
    assert core.decide(12.0) == [Start(name="decode-1", incarnation=2)]
    assert core.slots["decode-1"].avoids == {"decode-1"}
    core.gone("decode-1", 1, "gone at last", 80.0)
    assert core.slots["decode-1"].phase == "starting", "the end of the old life is nothing to the new one"


def test_a_host_where_starts_fail_is_cordoned_and_named() -> None:
    core = made()
    now_s = 100.0
    for _ in range(MAX_FAILED_STARTS):
        core.gone("decode-1", core.slots["decode-1"].life, "boom", now_s)
        now_s += 100.0
        core.decide(now_s)
        say(core, "decode-1", "loading", now_s, node="bad")
    core.gone("decode-1", core.slots["decode-1"].life, "boom", now_s)
    assert "3 starts failed" in core.node_failures.cordoned["bad"]
    assert next(note for note in core.notes if note[0] == "node")[1] == "bad"


def die_on(core: Reconciler, name: str, node: str, now_s: float, *, ready_s: float) -> None:
    """Its next life starts on ``node``, is ready for so long and dies by itself; it began some time before ``now_s``."""
    core.slots[name].not_before_s = 0.0
    core.decide(now_s - ready_s)
    up(core, name, now_s - ready_s, node=node)
    core.gone(name, core.slots[name].life, "boom", now_s)


def dead(*names: str) -> Reconciler:
    """All are up, but for these, which had been ready for long."""
    core = made(1, 3)
    for name in names:
        core.gone(name, 1, "boom", 100.0)
    core.notes.clear()
    return core


def test_a_host_where_several_instances_die_soon_after_they_are_ready_is_cordoned_and_named() -> None:
    core = dead("decode-0", "decode-1")
    die_on(core, "decode-0", "bad", 110.0, ready_s=2.0)
    die_on(core, "decode-1", "bad", 120.0, ready_s=2.0)
    die_on(core, "decode-0", "bad", 130.0, ready_s=2.0)
    assert core.node_failures.cordoned == {}, "the other one has died once"
    die_on(core, "decode-1", "bad", 140.0, ready_s=STABLE_S - 0.1)
    assert core.node_failures.cordoned == {"bad": "4 starts failed there in a row, 4 of them soon after being ready"}
    assert [note[1:] for note in core.notes if note[0] == "node"] == [
        ("bad", f"bad is cordoned: {core.node_failures.cordoned['bad']}; `biphase cordon bad --undo` takes it back")
    ]


def test_deaths_soon_after_ready_count_with_starts_that_failed() -> None:
    core = dead("decode-0")
    for now_s in (110.0, 120.0):
        core.slots["decode-0"].not_before_s = 0.0
        core.decide(now_s)
        say(core, "decode-0", "loading", now_s, node="bad")
        core.gone("decode-0", core.slots["decode-0"].life, "boom", now_s)
    die_on(core, "decode-0", "bad", 130.0, ready_s=2.0)
    assert core.node_failures.cordoned == {"bad": "3 starts failed there in a row, 1 of them soon after being ready"}


def test_an_instance_in_a_crash_loop_alone_cordons_no_host() -> None:
    core = dead("decode-0", "decode-1")
    for count in range(20):
        die_on(core, "decode-0", "bad", 110.0 + 5 * count, ready_s=2.0)
    die_on(core, "decode-1", "bad", 210.0, ready_s=2.0)
    assert core.node_failures.cordoned == {}


@pytest.mark.parametrize("steady", ["decode-0", "decode-1", "decode-2", ""])
def test_a_host_where_an_instance_has_been_ready_for_long_is_forgiven(steady: str) -> None:
    core = dead("decode-0", "decode-1", "decode-2")
    if steady == "decode-2":  # another one, which lives on
        core.decide(112.0)
        up(core, "decode-2", 112.0, node="bad")
    die_on(core, "decode-0", "bad", 110.0, ready_s=2.0)
    die_on(core, "decode-1", "bad", 112.0, ready_s=2.0)
    if steady in ("decode-0", "decode-1"):  # one of them, which dies later
        die_on(core, steady, "bad", 130.0, ready_s=STABLE_S)
    die_on(core, "decode-0", "bad", 135.0, ready_s=2.0)
    die_on(core, "decode-1", "bad", 140.0, ready_s=2.0)
    assert set(core.node_failures.cordoned) == (set() if steady else {"bad"})
    die_on(core, "decode-0", "bad", 145.0, ready_s=2.0)
    assert set(core.node_failures.cordoned) == (set() if steady else {"bad"}), (
        "the end of who ran for long is no failure"
    )
    die_on(core, "decode-1", "bad", 150.0, ready_s=2.0)
    assert set(core.node_failures.cordoned) == {"bad"}, "forgiven once, not for what comes after"


def test_who_has_turned_since_had_been_ready_for_long_all_the_same() -> None:
    core = dead("decode-0", "decode-1", "decode-2")
    core.decide(110.0)
    up(core, "decode-2", 110.0, node="bad")
    die_on(core, "decode-0", "bad", 115.0, ready_s=2.0)
    die_on(core, "decode-1", "bad", 117.0, ready_s=2.0)
    wanted_set.flip(core, "decode-2", "prefill", 30.0, 121.0)
    core.linked("decode-2", 3, 121.0)
    die_on(core, "decode-0", "bad", 125.0, ready_s=2.0)
    die_on(core, "decode-1", "bad", 127.0, ready_s=2.0)
    assert core.slots["decode-2"].kind == "prefill" and core.node_failures.cordoned == {}


HOW = ["asked", "drained", "killed", "flips", "turned", "host lost", "adopted", "link lost", "by itself"]


@pytest.mark.parametrize("how", HOW)
def test_an_end_that_is_no_fault_of_the_host_does_not_count(how: str) -> None:
    core = dead()
    core.kill_patience_s = 2.0
    now_s = 0.0
    for name in ("decode-0", "decode-1", "decode-0", "decode-1"):
        now_s += 200.0
        core.gone(name, core.slots[name].life, "boom", now_s)  # elsewhere
        core.slots[name].not_before_s = 0.0
        core.decide(now_s)
        up(core, name, now_s, node="bad")
        slot, now_s = core.slots[name], now_s + 1.0
        match how:
            case "asked":
                wanted_set.renew(core, name, 30.0, now_s, generation="", role=None)
            case "drained":
                wanted_set.hold(core, name, 30.0, now_s)
            case "flips":
                wanted_set.flip(core, name, "prefill", 30.0, now_s)
            case "turned":
                wanted_set.flip(core, name, "prefill", 30.0, now_s)
                assert slot.flip is not None
                core.linked(name, slot.flip.incarnation, now_s)
            case "killed":
                core.lost(name, slot.incarnation, "it had stopped with work aboard", now_s)
                core.decide(now_s)
            case "adopted":
                core.adopt(name, slot.life, now_s)
                up(core, name, now_s, node="bad")
            case "link lost":
                core.lost(name, slot.incarnation, "link lost", now_s, by_itself=True)
                core.decide(now_s)
            case "host lost":
                core.lost(name, slot.incarnation, "link lost", now_s, by_itself=True, unreached=True)
                core.decide(now_s)
                core.decide(now_s + 2.0)
        core.gone(name, slot.life, "boom", now_s + 2.5)
        slot.kind, slot.held = "decode", False
        up(core, name, now_s + 2.5, node="good")
    assert set(core.node_failures.cordoned) == ({"bad"} if how in ("link lost", "by itself") else set())


def test_the_last_host_is_never_cordoned() -> None:
    core = Reconciler([Wanted(name="decode-0", kind="decode")], 100.0)
    core.was_ready = True
    for round_number in range(2 * MAX_FAILED_STARTS):
        core.decide(round_number * 100.0)
        say(core, "decode-0", "loading", round_number * 100.0, node="only")
        core.gone("decode-0", core.slots["decode-0"].life, "boom", round_number * 100.0)
    assert core.node_failures.cordoned == {}


def test_victims_have_least_work_left_then_the_emptiest_host() -> None:
    core = made(1, 4)
    core.worked("decode-0", 1, Work(running=2, running_tokens=100))
    core.worked("decode-1", 1, Work(running=1, running_tokens=10))
    core.slots["decode-2"].node = core.slots["decode-0"].node
    for name in ("decode-2", "decode-3"):
        core.worked(name, 1, Work())
    assert [slot.name for slot in wanted_set.victims(core, "decode")] == [
        "decode-3",
        "decode-2",
        "decode-1",
        "decode-0",
    ]
    wanted_set.add(core, "decode", "", 5.0)
    assert wanted_set.victims(core, "decode")[0].name == "decode-4", "what is not up yet goes first"


def test_a_scale_turns_before_it_stops_or_starts() -> None:
    core = made(1, 2)
    plan = wanted_set.plan_scale(core, {"prefill": 2, "decode": 1}, mode="auto", can_flip=True)
    assert str(plan) == "decode-1 turns to prefill"
    plan = wanted_set.plan_scale(core, {"prefill": 2, "decode": 1}, mode="auto", can_flip=False)
    assert str(plan) == "decode-1 drains and stops, a new prefill instance starts"
    assert str(wanted_set.plan_scale(core, {"decode": 2}, mode="auto", can_flip=True)) == "nothing changes"


@pytest.mark.parametrize(
    ("wanted", "reason"),
    [
        ({"decode": 0}, "decode is 0: at least 1"),
        ({"prefill": 0}, "prefill is 0 with mode strict"),
        ({"prefill": 257}, "prefill is 257: the most is 256"),
    ],
)
def test_counts_that_cannot_serve_are_refused(wanted: dict[str, int], reason: str) -> None:
    core = made()
    with pytest.raises(InvalidRequest, match=reason):
        wanted_set.plan_scale(core, wanted, mode="strict", can_flip=True)  # type: ignore[arg-type]


def test_unknown_and_busy_instances_are_refused_with_the_nearest_name() -> None:
    core = made()
    with pytest.raises(InvalidRequest, match="did you mean decode-1"):
        wanted_set.instance(core, "decod-1")
    with pytest.raises(InvalidRequest, match="router-0 is a router"):
        wanted_set.instance(core, "router-0")
    wanted_set.hold(core, "decode-1", 30.0, 10.0)
    with pytest.raises(InvalidRequest, match="already draining"):
        wanted_set.check_is_free(core.slots["decode-1"])


def test_what_leaves_no_way_to_serve_is_refused() -> None:
    core = made(1, 1)
    with pytest.raises(InvalidRequest, match="a drain of decode-0 is refused: no decode instance"):
        wanted_set.check_others_serve(core, "auto", ["decode-0"], "a drain of decode-0")
    wanted_set.check_others_serve(core, "auto", ["prefill-0"], "a drain of prefill-0")
    with pytest.raises(InvalidRequest, match="mode is strict"):
        wanted_set.check_others_serve(core, "strict", ["prefill-0"], "a drain of prefill-0")


def away(core: Reconciler, name: str) -> None:
    """It has died, and comes back."""
    core.gone(name, core.slots[name].life, "boom", 5.0)


@pytest.mark.parametrize(
    ("mode", "gone", "leaves", "reason"),
    [
        ("strict", "prefill-0", "decode-0", "no decode instance that serves would be left"),
        ("strict", "decode-0", "prefill-0", "no prefill instance that serves would be left, and mode is strict"),
        ("auto", "decode-0", "decode-0", "no decode instance that serves would be left"),
        ("auto", "decode-0", "prefill-0", None),
        ("auto", "prefill-0", "decode-0", "no decode instance that serves would be left"),
    ],
)
def test_the_last_way_to_serve_stays_while_the_others_are_just_away(
    mode: Mode, gone: str, leaves: str, reason: str | None
) -> None:
    core = made(1, 1)
    away(core, gone)
    if reason is None:
        wanted_set.check_others_serve(core, mode, [leaves], "this")
        return
    with pytest.raises(InvalidRequest) as refused:
        wanted_set.check_others_serve(core, mode, [leaves], "this")
    assert str(refused.value) == f"this is refused: {reason}"


def test_who_comes_back_in_another_role_and_who_starts_in_its_place_count() -> None:
    core = made(2, 1)
    for name in ("prefill-0", "prefill-1"):
        away(core, name)  # nobody serves now
    wanted_set.check_others_serve(core, "strict", ["prefill-0"], "a flip", then={"prefill-0": "decode"})
    with pytest.raises(InvalidRequest, match="a flip is refused: no decode"):
        wanted_set.check_others_serve(core, "strict", ["decode-0"], "a flip", then={"decode-0": "prefill"})
    with pytest.raises(InvalidRequest, match="no decode"):
        wanted_set.check_others_serve(core, "strict", ["decode-0"], "a drain")
    wanted_set.check_others_serve(core, "strict", ["decode-0"], "a drain", new=[("decode", "")])
    with pytest.raises(InvalidRequest, match="of the same generation"):
        wanted_set.check_others_serve(core, "strict", ["decode-0"], "a drain", new=[("decode", "new")])
    wanted_set.hold(core, "prefill-0", 5.0, 6.0)
    with pytest.raises(InvalidRequest, match="no prefill"):  # who is drained by hand is not just away
        wanted_set.check_others_serve(core, "strict", ["prefill-1"], "a drain")


def test_where_nothing_is_taken_away_nothing_is_refused() -> None:
    core = made(1, 1)
    wanted_set.hold(core, "prefill-0", 5.0, 1.0)
    wanted_set.check_others_serve(core, "strict", ["decode-0"], "a drain")


def test_instances_of_two_generations_are_no_way_to_serve_in_strict() -> None:
    core = made(2, 1)
    core.slots["prefill-1"].generation = "new"
    wanted_set.check_others_serve(core, "strict", ["prefill-1"], "a drain")
    wanted_set.check_others_serve(core, "auto", ["prefill-0"], "a drain")
    with pytest.raises(InvalidRequest, match=r"no prefill and decode instance of the same generation would be left"):
        wanted_set.check_others_serve(core, "strict", ["prefill-0"], "a drain")
    core.slots["prefill-0"].ending, core.slots["prefill-0"].next_generation = "again", "new"
    wanted_set.check_others_serve(core, "strict", ["prefill-0"], "a drain")  # it leaves this one anyway
