"""The arithmetic of GPU benches: what a profile says, how often work is repeated, what a step has to move."""

import json
from pathlib import Path

import pytest
from engine_gpu import DECODES, DEFAULT_MODEL, GAPS, PREFILLS, matrix_weights, prefill_flops
from gpu_profile import idle_share, is_kernel, kernel_spans
from gpu_report import GpuReport
from gpu_timing import times_over
from kernel_case import Result
from report import add_arguments

from biphase.engine.checkpoint.dummy import dummy_config

EVENTS = [
    {"ph": "X", "cat": "kernel", "name": "b", "ts": 130.0, "dur": 20.0},
    {"ph": "X", "cat": "kernel", "name": "a", "ts": 100.0, "dur": 10.0},
    {"ph": "X", "cat": "kernel", "name": "beside a", "ts": 105.0, "dur": 3.0},
    {"ph": "X", "cat": "gpu_memcpy", "name": "Memcpy HtoD", "ts": 110.0, "dur": 20.0},
    {"ph": "X", "cat": "cuda_runtime", "name": "cudaGraphLaunch", "ts": 0.0, "dur": 500.0},
    {"ph": "f", "cat": "ac2g", "ts": 100.0},
    {"ph": "M", "name": "process_name"},
]


def test_the_gap_is_the_time_without_a_kernel() -> None:
    assert [event["name"] for event in EVENTS if is_kernel(event)] == ["b", "a", "beside a"]
    assert kernel_spans(EVENTS) == [(100.0, 110.0), (105.0, 108.0), (130.0, 150.0)]
    assert idle_share(kernel_spans(EVENTS)) == pytest.approx(20 / 50)
    with pytest.raises(RuntimeError, match="the profiler saw no kernel"):
        idle_share([])


def test_short_work_is_repeated_and_long_work_is_not() -> None:
    assert times_over(3.0, 1) == 256
    assert times_over(100.0, 64) == 4
    assert times_over(700.0, 1) == 3
    assert times_over(40_000.0, 8) == 1
    assert times_over(0.2, 400) == 1


def test_shares_are_of_what_the_run_found() -> None:
    from gpu_timing import Ceilings

    ceilings = Ceilings(copy=2e12, read=2e12, matrix=1e15)
    assert Result.moved("x", 100.0, 1e8, ceilings).value == pytest.approx(0.5)
    assert Result.multiplied("x", 1000.0, 5e11, ceilings).value == pytest.approx(0.5)


def test_a_prefill_of_llama_counts_its_products_and_half_its_scores() -> None:
    """8B parameters less embedding and head are 6.98e9; 4 S^2 D H / 2 for 32 layers of 32 heads of 128."""
    config = dummy_config(str(DEFAULT_MODEL))
    assert matrix_weights(config) == 32 * (4096 * 128 * (2 * 32 + 2 * 8) + 3 * 4096 * 14336) == 6_979_321_856
    attention = 32 * 4 * 8192**2 * 128 * 32 / 2
    assert prefill_flops(config, 8192) == pytest.approx(2 * 6_979_321_856 * 8192 + attention + 2 * 4096 * 128_256)


def test_the_goals_are_the_issue_s() -> None:
    assert PREFILLS == {8192: 0.65, 512: 0.45}
    assert DECODES == {(1, 1024): 1.25, (64, 2048): 1.35}
    assert {load.requests: bound for load, bound in GAPS.items() if bound} == {64: 0.05, 1: 0.08}


def test_a_group_that_fails_is_told_and_the_others_are_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import argparse

    parser = argparse.ArgumentParser()
    add_arguments(parser)
    arguments = parser.parse_args(["--json", str(tmp_path / "out.json")])
    out = GpuReport(bench="test", columns=("a",))
    seen = []

    def fails() -> None:
        seen.append(json.loads((tmp_path / "out.json").read_text())["left"])
        raise RuntimeError("a kernel\nfailed")

    out.run_groups({"first": lambda: out.row(1), "second": fails, "third": lambda: out.row(3)}, arguments)
    assert out.finish(arguments) == 1
    assert seen == [["second", "third"]]
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["rows"] == [[1], [3]] and found["left"] == []
    assert found["failed"] == {"second": "RuntimeError: a kernel failed"}
    assert "FAILED second: RuntimeError: a kernel failed" in capsys.readouterr().out
