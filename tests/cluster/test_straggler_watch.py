"""Slow and stopped instances of a real controller: what routers and people are told of them, trials, and replacements."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from support.fake_backend import controller_over
from support.scripted_worker import WITHIN_S, ScriptedWorker
from support.straggling import Clock, Fleet, Host, until

from biphase.cluster import reach_watch, straggler_watch
from biphase.cluster.controller import Controller
from biphase.cluster.deployment import Deployment, RolePlan

REPLACE_AFTER_S = 12
"""Not the default, which is to be told from it."""
DEPLOYMENT = Deployment(model="m", decode=RolePlan(replicas=3), replace_after_s=REPLACE_AFTER_S)


@pytest.fixture
async def fleet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Fleet]:
    monkeypatch.setattr(straggler_watch, "LOOK_S", 0.0)
    monkeypatch.setattr(reach_watch, "LOOK_EVERY_S", 3600.0)  # what a test says of other hosts holds
    clock = Clock()
    monkeypatch.setattr(Controller, "now_s", lambda controller: clock.now_s)
    async with contextlib.AsyncExitStack() as stack:
        workers = [ScriptedWorker("decode", name=f"decode-{index}", incarnation=1) for index in range(3)]
        workers.append(ScriptedWorker("prefill", incarnation=1))
        for worker in workers:
            await stack.enter_async_context(worker)
        host = Host({worker.name: worker for worker in workers})
        controller = controller_over(host, tmp_path, DEPLOYMENT)
        fleet = Fleet(controller, host, clock)
        stop = asyncio.Event()
        run = asyncio.create_task(controller.run(stop))
        watches = [asyncio.create_task(fleet.watch_membership()), asyncio.create_task(fleet.watch_status())]
        try:
            await until(lambda: controller.core.was_ready and len(fleet.members) == 4)
            yield fleet
        finally:
            stop.set()
            await asyncio.wait_for(run, WITHIN_S)
            for watch in watches:
                watch.cancel()


async def test_who_takes_four_times_as_long_as_its_peers_at_equal_work_gets_nothing_new(fleet: Fleet) -> None:
    fleet.doing["decode-2"].factor = 4.0
    await fleet.pass_s(10)
    assert (fleet.out, fleet.said) == ([], []), "it may be a slow moment"
    await fleet.pass_s(1)
    await until(lambda: fleet.out == ["decode-2#1"])
    await until(lambda: fleet.health == {"decode-2": "slow"})
    assert len(fleet.members) == 4, "what it has goes on"
    told = "decode-2 gets no work: its steps take 4.0 times as long as its peers' at equal work; tried again in 10 s"
    assert fleet.said == [told]
    await until(lambda: told in fleet.host.kept["events/0"])
    assert fleet.status.ratio == "1P:3D, without decode-2 (slow)" and fleet.killed == []


async def test_it_is_tried_again_later_each_time_and_stays_once_it_keeps_up(fleet: Fleet) -> None:
    fleet.doing["decode-2"].factor = 4.0
    for wait_s in (10, 20):
        await fleet.pass_s(11 if wait_s == 10 else 15)
        await until(lambda: fleet.out == ["decode-2#1"])
        assert fleet.said[-1].endswith(f"tried again in {wait_s} s")
        await fleet.pass_s(wait_s - 1)
        assert fleet.out == ["decode-2#1"]
        await fleet.pass_s(1)
        await until(lambda: fleet.out == [])
        await until(lambda: fleet.health == {"decode-2": "probing"})
    fleet.doing["decode-2"].factor = 1.0
    await fleet.pass_s(15)
    await until(lambda: fleet.health == {})
    assert fleet.said[-1] == "decode-2 is well again: its steps take 1.0 times as long as its peers' at equal work"
    await fleet.pass_s(30)
    assert (fleet.out, fleet.killed) == ([], [])


@pytest.mark.parametrize("how", ["says nothing", "hangs in a step"])
async def test_who_has_stopped_with_work_aboard_is_out_and_is_replaced_when_its_time_is_over(
    fleet: Fleet, how: str
) -> None:
    await fleet.pass_s(5)
    stopped = fleet.doing["decode-2"]
    stopped.is_silent, stopped.hangs_since_s = how == "says nothing", fleet.clock.now_s
    await fleet.pass_s(3)
    assert (fleet.out, fleet.said) == ([], [])
    await fleet.pass_s(1)
    await until(lambda: fleet.out == ["decode-2#1"])
    await until(lambda: fleet.health == {"decode-2": "stopped"})
    await fleet.pass_s(REPLACE_AFTER_S - 4 - 1)
    assert fleet.killed == [] and "decode-2#1" in fleet.members
    stopped.is_silent = True  # it is about to be gone
    await fleet.pass_s(1)
    await until(lambda: fleet.killed == ["decode-2#1"])
    await until(lambda: fleet.members.get("decode-2#2", False))
    assert (fleet.out, len(fleet.members)) == ([], 4)
    why = f"no step or no word for {REPLACE_AFTER_S} s with work aboard"
    assert fleet.said[-1] == f"decode-2 is ended and replaced: {why}"
    gone = [event.text for event in fleet.controller.events.after(0) if event.kind == "end"]
    assert gone == ["decode-2#1 is gone: it had stopped with work aboard"]
    stopped.is_silent, stopped.hangs_since_s = False, None
    await fleet.pass_s(REPLACE_AFTER_S + 5)
    await until(lambda: fleet.health == {})
    assert (fleet.out, fleet.killed) == ([], ["decode-2#1"]), "its next life has nothing to answer for"


async def test_who_goes_on_before_its_time_is_over_lives_on(fleet: Fleet) -> None:
    await fleet.pass_s(5)
    fleet.doing["decode-2"].is_silent = True
    await fleet.pass_s(REPLACE_AFTER_S - 2)
    await until(lambda: fleet.health == {"decode-2": "stopped"})
    fleet.doing["decode-2"].is_silent = False
    await fleet.pass_s(40)
    await until(lambda: fleet.health == {})
    assert (fleet.out, fleet.killed) == ([], [])


async def test_the_only_one_of_its_role_that_has_stopped_is_named_while_it_stays_in(fleet: Fleet) -> None:
    await fleet.pass_s(5)
    fleet.doing["prefill-0"].is_silent = True
    await fleet.pass_s(4)
    await until(lambda: fleet.health == {"prefill-0": "stopped"})
    assert (fleet.out, fleet.said) == ([], [])
    fleet.doing["prefill-0"].is_silent = False
    await fleet.pass_s(1)
    await until(lambda: fleet.health == {})


async def test_who_has_nothing_to_do_may_say_nothing(fleet: Fleet) -> None:
    fleet.doing["decode-2"].running = 0
    await fleet.pass_s(5)
    fleet.doing["decode-2"].is_silent = True
    await fleet.pass_s(4 * REPLACE_AFTER_S)
    assert (fleet.out, fleet.said, fleet.killed) == ([], [], [])


@pytest.mark.parametrize("slow_s", [1, 3, 9])
async def test_who_went_idle_after_a_slow_moment_stays_in(fleet: Fleet, slow_s: int) -> None:
    """Its last words are of slow steps, and it says no more while it is idle."""
    fleet.doing["decode-2"].factor, fleet.doing["decode-2"].running = 4.0, 0
    await fleet.pass_s(slow_s)
    fleet.doing["decode-2"].is_silent = True
    await fleet.pass_s(40)
    assert (fleet.out, fleet.said) == ([], [])


async def test_the_silence_between_two_slow_moments_is_no_slowness(fleet: Fleet) -> None:
    brief = fleet.doing["decode-2"]
    brief.factor, brief.running = 4.0, 0
    for is_silent, seconds in ((False, 3), (True, 8), (False, 3), (True, 20)):
        brief.is_silent = is_silent
        await fleet.pass_s(seconds)
    assert (fleet.out, fleet.said) == ([], [])


async def test_who_idles_between_its_slow_steps_is_slow(fleet: Fleet) -> None:
    fleet.doing["decode-2"].factor, fleet.doing["decode-2"].running = 4.0, 0
    await fleet.pass_s(11)
    await until(lambda: fleet.out == ["decode-2#1"])


async def test_who_has_no_work_on_trial_is_on_trial_until_there_is_some(fleet: Fleet) -> None:
    slow = fleet.doing["decode-2"]
    slow.factor = 4.0
    await fleet.pass_s(11)
    await until(lambda: fleet.out == ["decode-2#1"])
    slow.running = 0
    await fleet.pass_s(1)
    slow.is_silent = True
    await fleet.pass_s(100)
    await until(lambda: fleet.health == {"decode-2": "probing"})
    assert fleet.out == [] and [text.split(":")[0] for text in fleet.said] == [
        "decode-2 gets no work",
        "decode-2 gets work again on trial, 15 s",
    ]
    slow.is_silent, slow.running, slow.factor = False, 3, 1.0
    await fleet.pass_s(1)
    await until(lambda: fleet.health == {})


async def test_while_this_host_is_cut_off_nobody_is_judged(fleet: Fleet) -> None:
    core = fleet.controller.core
    await fleet.pass_s(5)
    fleet.doing["decode-2"].is_silent = True
    core.looked({"a": False, "b": False}, fleet.clock.now_s)
    await fleet.pass_s(4 * REPLACE_AFTER_S)
    core.looked({"a": True, "b": False}, fleet.clock.now_s)
    await fleet.pass_s(REPLACE_AFTER_S)
    assert fleet.killed == [], "its silence counts from the end of the cut"
    await fleet.pass_s(1)
    await until(lambda: fleet.killed == ["decode-2#1"])
