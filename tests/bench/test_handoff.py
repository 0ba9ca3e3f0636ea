"""The bench of handoffs runs, at its smallest size."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).resolve().parents[2] / "bench" / "handoff.py"


@pytest.mark.timeout(120)
def test_every_arm_of_rates_and_plans_gives_a_figure(tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    flags = ["--megabytes", "2", "--rounds", "1", "--transports", "grpc", "tcp", "shm", "--json", str(out)]
    for part in ("rates", "plans"):
        done = subprocess.run(
            [sys.executable, str(PROGRAM), "--part", part, *flags],
            check=False,
            capture_output=True,
            text=True,
            timeout=100,
        )
        assert done.returncode == 0, done.stderr
        figures = json.loads(out.read_text())
        arms = {row[1]: row[2] for row in figures["rows"]}
        # three wires with and without digests, three bare arms, the ring copied out in two ways, a copy; two pairs of plans
        assert len(arms) == (11 if part == "rates" else 6), arms
        assert all(rate > 0 for rate in arms.values())
        assert bool(figures["goals"]) == (part == "rates")


def test_a_wire_that_is_none_is_refused_in_a_line() -> None:
    done = subprocess.run(
        [sys.executable, str(PROGRAM), "--transports", "pigeon"],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert "invalid choice: 'pigeon'" in done.stderr.splitlines()[-1]
