"""Whether an instance is gone or the controller's own host is cut off."""

import asyncio
import socket
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
from support.wanted import made, say, up

from biphase.cluster import life as life_module
from biphase.cluster.actions import Abandon, Kill, Start
from biphase.cluster.backend import Handle
from biphase.cluster.controller_messages import warnings_of
from biphase.cluster.controller_state import ControllerState, restore, slots_of
from biphase.cluster.deployment import Deployment
from biphase.cluster.life import Life
from biphase.cluster.reach import AGAIN_S, CUT_OFF, Reach
from biphase.cluster.reach_watch import ReachWatch, answers, host_of, is_here
from biphase.cluster.reconcile import LAST_WORDS_S, STOP_S, Reconciler
from biphase.cluster.wanted_set import stop
from biphase.cluster.worker_link import WorkerLink
from biphase.protos import worker_pb2

ALL_SILENT = {"a": False, "b": False}
ONE_ANSWERS = {"a": False, "b": True}


# -- the judgement ----------------------------------------------------------------------------------------------------


def test_who_alone_is_silent_is_lost() -> None:
    reach = Reach()
    reach.looked(ONE_ANSWERS, 10.0)
    assert reach.may_be_lost(10.0)


def test_where_no_other_answers_nobody_is_lost() -> None:
    reach = Reach()
    reach.looked(ALL_SILENT, 10.0)
    assert reach.cut_off_since_s == 10.0
    reach.looked(ALL_SILENT, 500.0)
    assert reach.cut_off_since_s == 10.0
    assert not reach.may_be_lost(1000.0)


def test_the_silence_of_a_single_other_host_is_its_own() -> None:
    reach = Reach()
    reach.looked({"a": False}, 10.0)
    assert reach.may_be_lost(10.0)
    reach.looked({}, 11.0)
    assert reach.may_be_lost(11.0)


def test_once_others_answer_the_silent_are_asked_again_first() -> None:
    reach = Reach()
    reach.looked(ALL_SILENT, 10.0)
    reach.looked(ONE_ANSWERS, 20.0)
    assert not reach.is_cut_off
    reach.looked(ONE_ANSWERS, 21.0)
    assert not reach.may_be_lost(20.0 + AGAIN_S - 0.01)
    assert reach.may_be_lost(20.0 + AGAIN_S)
    reach.looked(ALL_SILENT, 30.0)
    assert not reach.may_be_lost(40.0), "a second cut is judged like the first"


@pytest.mark.parametrize("left", [{}, {"a": False}], ids=["none", "one"])
def test_a_cut_ends_where_at_most_one_other_host_is_left(left: dict[str, bool]) -> None:
    reach = Reach()
    reach.looked(ALL_SILENT, 10.0)
    reach.looked(left, 75.0)
    assert not reach.is_cut_off
    assert not reach.may_be_lost(75.0 + AGAIN_S - 0.01)
    assert reach.may_be_lost(75.0 + AGAIN_S)


# -- what the reconciler makes of it ----------------------------------------------------------------------------------


def test_no_patience_runs_out_while_this_host_is_cut_off() -> None:
    core = made(kill_patience_s=2.0)
    stop(core, "decode-0", 0.0, 9.0 - LAST_WORDS_S)
    core.decide(9.0 - LAST_WORDS_S)
    core.decide(9.0)  # it is asked to stop
    core.lost("decode-1", 1, "link lost", 9.0)
    core.decide(9.0)  # it is killed
    core.lost("prefill-0", 1, "link lost", 9.0)
    core.decide(9.0)
    core.gone("prefill-0", 1, "gone", 9.0)
    core.decide(9.0)
    say(core, "prefill-0", "loading", 9.0)
    core.looked(ALL_SILENT, 10.0)
    assert core.notes[-1] == ("warning", "controller", CUT_OFF)
    assert core.decide(1000.0) == []
    assert core.next_due_s() is None, "or the controller turns without a pause"
    core.looked(ONE_ANSWERS, 1000.0)
    assert core.notes[-1][2].startswith("this host reaches others again after 990 s")
    assert core.decide(1000.9) == []
    assert core.next_due_s() == 1001.0
    assert core.decide(1001.0) == [Abandon(name="decode-1", incarnation=1, node="decode-1")]
    kills = core.decide(990.0 + 9.0 + STOP_S)
    assert Kill(name="decode-0", incarnation=1, reason=f"did not end within {STOP_S:g} s of being asked") in kills
    assert core.slots["prefill-0"].phase == "loading"
    core.decide(990.0 + 9.0 + 100.0)
    assert core.slots["prefill-0"].phase == "lost", "its time to start has run out after all"


