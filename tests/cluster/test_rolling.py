"""Updates instance by instance, and who turns when a role is gone: under a clock that the test turns."""

from dataclasses import replace

import pytest
from support.wanted import made, up

from biphase.cluster import rolling, wanted_set
from biphase.cluster.actions import Start
from biphase.cluster.reach import CUT_OFF
from biphase.cluster.reconcile import Reconciler
from biphase.cluster.rescue import PATIENCE_S, Rescue, rescue
from biphase.protos.process import Announcement
from biphase.protos.values import Mode

NEW = rolling.RollingUpdate(generation="new", previous="old", grace_s=5.0)


def old(prefill: int, decode: int) -> Reconciler:
    core = made(prefill, decode)
    for slot in core.slots.values():
        slot.generation = "old"
    return core


def planned(core: Reconciler, mode: Mode) -> list[str]:
    """What ``plan_of`` says, in the words of ``carry_out``."""
    words = []
    for step in rolling.plan_of(core, NEW, mode, can_flip=True):
        swaps = isinstance(step, rolling.Renew) and step.role != core.slots[step.name].kind
        ends = " turns" if isinstance(step, rolling.TurnFirst) else f" as {step.role}" if swaps else ""
        words.append(step.name + ends)
    return words


def carry_out(core: Reconciler, mode: Mode, update: rolling.RollingUpdate = NEW) -> list[str]:
    """All steps of an update under which everything works, in words; checks at each that somebody serves."""
    words, now_s = [], 100.0
    for _ in range(50):
        step = rolling.next_step(core, update, mode, can_flip=True, now_s=now_s)
        now_s += 1.0
        match step:
            case rolling.Finished():
                return words
            case rolling.Renew(name=name, role=role):
                words.append(f"{name} as {role}" if role else name)
                turned = "" if role else update.turned
                update = replace(update, current=name, turned=turned)
                wanted_set.renew(core, name, 5.0, now_s, generation=update.generation, role=role)
                core.decide(now_s)
                core.decide(now_s + 0.1)
                core.gone(name, core.slots[name].life, "ended", now_s + 0.2)
                serving = [
                    (slot.kind, slot.generation) for slot in core.slots.values() if slot.is_instance and slot.serves
                ]
                assert any(kind == "decode" for kind, _ in serving), "somebody serves at every moment"
                assert Start(name=name, incarnation=core.slots[name].incarnation + 1) in core.decide(now_s + 0.3)
                waits = rolling.Wait(reason=f"{name} is starting")
                assert rolling.next_step(core, update, mode, can_flip=True, now_s=now_s) == waits
                up(core, name, now_s + 0.4)
            case rolling.TurnFirst(name=name):
                words.append(f"{name} turns")
                update = replace(update, turned=name)
                wanted_set.flip(core, name, "decode", 5.0, now_s)
                core.decide(now_s)
                core.linked(name, core.slots[name].incarnation + 1, now_s + 0.1)
                up(core, name, now_s + 0.2)
            case rolling.Renewed():
                update = replace(update, current="")
            case rolling.Wait(reason=reason):
                raise AssertionError(reason)
    raise AssertionError(words)


def end_renewed(core: Reconciler) -> None:
    """prefill-0 has ended at 101, to start anew in the new generation."""
    wanted_set.renew(core, "prefill-0", 5.0, 100.0, generation="new", role=None)
    core.decide(100.0)
    core.gone("prefill-0", 1, "ended", 101.0)


def test_prefill_and_decode_are_renewed_in_turns() -> None:
    core = old(2, 2)
    assert planned(core, "strict") == ["prefill-0", "decode-0", "prefill-1", "decode-1"]
    assert carry_out(core, "strict") == ["prefill-0", "decode-0", "prefill-1", "decode-1"]
    assert {slot.generation for slot in core.slots.values() if slot.is_instance} == {"new"}


def test_with_one_of_each_the_other_serves_meanwhile() -> None:
    core = old(1, 1)
    assert rolling.reason_against_update(core, "auto", can_flip=True) is None
    assert planned(core, "auto") == ["prefill-0", "prefill-0 turns", "decode-0 as prefill"]
    assert core.slots["prefill-0"].generation == "old", "a plan changes nothing"
    assert carry_out(core, "auto") == ["prefill-0", "prefill-0 turns", "decode-0 as prefill"]
    assert core.counts() == {"prefill": 1, "decode": 1}
    assert (core.slots["prefill-0"].kind, core.slots["decode-0"].kind) == ("decode", "prefill")


