"""Logs are read where they are written: parts, tails, next lives, and hosts that are gone."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.wanted import made, up

from biphase.cluster.local_logs import PART_BYTES, LocalLogs, read_part
from biphase.cluster.log_reader import read_log
from biphase.protos.errors import InvalidRequest


@dataclass
class HostLogs:
    """A host's files, which others read."""

    files: dict[str, bytes] = field(default_factory=dict)
    gone: bool = False
    poll_s = 0.0

    async def read(self, path: str, at: int, tail_lines: int = 0) -> tuple[int, bytes]:
        await asyncio.sleep(0)
        if self.gone:
            raise InvalidRequest("it lies on far, which cannot be asked: it is dead")
        if path not in self.files:
            raise InvalidRequest(f"{path} on far: No such file or directory")
        data = self.files[path][at:] if not tail_lines else b"".join(self.files[path].splitlines(True)[-tail_lines:])
        return len(self.files[path]), data


class Cluster:
    """A controller on `near` with instances on hosts that are called as they are."""

    def __init__(self, run_dir: Path) -> None:
        self.core = made()
        self.hosts: dict[str, HostLogs] = {"decode-0": HostLogs(), "decode-1": HostLogs()}
        self.backend = self
        self.spec = SimpleNamespace(run_dir="/run")
        self.announcer = SimpleNamespace(
            current=SimpleNamespace(name="controller", log_file=str(run_dir / "controller-1.log"))
        )

    def logs_of(self, node: str) -> HostLogs:
        if node not in self.hosts:
            raise InvalidRequest(f"it lies on {node}, which is gone" if node else "it has no process yet")
        return self.hosts[node]


@pytest.fixture
def cluster(tmp_path: Path) -> Any:
    return Cluster(tmp_path)


async def whole(parts: AsyncIterator[bytes]) -> bytes:
    return b"".join([part async for part in parts])


async def test_an_instance_is_read_where_it_runs_and_the_controller_beside_itself(cluster: Any, tmp_path: Path) -> None:
    cluster.hosts["decode-0"].files["/run/logs/decode-0-1.log"] = b"one\ntwo\nthree\n"
    assert await whole(read_log(cluster, "decode-0", tail_lines=0, follow=False)) == b"one\ntwo\nthree\n"
    assert await whole(read_log(cluster, "decode-0", tail_lines=2, follow=False)) == b"two\nthree\n"
    (tmp_path / "controller-1.log").write_bytes(b"mine\n")
    assert await whole(read_log(cluster, "controller", tail_lines=0, follow=False)) == b"mine\n"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("decod-0", "no process is called decod-0: did you mean decode-0?"),
        ("x", "no process is called x: processes: prefill-0, decode-0, decode-1, router-0, controller"),
        ("prefill-0", "the log of prefill-0 cannot be read: it lies on prefill-0, which is gone"),
        ("decode-1", "the log of decode-1 cannot be read: /run/logs/decode-1-1.log on far: No such file or directory"),
    ],
)
async def test_what_cannot_be_read_is_refused_in_a_line(cluster: Any, name: str, reason: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        await whole(read_log(cluster, name, tail_lines=0, follow=False))
    assert str(refused.value) == reason


async def test_one_that_is_followed_goes_on_on_the_host_of_its_next_life(cluster: Any) -> None:
    first, second = cluster.hosts["decode-0"], cluster.hosts["decode-1"]
    first.files["/run/logs/decode-0-1.log"] = b"old\n"
    async with asyncio.timeout(10):
        log = read_log(cluster, "decode-0", tail_lines=1, follow=True)
        assert await anext(log) == b"old\n"
        first.files["/run/logs/decode-0-1.log"] += b"its last words\n"
        assert await anext(log) == b"its last words\n"
        first.gone = True
        cluster.core.gone("decode-0", 1, "its host has lost power", 5.0)
        cluster.core.decide(5.0)
        coming = asyncio.ensure_future(anext(log))
        for _ in range(20):  # it has no process yet
            await asyncio.sleep(0)
        assert not coming.done()
        up(cluster.core, "decode-0", 6.0, node="decode-1")
        second.files["/run/logs/decode-0-2.log"] = b"new\n"
        assert await coming == b"new\n"
        del cluster.core.slots["decode-0"]
        assert await anext(log, b"the end") == b"the end", "it is wanted no more"


async def test_what_a_next_life_writes_before_its_host_is_known_is_told_once(cluster: Any) -> None:
    """One host is all there is: its logs are read whatever the host is called."""
    here = HostLogs()
    cluster.logs_of = lambda node: here
    here.files["/run/logs/decode-0-1.log"] = b"old\n"
    async with asyncio.timeout(10):
        log = read_log(cluster, "decode-0", tail_lines=0, follow=True)
        assert await anext(log) == b"old\n"
        cluster.core.gone("decode-0", 1, "killed", 5.0)
        cluster.core.decide(5.0)
        here.files["/run/logs/decode-0-2.log"] = b"loading\n"
        assert await anext(log) == b"loading\n"
        coming = asyncio.ensure_future(anext(log))
        up(cluster.core, "decode-0", 6.0, node="here")
        for _ in range(20):
            await asyncio.sleep(0)
        assert not coming.done()
        here.files["/run/logs/decode-0-2.log"] += b"ready\n"
        assert await coming == b"ready\n"


async def test_one_that_is_followed_is_refused_where_its_host_is_gone_and_no_other_life_begins(cluster: Any) -> None:
    cluster.hosts["decode-0"].files["/run/logs/decode-0-1.log"] = b"old\n"
    async with asyncio.timeout(10):
        log = read_log(cluster, "decode-0", tail_lines=0, follow=True)
        assert await anext(log) == b"old\n"
        cluster.hosts["decode-0"].gone = True
        with pytest.raises(InvalidRequest, match="the log of decode-0 cannot be read: it lies on far"):
            await anext(log)


@pytest.mark.parametrize("end", [b"\n", b""])
@pytest.mark.parametrize("lines", [1, 2, 3, 4, 900])
def test_the_last_lines_are_found_over_parts(tmp_path: Path, lines: int, end: bytes) -> None:
    content = [b"short", b"x" * (2 * PART_BYTES), b"y" * (PART_BYTES - 1), b"last"]
    path = tmp_path / "log"
    path.write_bytes(b"\n".join(content) + end)
    at, data, problem = read_part(str(path), 0, lines)
    found = data
    while data:
        assert len(data) <= PART_BYTES, "never more than a part at once"
        at, data, problem = read_part(str(path), at, 0)
        found += data
    assert (found, problem) == (b"\n".join(content[-lines:]) + end, "")


def test_an_empty_log_has_no_lines(tmp_path: Path) -> None:
    (tmp_path / "log").touch()
    assert read_part(str(tmp_path / "log"), 0, 5) == (0, b"", "")


async def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="/nowhere: No such file or directory"):
        await LocalLogs().read(f"{tmp_path}/nowhere", 0)
