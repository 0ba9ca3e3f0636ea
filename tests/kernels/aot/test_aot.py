"""Every kernel compiles ahead of time for every architecture, and the harness that says so objects when it must."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[3]
BAD_KERNELS = Path(__file__).with_name("bad_kernels")


def compiled(tmp_path: Path, *arguments: str) -> tuple[int, str, dict[str, Any]]:
    """Exit code, what was printed, and the report, of a process of its own: in this one kernels are interpreted."""
    report = tmp_path / "report.json"
    command = [sys.executable, str(ROOT / "bench" / "aot.py"), "--json", str(report), *arguments]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert report.exists(), done.stdout + done.stderr
    return done.returncode, done.stdout, json.loads(report.read_text())


def test_an_unknown_op_is_refused_in_a_line() -> None:
    command = [sys.executable, str(ROOT / "bench" / "aot.py"), "--op", "embed", "nope"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("aot.py: no op nope; there are: decode_attention, ")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_one_variant_of_each_kernel_compiles_for_all_architectures(tmp_path: Path) -> None:
    code, printed, report = compiled(tmp_path, "--quick")
    assert code == 0, printed
    assert report["problems"] == 0
    ops = {path.parent.name for path in (ROOT / "kernels").glob("*/variants.py")}
    assert {row["op"] for row in report["compiled"] if row["sm"] == 90} == ops, "an op has no quick variant"
    assert {row["sm"] for row in report["compiled"]} == {80, 89, 90, 100}


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_all_variants_and_all_tuned_settings_compile(tmp_path: Path) -> None:
    code, printed, _ = compiled(tmp_path)
    assert code == 0, printed


@pytest.mark.slow
def test_the_harness_objects_to_bad_kernels(tmp_path: Path) -> None:
    code, printed, report = compiled(tmp_path, "--kernels", str(BAD_KERNELS), "--targets", "80", "90")
    assert code == 1
    failed = dict(
        line.removeprefix("FAILED ").split(": ", 1) for line in printed.splitlines() if line.startswith("FAILED")
    )
    expected = {
        "spills": "bytes spilled",
        "too much shared memory": "bytes of shared memory, ",
        "not refused": "not refused, though it needs 10.3",
        "refused otherwise": "refused without naming 10.3 in one line: no",
        "narrow": "no kernel shows wide_loads",
        "compiles again": "another step compiles anew: copy_kernel",
        "specialised": "fill_kernel: num_tokens is specialised",
        "does not compile": "Error",
        "launches nothing": "launches no kernel",
    }
    for name, message in expected.items():
        for sm in (80, 90):
            assert message in failed.pop(f"{name} on sm_{sm}", "(passed)")
    for sm in (80, 90):
        assert failed.pop(f"not asynchronous on sm_{sm}") in ("no kernel shows async_loads", "no kernel shows mma_sync")
    assert failed == {}
    assert [row["message"] for row in report["refused"]][:2] == ["the kernel needs a GPU of capability 10.3"] * 2
    good = {row["sm"]: row for row in report["compiled"] if row["variant"] == "good"}
    assert good[80]["mma_sync"] > 0 and good[80]["wgmma"] == 0 and good[80]["cp_async_16"] > 0
    assert good[90]["wgmma"] > 0 and good[90]["registers"] > 32 and good[90]["shared_bytes"] > 16_384