def test_whoever_is_cut_off_with_this_host_stays_a_member_and_its_end_is_an_end() -> None:
    core = made()
    before = core.members
    core.looked(ALL_SILENT, 10.0)
    core.decide(100.0)
    assert core.members == before
    core.gone("decode-1", 1, "its process is gone", 101.0)
    assert core.decide(101.0) == [Start(name="decode-1", incarnation=2)]


def test_what_starts_in_place_of_hosts_that_are_gone_has_its_limits() -> None:
    core = made(kill_patience_s=2.0)
    core.looked(ALL_SILENT, 10.0)
    core.gone("decode-0", 1, "its node is dead", 75.0)
    core.gone("decode-1", 1, "its node is dead", 75.0)
    core.decide(75.0)
    say(core, "decode-0", "loading", 76.0, node="127.0.0.1")
    core.looked({}, 77.0)
    assert core.notes[-1][2].startswith("fewer than 2 other hosts are left after 67 s")
    assert core.next_due_s() == 77.0 + core.start_timeout_s
    core.decide(77.0 + core.start_timeout_s)
    assert core.slots["decode-0"].phase == "lost"


def test_status_says_that_this_host_is_cut_off() -> None:
    core = made()
    controller = SimpleNamespace(
        core=core,
        lives={},
        warnings=[],
        deployment=Deployment(model="m"),
        announcer=SimpleNamespace(current=SimpleNamespace(address="127.0.0.1:1")),
        reports=SimpleNamespace(broken_pairs=list),
    )
    assert CUT_OFF not in warnings_of(cast("Any", controller))
    core.looked(ALL_SILENT, 10.0)
    assert CUT_OFF in warnings_of(cast("Any", controller))


# -- the shell --------------------------------------------------------------------------------------------------------


class Net:
    """The hosts that answer, for a controller of three instances on hosts 198.51.100.1 to 3 and a router on its own."""

    def __init__(self, core: Reconciler) -> None:
        self.reached: set[str] = set()
        self.asked: list[str] = []
        self.clock_s = 0.0
        self.core = core
        self.epoch, self.stopping = 1, False
        self.changes = 0
        self.reach_watch = ReachWatch(cast("Any", self), self.ask)

    async def ask(self, address: str) -> bool:
        self.asked.append(address)
        await asyncio.sleep(0)
        return host_of(address) in self.reached

    def now_s(self) -> float:
        return self.clock_s

    def changed(self) -> None:
        self.changes += 1


@pytest.fixture
def net() -> Net:
    core = made(kill_patience_s=2.0)
    for number, name in enumerate(("prefill-0", "decode-0", "decode-1"), 1):
        up(core, name, 0.0, node=f"198.51.100.{number}")
    say(core, "router-0", "ready", 0.0, node="127.0.0.1")
    core.decide(0.0)
    return Net(core)


async def test_all_others_are_asked_before_one_is_given_up(net: Net) -> None:
    net.reached = {"198.51.100.2"}
    assert await net.reach_watch.may_be_lost("198.51.100.1:1")
    assert sorted(net.asked) == ["198.51.100.1:1", "198.51.100.2:1", "198.51.100.3:1"], "not the router on this host"
    assert net.reach_watch.is_silent("198.51.100.1:1")
    assert not net.reach_watch.is_silent("198.51.100.2:1")
    assert net.changes == 0


