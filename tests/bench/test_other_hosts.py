"""The plan of hosts, and a backend that obeys it: what is cut off cannot be killed, nor seen to have ended."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from biphase.cluster.process_rank import ProcessRank
from biphase.cluster.run_dir import started_ticks

sys.path.append(str(Path(__file__).resolve().parents[2] / "bench" / "netns_site"))
import host_plan
from host_plan import HostPlan, changing_plan, read_plan, write_plan
from other_hosts import distant

WITHIN_S = 10.0


def plan(**values: Any) -> HostPlan:
    hosts = {
        host: {"address": f"10.0.0.{number}", "namespace": host} for number, host in enumerate(["c", "r", "n0", "n1"])
    }
    return HostPlan({"hosts": hosts, "fixed": {"controller": "c", "router-0": "r"}, **values})


def alive(pid: int, ticks: int) -> bool:
    return ticks > 0


# -- the plan


def test_an_instance_goes_to_the_first_host_that_is_free_reached_and_not_avoided() -> None:
    assert plan().choose("decode-0", [], alive) == "n0"
    assert plan(lives=[["n0", "prefill-0", 1, 7, 1]]).choose("decode-0", [], alive) == "n1"
    assert plan(lives=[["n0", "prefill-0", 1, 7, 0]]).choose("decode-0", [], alive) == "n0", "that life has ended"
    assert plan(cut=["n0"]).choose("decode-0", [], alive) == "n1"
    assert plan().choose("decode-0", ["n0"], alive) == "n1"
    assert plan(spare=["n0"]).choose("decode-0", [], alive) == "n1"
    assert plan(cut=["n0"]).choose("decode-0", ["n1"], alive) is None


def test_nothing_is_started_where_the_controller_does_not_reach() -> None:
    assert plan(cut=["c"]).choose("decode-0", [], alive) is None
    assert plan(cut=["c"]).choose("router-0", [], alive) is None
    assert plan(cut=["r"]).choose("router-0", [], alive) is None
    assert plan(cut=["c"]).choose("controller", [], alive) == "c"
    assert plan(cut=["n0"]).choose("router-0", [], alive) == "r"


def test_either_end_that_is_cut_off_keeps_them_apart() -> None:
    lives = [["n0", "decode-0", 1, 7, 1], ["c", "controller", 1, 8, 1]]
    for cut, reached in (([], True), (["n0"], False), (["c"], False), (["n1"], True)):
        assert plan(lives=lives, cut=cut).pid_reached(7) is reached
        assert plan(lives=lives, cut=cut).pid_reached(8), "its own host"
    assert plan(cut=["c"]).pid_reached(99), "not on its way yet"


def test_the_end_of_a_life_on_a_cut_host_is_remembered_until_it_can_be_known() -> None:
    found = plan(lives=[["n0", "decode-0", 1, 7, 0], ["n1", "decode-1", 1, 6, 0]], cut=["n0"])
    found.settle("n1", "decode-0", 2, 9, 1, alive)
    assert not found.pid_reached(7)
    found.note_cut("n0", False)
    found.settle("n1", "decode-2", 1, 10, 1, alive)
    assert [life[3] for life in found.lives] == [9, 10]


def test_a_former_life_is_one_that_runs_beside_a_newer_one_of_its_name() -> None:
    lives = [["n0", "decode-0", 1, 7, 1], ["n1", "decode-0", 2, 8, 1]]
    assert plan(lives=lives).newest(alive) == {"decode-0": ("n1", 2, 8)}
    assert plan(lives=lives).former(alive) == ["decode-0#1 on n0"]
    lives[0][4] = 0
    assert plan(lives=lives).former(alive) == []


def test_the_file_holds_what_was_changed(tmp_path: Path) -> None:
    path = tmp_path / "hosts.json"
    write_plan(path, plan())
    with changing_plan(path) as found:
        found.note_cut("n1", True)
        found.settle("n0", "decode-0", 1, 7, 1, alive)
    assert read_plan(path).values() == plan(cut=["n1"], lives=[["n0", "decode-0", 1, 7, 1]]).values()
    with changing_plan(path) as found:
        found.note_cut("n1", False)
    assert read_plan(path).cut == []


def test_a_process_is_told_apart_as_the_backend_does() -> None:
    assert host_plan.started_ticks(os.getpid()) == started_ticks(os.getpid())
    ended = subprocess.Popen([sys.executable, "-S", "-c", ""])
    ended.wait()
    assert host_plan.started_ticks(ended.pid) is started_ticks(ended.pid) is None


# -- the backend's ranks


@pytest.fixture
def process() -> Iterator["subprocess.Popen[bytes]"]:
    running = subprocess.Popen(["sleep", "600"])
    yield running
    running.kill()
    running.wait()


@pytest.fixture
def reached() -> dict[int, bool]:
    return {}


@pytest.fixture
def rank(
    process: "subprocess.Popen[bytes]", reached: dict[int, bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Any]:
    """Adopted, as a controller's next life does; its word is what the test writes."""

    class Distant(ProcessRank):
        pass

    for name, value in distant(Distant, lambda pid: reached.get(pid, True)).items():
        setattr(Distant, name, value)

    async def adopted() -> ProcessRank:
        found = Distant(pid=process.pid, announce_file=tmp_path / "word.json")
        found._watch()
        return found

    yield adopted


async def test_a_signal_to_a_host_that_is_cut_off_is_lost(
    rank: Any, process: "subprocess.Popen[bytes]", reached: dict[int, bool]
) -> None:
    found = await rank()
    reached[process.pid] = False
    await found.kill()
    await found.ask_to_stop()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(found.ended(), 0.3)
    assert process.poll() is None
    reached[process.pid] = True
    await found.kill()
    await asyncio.wait_for(found.ended(), WITHIN_S)


async def test_an_end_on_a_host_that_is_cut_off_is_seen_when_it_is_back(
    rank: Any, process: "subprocess.Popen[bytes]", reached: dict[int, bool]
) -> None:
    found = await rank()
    reached[process.pid] = False
    process.send_signal(signal.SIGKILL)
    process.wait()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(found.ended(), 0.5)
    assert found.end is None
    reached[process.pid] = True
    assert await asyncio.wait_for(found.ended(), WITHIN_S) == "ended"
    assert found.end == "ended"


async def test_words_from_a_host_that_is_cut_off_come_when_it_is_back(
    rank: Any, process: "subprocess.Popen[bytes]", reached: dict[int, bool], tmp_path: Path
) -> None:
    from biphase.protos.process import Announcement

    def say(state: str) -> None:
        word = Announcement(name="decode-0", kind="decode", incarnation=1, pid=process.pid, state=state)  # type: ignore[arg-type]
        (tmp_path / "next.json").write_text(word.to_json())
        (tmp_path / "next.json").rename(tmp_path / "word.json")

    found = await rank()
    say("loading")
    assert found.word().state == "loading"
    reached[process.pid] = False
    say("ready")
    assert found.word().state == "loading"
    reached[process.pid] = True
    assert found.word().state == "ready"
    found.release()
