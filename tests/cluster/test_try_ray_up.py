"""A real `ray up` on three hosts of this machine, by the script that people run."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "try_ray_up.sh"
LACKING = 3
pytestmark = [pytest.mark.ray, pytest.mark.model, pytest.mark.long]


def run(*flags: str, within_s: float) -> str:
    """What it prints; skips, with the reason, where the machine lacks something."""
    done = subprocess.run(
        [str(SCRIPT), *flags],
        env={**os.environ, "BIPHASE_VENV": sys.prefix},
        capture_output=True,
        text=True,
        check=False,
        timeout=within_s,
    )
    if done.returncode == LACKING:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stdout + done.stderr[-6000:]
    return done.stdout


@pytest.mark.timeout(600)
def test_three_hosts_serve_and_nothing_is_left() -> None:
    told = run("--quick", within_s=560.0)
    assert re.search(r"P is on (\S+), D on (?!\1)", told)
    assert "gets the tokens of the local run" in told
    assert "no process, namespace, mount or file is left" in told


@pytest.mark.timeout(1200)
def test_the_host_of_decode_loses_power_under_load() -> None:
    told = run(within_s=1150.0)
    assert "all of them ended as in the local run" in told
    assert "D serves again" in told