async def test_where_none_answers_the_own_host_is_cut_off_until_one_does(net: Net) -> None:
    assert not await net.reach_watch.may_be_lost("198.51.100.1:1")
    assert net.core.reach.is_cut_off and net.changes == 1
    assert await net.reach_watch.may_be_lost("127.0.0.1:1"), "on the own host silence means what it always does"
    assert net.core.reach.is_cut_off
    net.reach_watch.heard("127.0.0.1:1")
    assert net.core.reach.is_cut_off
    net.clock_s, net.reached = 50.0, {"198.51.100.3"}
    await net.reach_watch.look()
    assert not net.core.reach.is_cut_off and net.changes == 2
    assert not await net.reach_watch.may_be_lost("198.51.100.1:1"), "it has 3 s to answer"
    net.clock_s += AGAIN_S
    assert await net.reach_watch.may_be_lost("198.51.100.1:1")


async def test_the_cut_ends_when_one_other_host_is_left(net: Net) -> None:
    await net.reach_watch.look()
    for name in ("prefill-0", "decode-0"):
        assert net.core.reach.is_cut_off
        net.core.gone(name, 1, "its node is dead", 65.0)
        await net.reach_watch.look()
    assert not net.core.reach.is_cut_off and net.changes == 2


async def test_a_new_life_asks_whom_the_earlier_one_knew(net: Net) -> None:
    kept = ControllerState.from_json(ControllerState(slots=slots_of(net.core)).to_json())
    later = Net(Reconciler((), 100.0, 2.0))
    restore(later.core, kept)
    for name in later.core.slots:
        later.core.adopt(name, 2 if name == "decode-0" else 1, 0.0)
    watch = asyncio.create_task(later.reach_watch.run())
    async with asyncio.timeout(10.0):
        while not later.changes:
            await asyncio.sleep(0)
    watch.cancel()
    assert later.core.reach.is_cut_off, "though nobody has said a word to it"
    assert sorted(later.asked) == ["198.51.100.1:1", "198.51.100.3:1"], "another life is elsewhere"


async def test_a_link_that_stands_again_ends_the_cut(net: Net) -> None:
    await net.reach_watch.look()
    assert net.core.reach.is_cut_off
    net.reach_watch.heard("198.51.100.3:1")
    assert not net.core.reach.is_cut_off


async def test_the_silence_of_one_that_was_given_up_already_counts_no_more(net: Net) -> None:
    net.core.lost("prefill-0", 1, "link lost", 1.0)
    net.core.lost("decode-0", 1, "link lost", 1.0)
    net.core.decide(1.0)
    assert await net.reach_watch.may_be_lost("198.51.100.3:1")
    assert net.asked == ["198.51.100.3:1"]


async def test_a_router_elsewhere_tells_as_much_as_an_instance(net: Net) -> None:
    net.core.lost("prefill-0", 1, "link lost", 1.0)
    net.core.lost("decode-0", 1, "link lost", 1.0)
    net.core.decide(1.0)
    say(net.core, "router-0", "ready", 1.0, node="198.51.100.9")
    assert not await net.reach_watch.may_be_lost("198.51.100.3:1")
    net.clock_s, net.reached = 10.0, {"198.51.100.9"}
    await net.reach_watch.look()
    net.clock_s += AGAIN_S
    assert await net.reach_watch.may_be_lost("198.51.100.3:1")


async def test_a_host_that_answers_again_gets_instances_again(net: Net) -> None:
    net.core.unreachable.avoid("one", 0.0, "198.51.100.1:1")
    net.core.unreachable.avoid("two", 0.0, "198.51.100.2:1")
    net.core.unreachable.avoid("three", 0.0)
    net.reached = {"198.51.100.1"}
    await net.reach_watch.look_for_silent()
    assert set(net.core.unreachable) == {"two", "three"}
    assert net.changes == 1


