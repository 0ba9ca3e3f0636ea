"""Which routers are taken for silent, and what becomes of them; under a clock that the test turns."""

from types import SimpleNamespace
from typing import Any, cast

from support.wanted import idle, made

from biphase.cluster.actions import Kill, Start
from biphase.cluster.reach import PAUSE_S
from biphase.cluster.router_reports import RouterReports
from biphase.cluster.router_silence import STALE_S, WITNESS_S, Heard, Verdict, judge
from biphase.cluster.router_watch import RouterWatch
from biphase.protos import controller_pb2, worker_pb2

REPLACE_S = 30.0


def heard(name: str, node: str, heard_s: float) -> Heard:
    return Heard(name=name, node=node, heard_s=heard_s)


def verdict(
    routers: list[Heard], instances: list[Heard], now_s: float, before: dict[str, float] | None = None
) -> Verdict:
    return judge(routers, instances, before or {}, own_node="head", replace_after_s=REPLACE_S, now_s=now_s)


def test_a_router_is_silent_when_its_last_word_is_old_and_another_is_heard() -> None:
    other = heard("decode-0", "b", 100.0)
    assert verdict([heard("router-0", "a", 95.1)], [other], 100.0) == Verdict()
    assert verdict([heard("router-0", "a", 95.0)], [other], 100.0) == Verdict(silent={"router-0": 100.0})
    two = [heard("router-0", "a", 90.0), heard("router-1", "b", 99.0)]
    assert verdict(two, [], 100.0).silent == {"router-0": 100.0}, "another router is a witness too"
    beside = heard("prefill-0", "a", 100.0)
    assert verdict([heard("router-0", "a", 90.0)], [beside], 100.0).silent, "its host is reached, it is not"


def test_a_controller_that_is_cut_off_blames_nobody() -> None:
    routers = [heard("router-0", "a", 90.0), heard("router-1", "b", 90.5)]
    instances = [heard("prefill-0", "a", 91.0), heard("decode-0", "b", 91.0)]
    beside = heard("decode-1", "head", 100.0)  # whom no network is needed for
    assert verdict(routers, [*instances, beside], 100.0) == Verdict()
    assert verdict([heard("router-0", "head", 90.0)], [beside], 100.0).silent == {"router-0": 100.0}
    assert verdict([heard("router-0", "head", 90.0)], [], 100.0) == Verdict()


def test_those_that_are_cut_off_together_are_no_witness_against_each_other() -> None:
    last = {"router-0": 49.0, "router-1": 49.9}
    for tenth in range(500, 700):
        now_s = tenth / 10
        routers = [heard(name, name, at_s) for name, at_s in last.items()]
        assert verdict(routers, [heard("decode-0", "b", 50.0)], now_s) == Verdict()
    assert STALE_S > WITNESS_S + 1.0


def test_it_is_killed_after_a_silence_that_was_witnessed_all_the_time() -> None:
    router, other = heard("router-0", "a", 0.0), "decode-0"
    silent: dict[str, float] = {}
    killed = []
    for second in range(5, 60):
        if not 20 <= second < 25:
            now = verdict([router], [heard(other, "b", second)], second, silent)
        else:
            now = verdict([router], [], second, silent)
            assert now.silent == {"router-0": second}, "still silent, but nobody tells whose fault it is"
        silent = dict(now.silent)
        killed += [second] * bool(now.kill)
    assert killed[0] == 24 + REPLACE_S


def watched() -> tuple[Any, RouterWatch]:
    core = made()
    said: list[str] = []
    controller = SimpleNamespace(
        core=core,
        time_s=100.0,
        stopping=False,
        announcer=SimpleNamespace(current=SimpleNamespace(node="head")),
        deployment=SimpleNamespace(replace_after_s=REPLACE_S),
        events=SimpleNamespace(add=lambda kind, subject, text: said.append(text)),
        said=said,
        changes=0,
    )
    controller.now_s = lambda: controller.time_s
    controller.reports = RouterReports(controller.now_s)

    def changed() -> None:
        controller.changes += 1

    controller.changed = changed
    life = SimpleNamespace(is_silent_as_idle=True, signals=(1, 0.0, worker_pb2.WorkerSignals()))
    controller.lives = {"decode-0": life}
    idle(core, "decode-0")
    return controller, RouterWatch(cast("Any", controller))


def look_until(controller: Any, watch: RouterWatch, until_s: float) -> None:
    while controller.time_s < until_s:
        controller.time_s += 1.0
        watch.look()


def report(controller: Any, incarnation: int = 1, pairs: int = 0) -> None:
    broken = [controller_pb2.BrokenPair(prefill="prefill-0", decode="decode-0")] * pairs
    word = controller_pb2.RouterReport(name="router-0", incarnation=incarnation, broken_pairs=broken)
    controller.reports.add(word)


def test_a_silent_router_is_named_to_nobody_and_started_anew() -> None:
    controller, watch = watched()
    core = controller.core
    report(controller)
    look_until(controller, watch, 104.0)
    assert core.all_up and core.slots["router-0"].is_up and not controller.changes
    look_until(controller, watch, 105.0)
    slot = core.slots["router-0"]
    assert (slot.silent, slot.phase, slot.is_up, core.all_up) == (True, "ready", False, False)
    assert controller.said == ["router-0 is silent, clients are not sent to it"] and controller.changes == 1
    look_until(controller, watch, 115.0)
    assert core.decide(115.0) == [], "a stop of ten seconds does no harm"
    report(controller)
    assert core.all_up and controller.changes == 2, "its first word is enough"
    look_until(controller, watch, 120.0 + REPLACE_S)
    reason = "it was silent for 30 s"
    assert core.decide(controller.time_s) == [Kill(name="router-0", incarnation=1, reason=reason)]
    core.gone("router-0", 1, "killed", controller.time_s)
    assert core.decide(controller.time_s) == [Start(name="router-0", incarnation=2)]
    assert not slot.silent
    report(controller, incarnation=2)
    report(controller, incarnation=1)
    assert controller.reports.newest["router-0"].report.incarnation == 2, "its former life does not speak for it"


def test_a_controller_that_was_stopped_listens_first() -> None:
    controller, watch = watched()
    report(controller)
    controller.time_s += 60.0
    watch.look()
    look_until(controller, watch, 160.0 + STALE_S - 1.0)
    assert controller.core.all_up
    look_until(controller, watch, 160.0 + STALE_S)
    assert not controller.core.all_up
    assert PAUSE_S < STALE_S


def test_one_that_never_reports_has_its_time_from_when_it_was_ready() -> None:
    controller, watch = watched()
    look_until(controller, watch, 104.0)
    assert controller.core.all_up, "the controller has listened for four seconds"
    look_until(controller, watch, 105.0)
    assert not controller.core.all_up


def test_broken_pairs_are_those_of_routers_that_are_heard() -> None:
    controller, _ = watched()
    report(controller, pairs=1)
    assert len(controller.reports.broken_pairs()) == 1
    controller.time_s += STALE_S
    assert controller.reports.broken_pairs() == []