@pytest.mark.parametrize(
    ("prefill", "decode", "mode", "reason"),
    [
        (1, 1, "strict", "mode is strict with 1 prefill instance"),
        (2, 1, "strict", "mode is strict with 1 decode instance"),
        (0, 1, "auto", "1 decode instance and no prefill instance"),
    ],
)
def test_where_nobody_would_serve_it_is_refused(prefill: int, decode: int, mode: Mode, reason: str) -> None:
    found = rolling.reason_against_update(old(prefill, decode), mode, can_flip=True)
    assert found is not None and reason in found


def test_the_first_new_one_that_fails_pauses_it() -> None:
    core = old(2, 2)
    end_renewed(core)
    assert core.slots["prefill-0"].generation == "new"
    core.decide(101.0)
    core.gone("prefill-0", 2, "no such model", 102.0)
    update = replace(NEW, current="prefill-0")
    assert rolling.next_step(core, update, "auto", can_flip=True, now_s=102.0) == rolling.Failed(
        name="prefill-0", reason="no such model"
    )


def test_one_that_finds_no_room_in_time_has_failed() -> None:
    core = old(2, 2)
    update = replace(NEW, current="prefill-0")
    end_renewed(core)
    core.decide(101.0)
    waits = Announcement(name="prefill-0", kind="prefill", incarnation=2, pid=0, detail="waits for room on a node")
    core.announced(waits, 102.0)
    until_s = 101.0 + core.start_timeout_s
    step = rolling.next_step(core, update, "auto", can_flip=True, now_s=until_s - 1.0)
    assert step == rolling.Wait(reason="prefill-0 is starting", until_s=until_s)
    assert rolling.next_step(core, update, "auto", can_flip=True, now_s=until_s) == rolling.Failed(
        name="prefill-0", reason="no room within 100 s: waits for room on a node"
    )


def test_no_limit_runs_out_while_this_host_is_cut_off() -> None:
    core = old(2, 2)
    update = replace(NEW, current="prefill-0")
    end_renewed(core)
    core.decide(101.0)
    core.announced(Announcement(name="prefill-0", kind="prefill", incarnation=2, pid=0), 102.0)
    core.looked({"a": False, "b": False}, 110.0)
    later_s = 101.0 + core.start_timeout_s + 50.0
    assert rolling.next_step(core, update, "auto", can_flip=True, now_s=later_s) == rolling.Wait(reason=CUT_OFF)
    core.looked({"a": True, "b": False}, later_s)
    step = rolling.next_step(core, update, "auto", can_flip=True, now_s=later_s)
    assert step == rolling.Wait(reason="prefill-0 is starting", until_s=later_s + core.start_timeout_s - 9.0)


def test_who_was_not_tried_in_the_new_generation_has_not_failed_in_it() -> None:
    core = made(2, 2, kill_patience_s=2.0)
    for slot in core.slots.values():
        slot.generation = "old"
    core.slots["decode-0"].failures = 1
    update = replace(NEW, current="decode-0")
    wanted_set.renew(core, "decode-0", 60.0, 100.0, generation="new", role=None)
    core.decide(100.0)
    core.lost("decode-0", 1, "link lost", 101.0, unreached=True)
    core.decide(101.0)
    core.decide(103.0)  # its place is given away
    assert (core.slots["decode-0"].phase, core.slots["decode-0"].generation) == ("waiting", "new")
    step = rolling.next_step(core, update, "auto", can_flip=True, now_s=103.0)
    assert step == rolling.Wait(reason="decode-0 is waiting")
    assert Start(name="decode-0", incarnation=2) in core.decide(103.0)


def test_roles_that_were_turned_by_hand_stay() -> None:
    core = old(1, 1)
    wanted_set.flip(core, "prefill-0", "decode", 5.0, 1.0)
    core.decide(1.0)
    core.linked("prefill-0", 2, 1.1)
    up(core, "prefill-0", 1.2)
    assert sorted(carry_out(core, "auto")) == ["decode-0", "prefill-0"]
    assert core.counts() == {"prefill": 0, "decode": 2}


