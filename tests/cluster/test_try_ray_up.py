"""A real `ray up` on three hosts of this machine, by the script that people run."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "try_ray_up.sh"
LACKING = 3
pytestmark = [pytest.mark.ray, pytest.mark.model, pytest.mark.slow, pytest.mark.timeout(900)]


def test_three_hosts_serve_lose_one_under_load_and_nothing_is_left() -> None:
    done = subprocess.run(
        [str(SCRIPT)],
        env={**os.environ, "BIPHASE_VENV": sys.prefix},
        capture_output=True,
        text=True,
        check=False,
        timeout=850.0,
    )
    if done.returncode == LACKING:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stdout + done.stderr[-6000:]
    assert re.search(r"P is on (\S+), D on (?!\1)", done.stdout)
    assert "gets the tokens of the local run" in done.stdout
    assert "`ray submit` of a client script" in done.stdout
    assert "`ray job submit` of a client script" in done.stdout, (
        "the dev dependencies have ray[default], which it needs"
    )
    assert "all of them ended as in the local run" in done.stdout
    assert "D serves again" in done.stdout
    assert "no process, namespace, mount or file is left" in done.stdout
