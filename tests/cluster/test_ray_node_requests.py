"""A node is asked for by a placement group that waits, and asked for no more: with Ray's own autoscaler on fake nodes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(400)]
PROBE = Path(__file__).with_name("autoscaling_probe.py")
OWN = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "--mount", "--ipc")


def lacking() -> str:
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        return "root and unshare"
    made = subprocess.run([*OWN, "true"], check=False, capture_output=True)
    return "" if made.returncode == 0 else "the right to make namespaces"


def test_a_node_is_asked_for_comes_and_is_asked_for_no_more(tmp_path: Path) -> None:
    missing = lacking()
    if missing:
        pytest.skip(f"{missing} is lacking")
    # a /tmp of its own: Ray finds clusters by what lies there. bash stays as the first process: it collects orphans
    mounted = 'mount --make-rprivate / && mount --rbind "$1" /tmp && shift && { "$@"; exit $?; }'
    (tmp_path / "tmp").mkdir()
    bound = _below_tmp(tmp_path / "tmp")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [*OWN, "bash", "-c", bound + mounted, "bash", str(tmp_path / "tmp"), sys.executable, str(PROBE)],
        env={**environment, "HOME": "/tmp", "RAY_AUTH_MODE": "disabled", "PATH": _path()},
        capture_output=True,
        text=True,
        check=False,
        timeout=380,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    seen = json.loads(next(line for line in reversed(done.stdout.splitlines()) if line.startswith("{")))
    assert (seen["can_grow"], seen["idle"], seen["asked"]) == (True, 0, "")
    assert "4 instances ask Ray for 8 CPUs" in seen["refused"]
    assert seen["requests"] == ["PENDING"], "asked for twice is asked for once"
    assert (seen["came"], seen["came_after"]) == (False, None)
    assert (seen["idle_while_asked"], seen["idle_after"]) == (0, 1)
    assert (seen["adopted"], seen["next_life"]) == ([], ["CREATED"]), "the next life goes on asking"
    assert seen["after_stop"] == [], "a stop asks no more"


def _path() -> str:
    return f"{Path(sys.executable).parent}:{os.environ['PATH']}"


def _below_tmp(folder: Path) -> str:
    """Commands that keep the interpreter and the sources visible below the private /tmp, where they are there."""
    root = Path(__file__).parents[2]
    needed = {Path(sys.prefix), Path(sys.base_prefix), root}
    return "".join(
        f"mkdir -p '{folder / path.relative_to('/tmp')}' && mount --bind '{path}' '{folder / path.relative_to('/tmp')}' && "
        for path in needed
        if path.is_relative_to("/tmp")
    )