def test_the_ratio_stays_where_one_of_several_turned_for_the_last_decode_instance() -> None:
    core = old(2, 1)
    assert planned(core, "auto") == ["prefill-0", "prefill-1", "prefill-0 turns", "decode-0 as prefill"]
    carry_out(core, "auto")
    assert core.counts() == {"prefill": 2, "decode": 1}


def test_who_was_drained_by_hand_is_renewed_and_stays_drained() -> None:
    core = old(2, 2)
    wanted_set.hold(core, "decode-1", 5.0, 50.0)
    assert "decode-1" in carry_out(core, "auto")
    assert core.slots["decode-1"].held
    assert core.slots["decode-1"].generation == "new"


@pytest.mark.parametrize(
    ("prefill", "decode", "mode", "can_flip", "name", "reason"),
    [
        (2, 2, "strict", True, "decode-1", "strict with 1 decode instance besides decode-1, drained by hand"),
        (
            1,
            2,
            "auto",
            False,
            "decode-1",
            "there is 1 decode instance besides decode-1, drained by hand and no prefill",
        ),
        (1, 1, "auto", True, "prefill-0", "there is 1 decode instance besides prefill-0, drained by hand"),
    ],
)
def test_who_was_drained_by_hand_serves_nobody_meanwhile(
    prefill: int, decode: int, mode: Mode, can_flip: bool, name: str, reason: str
) -> None:
    core = old(prefill, decode)
    assert rolling.reason_against_update(core, mode, can_flip=can_flip) is None
    wanted_set.hold(core, name, 5.0, 50.0)
    found = rolling.reason_against_update(core, mode, can_flip=can_flip)
    assert found is not None and reason in found


def test_one_that_is_drained_under_an_update_is_named_as_what_it_waits_for() -> None:
    core = old(0, 2)
    wanted_set.hold(core, "decode-0", 5.0, 50.0)
    core.slots["decode-0"].generation = "new"
    step = rolling.next_step(core, NEW, "auto", can_flip=True, now_s=60.0)
    reason = "nobody would serve without decode-1: decode-0 is drained by hand"
    assert step == rolling.Wait(reason=reason, is_stuck=True)
    wanted_set.resume(core, "decode-0", 61.0)
    assert rolling.next_step(core, NEW, "auto", can_flip=True, now_s=62.0) == rolling.Renew(name="decode-1")


def crash_on(core: Reconciler, name: str) -> None:
    """It has died, and then twice at its start."""
    for now_s in (50.0, 60.0, 70.0):
        core.gone(name, core.slots[name].life, "out of memory", now_s)
        core.decide(now_s + 5.0)
    core.gone(name, core.slots[name].life, "out of memory", 80.0)


@pytest.mark.parametrize(("prefill", "mode"), [(2, "strict"), (0, "auto")])
def test_who_serves_nobody_is_renewed_first(prefill: int, mode: Mode) -> None:
    """What is to be applied may be what brings it up."""
    core = old(prefill, 2)
    crash_on(core, "decode-1")
    assert planned(core, mode)[0] == "decode-1"
    step = rolling.next_step(core, NEW, mode, can_flip=True, now_s=60.0)
    assert step == rolling.Renew(name="decode-1")
    wanted_set.renew(core, "decode-1", 5.0, 60.0, generation="new", role=None)
    core.decide(60.0)
    up(core, "decode-1", 61.0)
    carry_out(core, mode)
    assert {slot.generation for slot in core.slots.values() if slot.is_instance} == {"new"}


def test_a_role_that_is_down_as_a_whole_is_brought_up_by_the_update() -> None:
    """Then the new ones of it have nobody to work with, and the old ones of the other role neither."""
    core = old(2, 2)
    for name in ("prefill-0", "prefill-1"):
        crash_on(core, name)
    words, now_s = [], 100.0
    update = NEW
    while not isinstance(
        step := rolling.next_step(core, update, "strict", can_flip=True, now_s=now_s), rolling.Finished
    ):
        assert isinstance(step, rolling.Renew | rolling.Renewed), step
        now_s += 1.0
        update = replace(update, current=step.name if isinstance(step, rolling.Renew) else "")
        if isinstance(step, rolling.Renew):
            words.append(step.name)
            wanted_set.renew(core, step.name, 5.0, now_s, generation="new", role=None)
            core.decide(now_s)
            core.decide(now_s + 10.0)
            core.gone(step.name, core.slots[step.name].life, "ended", now_s + 11.0)
            core.decide(now_s + 12.0)
            up(core, step.name, now_s + 13.0)
    assert words == ["prefill-0", "prefill-1", "decode-0", "decode-1"]


