"""Every GPU bench from its first line to its last where there is no GPU: tiny shapes, kernels interpreted."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


def smoke(environment: dict[str, str], file: Path, bench: str, *arguments: str) -> dict[str, Any]:
    """The JSON that it leaves. Started anew by itself with the interpreter on, in the same bare Python."""
    command = [sys.executable, f"bench/{bench}", "--smoke", "--json", str(file), *arguments]
    done = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True, timeout=280, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(file.read_text())
    assert found["left"] == [] and found["failed"] == {}
    return found


def test_kernels(bare: dict[str, str], tmp_path: Path) -> None:
    found = smoke(bare, tmp_path / "out.json", "kernels.py", "--only", "decode", "prefill")
    names = [row[0] for row in found["rows"]]
    assert names[:3] == ["device copy", "read-only stream", "8192^3 bf16 product"]
    assert {"decode attention 8 x 32k", "prefill attention 2k after 30k"} <= set(names)


@pytest.mark.long
def test_kernels_that_stream_and_draw(bare: dict[str, str], tmp_path: Path) -> None:
    found = smoke(bare, tmp_path / "out.json", "kernels.py", "--only", "streams", "experts", "sample")
    assert {"rms_norm 8192", "kv_unpack int4 8192", "grouped products 64", "sample mixed 64"} <= {
        row[0] for row in found["rows"]
    }


@pytest.mark.long
def test_engine_steps(bare: dict[str, str], tmp_path: Path) -> None:
    found = smoke(bare, tmp_path / "out.json", "engine_gpu.py", "--only", "decode", "launches")
    kernels = found["decode_step_kernels"]
    assert {"embed_kernel", "rope_and_cache_kernel", "silu_mul_kernel"} <= kernels.keys()
    assert "decode step, 2 x 20" in [row[0] for row in found["rows"]]


@pytest.mark.long
def test_engine(bare: dict[str, str], tmp_path: Path) -> None:
    """Mixtral's: its feed-forward is another."""
    model = ("--model", "bench/configs/mixtral-8x7b.json", "--num-layers", "1")
    found = smoke(bare, tmp_path / "out.json", "engine_gpu.py", *model)
    names = [row[0] for row in found["rows"]]
    assert "host gap, 2 requests, prompts of 8 computed here" in names and "prefill step of 16" in names


@pytest.mark.long
def test_pair(bare: dict[str, str], tmp_path: Path) -> None:
    found = smoke(bare, tmp_path / "out.json", "gpu_pair.py")
    assert [(row[0], row[1]) for row in found["rows"]] == [("tokens", 1), ("tokens", 16), ("bits", 1), ("bits", 21)]
    assert all(goal["met"] for goal in found["goals"])


@pytest.mark.long
@pytest.mark.parametrize("bench", ["kernels.py", "engine_gpu.py", "gpu_pair.py"])
def test_without_a_gpu_and_without_smoke_it_is_refused(bench: str, bare: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, f"bench/{bench}"], check=False, cwd=ROOT, capture_output=True, text=True, timeout=60, env=bare
    )
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1 and "torch finds none here (--smoke tests the program)" in done.stderr
