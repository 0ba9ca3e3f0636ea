"""`biphase down`: what it asks of which machine, in which order, with commands that write down how they were called."""

import os
import subprocess
from pathlib import Path

import pytest
from support.served import BIPHASE

CLUSTER = """
cluster_name: lab
provider: {type: local, head_ip: h, worker_ips: [w1, w2]}
auth: {ssh_user: me, ssh_private_key: /key}
"""


@pytest.fixture
def calls(tmp_path: Path) -> Path:
    """A folder with a `ray` and an `ssh` that write their words to ``calls``; ``w2`` cannot be reached."""
    folder = tmp_path / "bin"
    folder.mkdir()
    log = tmp_path / "calls"
    for name, end in (("ray", "exit 0"), ("ssh", 'case "$*" in *me@w2*) echo "no route" >&2; exit 255;; esac')):
        path = folder / name
        path.write_text(f'#!/bin/sh\necho "{name} $*" >>{log}\n{end}\n')
        path.chmod(0o755)
    return log


def down(calls: Path, text: str, *flags: str) -> "subprocess.CompletedProcess[str]":
    cluster = calls.with_name("cluster.yaml")
    cluster.write_text(text)
    environment = {**os.environ, "PATH": f"{calls.with_name('bin')}:{os.environ['PATH']}"}
    code = "import sys; sys.executable = '/nowhere/python'; from biphase.cluster.cli import main; sys.exit(main())"
    return subprocess.run(
        [BIPHASE[0], "-c", code, "down", str(cluster), *flags],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_drain_then_ray_down_then_the_workers(calls: Path) -> None:
    done = down(calls, CLUSTER, "-y", "--name", "mine")
    cluster = calls.with_name("cluster.yaml")
    said = calls.read_text().splitlines()
    assert said[0] == f"ray exec --no-config-cache {cluster} biphase stop --name mine"
    assert said[1] == f"ray down -y {cluster}"
    assert sorted(line.split("me@")[1] for line in said[2:]) == [
        "w1 bash --login -c 'ray stop --force'",
        "w2 bash --login -c 'ray stop --force'",
    ]
    assert "-i /key" in said[2]
    assert done.returncode == 1
    assert "w2: Ray could not be ended there (no route); whatever runs there goes on" in done.stderr
    assert done.stdout == "", "not all of it is down"


def test_where_ray_down_fails_the_workers_end_all_the_same(calls: Path) -> None:
    ray = calls.with_name("bin") / "ray"
    ray.write_text(ray.read_text().replace("exit 0", '[ "$1" != down ] || exit 3'))
    done = down(calls, CLUSTER, "-y")
    assert sorted(line.split()[0] for line in calls.read_text().splitlines()) == ["ray", "ray", "ssh", "ssh"]
    assert (done.returncode, done.stdout) == (1, "")
    assert (
        f"`ray down {calls.with_name('cluster.yaml')}` failed with 3, its words are above; the head may" in done.stderr
    )
    assert "w2: Ray could not be ended there" in done.stderr


def test_machines_of_a_cloud_end_with_their_provider(calls: Path) -> None:
    done = down(calls, "cluster_name: c\nprovider: {type: aws}\n", "-y", "--now")
    assert (done.returncode, done.stdout) == (0, "down: c\n"), done.stderr
    assert [line.split()[:2] for line in calls.read_text().splitlines()] == [["ray", "exec"], ["ray", "down"]]
    assert "biphase stop --now" in calls.read_text()


def test_nobody_to_ask_is_no_yes(calls: Path) -> None:
    done = down(calls, CLUSTER)
    assert (done.returncode, calls.exists()) == (2, False)
    assert "give -y: there is no terminal to ask at" in done.stderr
