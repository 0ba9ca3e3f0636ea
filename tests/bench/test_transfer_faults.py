"""A small set of the transfers under random faults, between two processes, over each wire."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).resolve().parents[2] / "bench" / "transfer_faults.py"
NUM_KINDS = 8

TRANSFERS = 400
"""Some 25 of them lose their wire, and half of those have a second one to go on by. Of 120 they were two to four, and once
none at all."""


@pytest.mark.timeout(120)
@pytest.mark.parametrize("transport", ["grpc", "tcp", "shm"])
def test_no_wrong_byte_none_late_nothing_leaks(transport: str, tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    flags = [
        "--transport",
        transport,
        "--transfers",
        str(TRANSFERS),
        "--deadline-ms",
        "1500",
        "--grace-ms",
        "2000",
        "--json",
        str(out),
    ]
    done = subprocess.run(
        [sys.executable, "-W", "error", str(PROGRAM), *flags], check=False, capture_output=True, text=True, timeout=110
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads(out.read_text())
    goals = {goal["name"].removeprefix(f"{transport}_"): goal for goal in figures["goals"]}
    missed = [name for name in ("wrong", "late", "leaked") if not goals[name]["met"]]
    assert not missed, figures["wires"][transport]
    faults, by_frame = figures["wires"][transport]["faults"], figures["wires"][transport]["by_frame"]
    assert len(faults) == NUM_KINDS and min(faults.values()) >= 1
    assert min(by_frame["piece"].values()) >= 1 and set(by_frame) == {"piece", "trailer"}
    row = dict(zip(figures["columns"], figures["rows"][0], strict=True))
    assert row["done"] >= 24 and row["fell back"] >= 1, row


def test_an_unknown_wire_is_refused_in_a_line() -> None:
    done = subprocess.run(
        [sys.executable, str(PROGRAM), "--transport", "pigeon"], check=False, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith("transport 'pigeon' is none of grpc, tcp, shm, dist")