# -- a life whose link is silent ----------------------------------------------------------------------------------------


class Link:
    """A link whose attempts fail with these reasons, after ``then`` each; the last one is asked for ever."""

    superseded = refused = False

    def __init__(self, address: str, then: Callable[[int], None]) -> None:
        self.address, self._then, self.attempts = address, then, 0

    async def hold(self, welcome_s: float = 0.0) -> str:
        self.attempts += 1
        self._then(self.attempts)
        return f"silent {self.attempts}"


async def held(net: Net, then: Callable[[int], None], monkeypatch: pytest.MonkeyPatch) -> Link:
    monkeypatch.setattr(life_module, "ASK_AGAIN_S", 0.0)
    handle = SimpleNamespace(name="decode-0", kind="decode", incarnation=1)
    life, link = Life(cast("Any", net), cast("Handle", handle)), Link("198.51.100.2:1", then)
    await asyncio.wait_for(life._hold_link(cast("WorkerLink", link)), 10.0)
    return link


async def test_a_silent_instance_is_asked_until_others_answer_and_it_does_not(
    net: Net, monkeypatch: pytest.MonkeyPatch
) -> None:
    phases = []

    def then(attempt: int) -> None:
        phases.append(net.core.slots["decode-0"].phase)
        net.clock_s += 1.0
        net.reached = {"198.51.100.1"} if attempt > 20 else set()

    link = await held(net, then, monkeypatch)
    assert set(phases) == {"ready"}
    assert 20 + AGAIN_S <= link.attempts < 20 + AGAIN_S + 6
    assert net.core.slots["decode-0"].phase == "lost"
    assert net.core.slots["decode-0"].unreached and not net.core.slots["decode-0"].died


async def test_a_silent_instance_beside_one_that_answers_is_lost_at_once(
    net: Net, monkeypatch: pytest.MonkeyPatch
) -> None:
    net.reached = {"198.51.100.1"}
    link = await held(net, lambda attempt: None, monkeypatch)
    assert (link.attempts, net.core.slots["decode-0"].reason) == (1, "link lost: silent 1")
    assert net.core.slots["decode-0"].unreached and not net.core.slots["decode-0"].died


async def test_who_is_refused_is_lost_whatever_the_others_do(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Link, "refused", True)
    link = await held(net, lambda attempt: None, monkeypatch)
    assert (link.attempts, net.core.slots["decode-0"].phase) == (1, "lost")
    assert net.core.slots["decode-0"].died and not net.core.slots["decode-0"].unreached


async def test_an_idle_instance_has_said_nothing_new_while_its_link_is_broken(net: Net) -> None:
    life = Life(cast("Any", net), cast("Handle", SimpleNamespace(name="decode-0", kind="decode", incarnation=1)))
    life.signals = 1, 0.0, worker_pb2.WorkerSignals()
    life.welcomed(1, worker_pb2.Welcome(name="decode-0"))
    assert life.is_silent_as_idle
    life.broken(1)
    assert not life.is_silent_as_idle
    await net.reach_watch.look()
    assert net.asked, "and all others are asked at once"


async def test_a_closed_port_is_an_answer() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        assert await answers(address)
    assert await answers(address)


async def test_who_takes_no_connection_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    async def nobody(host: str, port: int) -> None:
        assert (host, port) == ("fd00::1", 7)
        raise TimeoutError

    monkeypatch.setattr(asyncio, "open_connection", nobody)
    assert not await answers("[fd00::1]:7")


def test_own_addresses_are_known() -> None:
    assert all(is_here(host) for host in ("", "localhost", "127.0.0.1", "127.3.4.5", "::1", "0.0.0.0"))
    assert not is_here("198.51.100.1")
    assert not is_here("another-host")
