"""A controller that was stopped itself: what ran out meanwhile is heard before it is judged. Under a clock that the test turns."""

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from support.fake_backend import FakeBackend, controller_over
from support.wanted import idle, made, say, up

from biphase.cluster import reach_watch, wanted_set
from biphase.cluster.actions import Abandon, AskToStop, Kill
from biphase.cluster.deployment import Deployment
from biphase.cluster.reach import PAUSE_S, Reach
from biphase.cluster.reach_watch import ReachWatch
from biphase.cluster.reconcile import STOP_S, Reconciler


def stopped(core: Reconciler, from_s: float, to_s: float) -> None:
    core.awake(from_s)
    core.awake(to_s)


def test_a_gap_in_what_is_said_every_second_is_a_pause() -> None:
    reach = Reach()
    assert reach.awake(10.0) is None
    assert reach.awake(11.0) is None
    assert reach.awake(11.0 + PAUSE_S) is None
    assert reach.awake(40.0) == 11.0 + PAUSE_S
    assert reach.awake(41.0) is None


def test_who_has_turned_while_the_controller_was_stopped_is_not_killed_for_it() -> None:
    core = made()
    wanted_set.flip(core, "prefill-0", "decode", 1.0, 5.0)
    core.decide(5.0)
    core.unlinked("prefill-0", 1, 6.0)
    stopped(core, 6.0, 26.0)
    assert core.decide(26.0) == []
    assert core.next_due_s() == 5.0 + 20.0 + 1.0 + STOP_S
    core.linked("prefill-0", 2, 26.1)
    assert core.slots["prefill-0"].kind == "decode"


def test_a_kill_before_a_pause_has_its_patience_after_it() -> None:
    core = made(kill_patience_s=2.0)
    core.lost("decode-0", 1, "link lost", 5.0)
    core.decide(5.0)
    stopped(core, 6.0, 16.0)
    assert core.decide(16.0) == []
    assert core.avoided == frozenset()
    assert core.decide(17.0) == [Abandon(name="decode-0", incarnation=1, node="decode-0")]


def test_who_was_asked_to_stop_before_a_pause_has_its_time_after_it() -> None:
    core = made()
    wanted_set.stop(core, "decode-0", 5.0, 1.0)
    core.decide(1.0)
    idle(core, "decode-0")
    assert core.decide(2.0) == [AskToStop(name="decode-0", incarnation=1)]
    stopped(core, 3.0, 30.0)
    assert core.decide(30.0) == []
    why = f"did not end within {STOP_S:g} s of being asked"
    assert core.decide(2.0 + 27.0 + STOP_S) == [Kill(name="decode-0", incarnation=1, reason=why)]


def test_a_pause_within_a_cut_is_discounted_once() -> None:
    core = made()
    core.gone("decode-0", 1, "ended", 0.0)
    core.decide(0.0)
    say(core, "decode-0", "loading", 1.0)
    core.looked({"a": False, "b": False}, 10.0)
    stopped(core, 11.0, 21.0)
    core.looked({"a": True, "b": False}, 30.0)
    assert core.slots["decode-0"].since_s == 1.0 + 20.0


async def test_the_controller_hears_first_what_has_happened(tmp_path: Path) -> None:
    controller = controller_over(FakeBackend(), tmp_path, Deployment(model="/models/a", name="x"))
    core, now_s = controller.core, controller.now_s()
    core.kill_patience_s = 2.0
    core.decide(now_s - 30.0)
    core.lost("decode-0", 1, "link lost", now_s - 20.0)
    core.decide(now_s - 20.0)
    core.awake(now_s - 19.0)
    await controller._step()
    assert core.slots["decode-0"].killed, "its place is not given away by a look that comes late"


async def test_the_controller_says_every_second_that_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    core = made(kill_patience_s=2.0)
    up(core, "decode-0", 0.0, node="127.0.0.1")
    core.lost("decode-0", 1, "link lost", 5.0)
    core.decide(5.0)
    clock = SimpleNamespace(s=5.0, asked=0)

    def now_s() -> float:
        clock.asked += 1
        return float(clock.s)

    async def answers(address: str) -> bool:
        return True

    monkeypatch.setattr(reach_watch, "LOOK_EVERY_S", 0.0)
    controller = SimpleNamespace(core=core, now_s=now_s, changed=lambda: None)
    watch = asyncio.create_task(ReachWatch(cast("Any", controller), answers).run())
    async with asyncio.timeout(10.0):
        for clock.s in (5.0, 15.0):
            seen = clock.asked
            while clock.asked < seen + 10:
                await asyncio.sleep(0)
    watch.cancel()
    assert core.slots["decode-0"].killed_s == 15.0