def test_one_that_is_on_its_way_up_is_waited_for() -> None:
    core = old(2, 2)
    core.gone("prefill-0", 1, "killed by SIGKILL", 50.0)
    core.decide(50.0)
    assert rolling.next_step(core, NEW, "strict", can_flip=True, now_s=51.0) == rolling.Wait(
        reason="prefill-0 is starting"
    )
    up(core, "prefill-0", 52.0)
    assert carry_out(core, "strict") == ["prefill-0", "decode-0", "prefill-1", "decode-1"]


def test_who_is_not_heard_yet_is_not_taken_for_one_that_is_down() -> None:
    core = old(2, 2)
    for slot in core.slots.values():
        slot.linked = False
    step = rolling.next_step(core, NEW, "auto", can_flip=True, now_s=51.0)
    assert isinstance(step, rolling.Wait) and "not heard yet" in step.reason


def test_who_is_rebuilt_for_another_role_meanwhile_is_waited_for_and_renewed_after() -> None:
    core = old(2, 3)
    wanted_set.renew(core, "decode-2", 5.0, 50.0, generation=None, role="prefill")
    with pytest.raises(AssertionError, match="decode-2 is to start anew already"):  # what is waited for
        carry_out(core, "auto")
    core.gone("decode-2", 1, "ended", 300.0)
    core.decide(300.0)
    up(core, "decode-2", 301.0)
    assert (core.slots["decode-2"].generation, core.slots["decode-2"].kind) == ("old", "prefill")
    assert carry_out(core, "auto") == ["decode-2"]
    assert {slot.generation for slot in core.slots.values() if slot.is_instance} == {"new"}


def test_one_that_crashes_again_and_again_after_its_renewal_pauses_it_too() -> None:
    core = old(2, 2)
    core.slots["prefill-0"].generation = "new"
    update = replace(NEW, current="decode-0")
    wanted_set.renew(core, "decode-0", 60.0, 200.0, generation="new", role=None)
    core.decide(200.0)
    for life in (1, 2):
        core.gone("prefill-0", life, "out of memory", 201.0 + 5 * life)
        if life == 1:
            step = rolling.next_step(core, update, "auto", can_flip=True, now_s=206.0)
            assert step == rolling.Wait(reason="decode-0 is ready"), "one death is repaired"
            core.decide(206.0)
    core.gone("prefill-0", 3, "out of memory", 212.0)
    core.decide(212.0)
    core.gone("prefill-0", 3, "out of memory", 213.0)
    step = rolling.next_step(core, update, "auto", can_flip=True, now_s=213.0)
    assert step == rolling.Failed(name="prefill-0", reason="out of memory")


def test_who_turns_when_the_last_decode_instance_finds_no_room() -> None:
    core = made(2, 1)
    assert rescue(core, "auto", 10.0) is None
    core.gone("decode-0", 1, "gone", 20.0)
    core.decide(20.0)
    assert rescue(core, "auto", 20.0 + PATIENCE_S - 1) is None, "it may be loading"
    assert rescue(core, "auto", 20.0 + PATIENCE_S) == Rescue(turns="prefill-0", waits="decode-0", role="decode")
    core.no_room("decode-0", 2, "cannot be started: no room", 20.5)
    assert rescue(core, "strict", 21.0) == Rescue(turns="prefill-0", waits="decode-0", role="decode")
    wanted_set.flip(core, "prefill-0", "decode", 1.0, 21.0)
    core.slots["decode-0"].next_kind = "prefill"
    assert core.counts() == {"prefill": 2, "decode": 1}, "the ratio is what it was"
    assert rescue(core, "auto", 22.0) is None


def test_the_last_prefill_instance_turns_in_auto_alone() -> None:
    core = made(1, 1)
    core.gone("decode-0", 1, "gone", 20.0)
    core.decide(20.0)
    core.no_room("decode-0", 2, "cannot be started: no room", 20.5)
    assert rescue(core, "strict", 21.0) is None
    found = rescue(core, "auto", 21.0)
    assert found is not None and found.turns == "prefill-0"
